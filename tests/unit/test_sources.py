"""Data of every kind: found by path, glob, folder and builder, known by their content alone, and errors in one sentence. Offline."""

import bz2
import errno
import gzip
import json
import lzma
import os
import shutil
import tempfile
import time
from pathlib import Path

import pyarrow
import pytest

from test_prepare import chat, make_tokenizer, parts_in, request, tokenizer_folder, write_lines  # noqa: F401  first: it says where the package is
from ulysses_plus import hf_datasets, parts, sources, token_file
from ulysses_plus.conversation import KNOWN_ROLES
from ulysses_plus.errors import UserError
from ulysses_plus.prepare import prepare

NOBODY = 65534
PAIRS = [("a", "yes"), ("b", "no"), ("c", "the")]


def write(path, pairs):
    """Writes questions and answers in the form that the path's suffix says; a .txt has the questions alone."""
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"prompt": [q for q, _ in pairs], "completion": [a for _, a in pairs]})
    if path.suffix == ".csv":
        path.write_text("prompt,completion\n" + "".join(f"{q},{a}\n" for q, a in pairs))
    elif path.suffix == ".txt":
        path.write_text("".join(f"{q}\n" for q, _ in pairs))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif path.suffix == ".arrow":
        with pyarrow.ipc.new_stream(str(path), table.schema) as file:
            file.write_table(table)
    else:
        write_lines(path, [{"prompt": q, "completion": a} for q, a in pairs])
    return path


def pack(path, suffix):
    packed = path.with_name(f"{path.name}.{suffix}")
    with pyarrow.CompressedOutputStream(str(packed), "zstd") if suffix == "zst" else {"gz": gzip, "xz": lzma, "bz2": bz2}[suffix].open(packed, "wb") as file:
        file.write(path.read_bytes())
    return packed


def made(tmp_path, tokenizer, source, kind="sft", key="sources", **data):
    """What prepare answers for a source; `kind` is the recipe's type, or the suffix of the files."""
    asked = request(tmp_path, tokenizer, source, **data)
    asked["type"] = "causal" if kind in ("causal", "txt", "text") else "sft"
    asked["data"][key] = asked["data"].pop("sources") if key != "sources" else asked["data"]["sources"]
    return prepare({**asked, "sources_key": key})


def tokens(answer):
    return token_file.read(answer["tokens"])


BUILDERS = {"jsonl": "json", "parquet": "parquet", "csv": "csv", "txt": "text", "arrow": "arrow"}


@pytest.mark.parametrize("suffix", BUILDERS)
def test_files_are_found_by_path_glob_and_builder(tmp_path, tokenizer_folder, monkeypatch, suffix):
    write(tmp_path / f"d/part-1.{suffix}", PAIRS[:2])
    write(tmp_path / f"d/part-2.{suffix}", PAIRS[2:])
    whole = str(write(tmp_path / f"whole.{suffix}", PAIRS))
    want = tokens(made(tmp_path, tokenizer_folder, whole, suffix))
    assert len(want[0]) == 3
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    builder = BUILDERS[suffix]
    for name in (f"./whole.{suffix}", f"whole.{suffix}", f"~/whole.{suffix}", {"name_or_path": builder, "kwargs": {"data_files": f"~/whole.{suffix}"}}):
        assert made(tmp_path, tokenizer_folder, name, suffix)["cached"]
    parts = f"{tmp_path}/d/part-*.{suffix}"
    first = made(tmp_path, tokenizer_folder, parts, suffix)
    assert tokens(first) == want and not first["cached"]
    for form in (
        f"d/*.{suffix}", f"~/d/part-?.{suffix}", {"name_or_path": builder, "kwargs": {"data_files": parts}},
        {"name_or_path": builder, "kwargs": {"data_files": [f"d/part-1.{suffix}", f"{tmp_path}/d/part-2.{suffix}"]}},
        {"name_or_path": builder, "split": "x", "kwargs": {"data_files": {"x": parts, "y": whole}}},
    ):
        assert made(tmp_path, tokenizer_folder, form, suffix)["cached"]
    folder = made(tmp_path, tokenizer_folder, "d", suffix)
    assert tokens(folder) == want
    for name in (parts, whole, {"name_or_path": builder, "kwargs": {"data_files": parts}}):    # to evaluate on, without a word of splits
        assert tokens(made(tmp_path, tokenizer_folder, name, suffix, key="eval_sources")) == want
    assert made(tmp_path, tokenizer_folder, "d", suffix, key="eval_sources")["tokens"] == folder["tokens"]
    assert [len(tokens(made(tmp_path, tokenizer_folder, name + ":train[1:]", suffix))[0]) for name in (whole, parts, "d")] == [2, 2, 2]
    assert tokens(made(tmp_path, tokenizer_folder, whole + ":train[2:]+train[:1]", suffix))[0] == [want[0][2], want[0][0]]
    for name in (whole, parts, "d"):
        with pytest.raises(UserError, match=f"{name.replace('*', '.')}: split nonsense: expected one of train$"):
            made(tmp_path, tokenizer_folder, {"name_or_path": name, "split": "nonsense"}, suffix)
    assert not [name for name in os.listdir(tmp_path / "cache") if not name.endswith((".safetensors", ".lock"))]


@pytest.mark.parametrize("name,suffix", [("csv", "gz"), ("csv", "zst"), ("csv", "xz"), ("csv", "bz2"), ("txt", "gz"), ("txt", "zst"), ("parquet", "gz"), ("arrow", "zst")])
def test_compressed_files_of_any_kind(tmp_path, tokenizer_folder, name, suffix):
    plain = write(tmp_path / f"a.{name}", PAIRS)
    packed = str(pack(plain, suffix))
    want = tokens(made(tmp_path, tokenizer_folder, str(plain), name))
    assert tokens(made(tmp_path, tokenizer_folder, packed, name)) == want
    assert made(tmp_path, tokenizer_folder, {"name_or_path": BUILDERS[name], "kwargs": {"data_files": packed}}, name)["cached"]
    assert len(tokens(made(tmp_path, tokenizer_folder, f"{tmp_path}/a.{name}*", name))[0]) == 6
    Path(packed).write_bytes(Path(packed).read_bytes()[:-5])
    with pytest.raises(UserError, match=f"expected a .{suffix} file, found a broken one"):
        made(tmp_path, tokenizer_folder, packed, name)


def test_folders_may_have_odd_names(tmp_path, tokenizer_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("br[1] x", ".hidden/__y__", "col:on"):
        write(tmp_path / folder / "a.csv", PAIRS)
        for name in (f"{folder}/a.csv", f"{tmp_path}/{folder}/a.csv:train"):
            assert made(tmp_path, tokenizer_folder, name, cache_dir=f"{folder}/c")["num_samples"] == 3
    assert made(tmp_path, tokenizer_folder, "col:on/*.csv")["num_samples"] == made(tmp_path, tokenizer_folder, "col:on/*.csv:train")["num_samples"] == 3


def test_one_glob_finds_plain_and_compressed_json(tmp_path, tokenizer_folder):
    pack(write(tmp_path / "a.json", PAIRS), "gz")
    assert made(tmp_path, tokenizer_folder, f"{tmp_path}/a.json*")["num_samples"] == 6
    write(tmp_path / "a.csv", PAIRS)
    with pytest.raises(UserError, match=r"a.\*: expected files of one kind, found .*a.csv and .*a.json: give each kind a source of its own"):
        made(tmp_path, tokenizer_folder, f"{tmp_path}/a.*")


def save(folder, pairs):
    import datasets

    shutil.rmtree(folder, ignore_errors=True)
    datasets.Dataset.from_list([{"prompt": q, "completion": a} for q, a in pairs]).save_to_disk(folder)


def saved_rows(folder, pairs):
    save(folder / "saved", pairs)
    return str(folder / "saved"), folder / "saved" / "data-00000-of-00001.arrow"


def saved_rows_replaced(folder, pairs):
    """Only the file of rows is another."""
    path = folder / "saved" / "data-00000-of-00001.arrow"
    if not path.exists():
        save(folder / "saved", pairs)
    save(folder / "other", pairs)
    shutil.copy(folder / "other" / path.name, path)
    return str(folder / "saved"), path


def saved_split(folder, pairs):
    import datasets

    shutil.rmtree(folder / "saved", ignore_errors=True)
    datasets.DatasetDict({"train": datasets.Dataset.from_list([{"prompt": q, "completion": a} for q, a in pairs])}).save_to_disk(folder / "saved")
    return str(folder / "saved"), folder / "saved" / "train" / "data-00000-of-00001.arrow"


STALE = {
    **{suffix: lambda folder, pairs, suffix=suffix: (str(write(folder / f"a.{suffix}", pairs)),) * 2 for suffix in BUILDERS},
    "csv.gz": lambda folder, pairs: (str(pack(write(folder / "a.csv", pairs), "gz")),) * 2,
    "parquet by glob": lambda folder, pairs: (f"{folder}/*.parquet", write(folder / "a.parquet", pairs)),
    "csv by builder": lambda folder, pairs: ({"name_or_path": "csv", "kwargs": {"data_files": f"{folder}/a.csv"}}, write(folder / "a.csv", pairs)),
    "json with arguments": lambda folder, pairs: ({"name_or_path": "json", "kwargs": {"data_files": f"{folder}/a.jsonl", "encoding": "utf-8"}}, write(folder / "a.jsonl", pairs)),
    "folder": lambda folder, pairs: (str(folder / "d"), write(folder / "d/train.csv", pairs)),
    "folder by builder": lambda folder, pairs: ({"name_or_path": "csv", "kwargs": {"data_dir": str(folder / "d")}}, write(folder / "d/train.csv", pairs)),
    "saved": saved_rows, "saved, rows replaced": saved_rows_replaced, "saved split": saved_split,
}


@pytest.mark.parametrize("form", STALE)
def test_content_alone_decides_what_is_prepared_again(tmp_path, tokenizer_folder, form):
    def age(path):
        for each in [path, *Path(path).parent.iterdir()]:
            os.utime(each, (1e9, 1e9))
        return os.path.getsize(path)

    got = {}
    for question in ("aaa", "zzz"):
        source, path = STALE[form](tmp_path / "data", [(question, question)] * 3)
        size = age(path)
        answer = made(tmp_path, tokenizer_folder, source, form)
        assert not answer["cached"] and got.setdefault("size", size) == size
        ids = tokens(answer)[0][0]
        assert question in make_tokenizer().decode(ids)
    os.utime(path)
    assert made(tmp_path, tokenizer_folder, source, form) == {**answer, "cached": True}
    if form.startswith("saved"):    # the same rows, saved anew
        assert made(tmp_path, tokenizer_folder, STALE[form](tmp_path / "data", [("zzz", "zzz")] * 3)[0])["cached"]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path, tokenizer_folder, monkeypatch, suffix):
    path, real = write(tmp_path / f"a.{suffix}", PAIRS), sources.opened

    def late(source, scratch):
        write(path, PAIRS[::-1])
        return real(source, scratch)

    monkeypatch.setattr(sources, "opened", late)
    with pytest.raises(UserError, match=rf"run.yml:9\): .*a.{suffix}: changed while it was read: prepare again"):
        made(tmp_path, tokenizer_folder, str(path))
    assert not [name for name in os.listdir(tmp_path / "cache") if not name.endswith(".lock")]
    # Touched, or written with the same content, it has not changed.
    monkeypatch.setattr(sources, "opened", lambda source, scratch: (os.utime(path), write(path, PAIRS[::-1]), real(source, scratch))[-1])
    assert not made(tmp_path, tokenizer_folder, str(path))["cached"]


def test_a_file_that_joins_a_folder_while_it_is_read_is_an_error(tmp_path, tokenizer_folder, monkeypatch):
    write(tmp_path / "d/a.jsonl", PAIRS[:1])
    real = sources.opened

    def late(*arguments, **more):
        write(tmp_path / "d/b.jsonl", PAIRS[1:])
        return real(*arguments, **more)

    monkeypatch.setattr(sources, "opened", late)
    with pytest.raises(UserError, match="changed while it was read: prepare again"):
        made(tmp_path, tokenizer_folder, str(tmp_path / "d"))
    monkeypatch.undo()
    (tmp_path / "d/b.jsonl").unlink()
    assert len(tokens(made(tmp_path, tokenizer_folder, str(tmp_path / "d")))[0]) == 1


def test_cells_of_csv_are_text_as_written(tmp_path, tokenizer_folder):
    """007 is no number, NA and nothing are no float."""
    said = [("the no", "007"), ("yes", "NA"), ("a", "1.50"), ("b", "")]
    csv = write(tmp_path / "a.csv", said)
    lines = write(tmp_path / "a.jsonl", said)
    assert tokens(made(tmp_path, tokenizer_folder, str(csv), on_error="skip")) == tokens(made(tmp_path, tokenizer_folder, str(lines), on_error="skip"))
    folder = write(tmp_path / "f/a.csv", said)
    assert tokens(made(tmp_path, tokenizer_folder, str(folder.parent), on_error="skip")) == tokens(made(tmp_path, tokenizer_folder, str(lines), on_error="skip"))


def test_what_does_not_change_tokens_prepares_nothing_again(tmp_path, tokenizer_folder, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", [chat("a" * (i + 1), "yes") for i in range(6)])
    first = made(tmp_path, tokenizer_folder, path)
    for more in (
        {"sample_seed": 7}, {"sample_ratio": 1.0}, {"type": "huggingface_instruct"}, {"type": "huggingface"}, {"split": "train"}, {"weight": 2.0}, {"column": "text"},
        {"role_mapping": {"user": "user", "assistant": "assistant"}}, {"role_mapping": {}}, {"content_key": None}, {"split_mapping": {"test": "x"}},
        {"name_or_path": "json", "kwargs": {"data_files": path}}, {"name_or_path": "json", "kwargs": {"data_files": path, "num_proc": 2}},
        {"name_or_path": "huggingface_instruct:" + path}, {"name_or_path": path + ":train"},
    ):
        assert made(tmp_path, tokenizer_folder, {"name_or_path": path, **more}) == {**first, "cached": True}, more
    for options in ({"on_error": "skip"}, {"max_length": 9, "pack_samples": True, "seed": 3, "num_proc": 1}):
        assert made(tmp_path, tokenizer_folder, path, **options)["cached"], options
    assert made(tmp_path, tokenizer_folder, path, key="eval_sources")["cached"]
    # Nor where the option came first.
    other = write_lines(tmp_path / "b.jsonl", [chat("b")])
    assert not made(tmp_path, tokenizer_folder, other, on_error="skip")["cached"] and made(tmp_path, tokenizer_folder, other)["cached"]
    # A mapping that is built in.
    monkeypatch.chdir(tmp_path)
    name = "meta-math/MetaMathQA"
    Path(name).mkdir(parents=True)
    write_lines(tmp_path / name / "train.jsonl", [{"query": "a", "response": "b"}])
    assert not made(tmp_path, tokenizer_folder, name)["cached"]
    assert made(tmp_path, tokenizer_folder, {"name_or_path": name, "role_mapping": KNOWN_ROLES[name]})["cached"]
    # What does change them: also the order of the roles.
    for more in ({"sample_count": 2}, {"sample_ratio": 0.5}, {"split": "train[1:]"}, {"content_key": "content"}):
        assert not made(tmp_path, tokenizer_folder, {"name_or_path": path, **more})["cached"], more
    assert not made(tmp_path, tokenizer_folder, {"name_or_path": name, "role_mapping": dict(reversed(KNOWN_ROLES[name].items()))})["cached"]


@pytest.mark.parametrize("source,error", [
    ("d/none.jsonl", r"run.yml:9\): expected the file d/none.jsonl, found no such file: correct the path"),
    ("d/none.parquet", "expected the file d/none.parquet, found no such file"),
    ("none.csv.gz", "expected the file none.csv.gz, found no such file"),
    ("a/b/c", "expected the file a/b/c, found no such file"),
    ("~/none", "expected the file ~/none, found no such file"),
    ("d/*.parquet", r"expected the file d/\*.parquet, found no such file"),
    ("owner/name", "owner/name: not in the cache, and HF_HUB_OFFLINE is set"),
    ("https://example.org/a.jsonl", "found a URL: give a builder such as json, and the URL in kwargs as data_files"),
    ("json", "json: expected the builder's files in kwargs, as data_files, found none: name them, or give their path as name_or_path"),
    ("parquet", "parquet: expected the builder's files in kwargs"),
    ({"name_or_path": "pandas", "kwargs": {"data_files": "a.csv"}}, "pandas: pickled data may hold code"),
    ({"name_or_path": "csv", "kwargs": {"data_files": "none-*.csv"}}, r"data_files: expected the file none-\*.csv, found no such file"),
    ({"name_or_path": "csv", "kwargs": {"data_files": {"train": "a.csv"}}, "split": "test"}, "csv: split test: expected one of train"),
    ({"name_or_path": "a.csv", "kwargs": {"streaming": True}}, "streaming: samples are counted and drawn before they are read: remove it"),
    ({"name_or_path": "a.csv", "split": "train[a:b]"}, r"expected a slice like train\[:50\] or train\[10%:20%\], found train\[a:b\]"),
    ("a.tsv", "a.tsv: expected .jsonl, .json, .parquet, .csv, .txt or .arrow"),
    ("empty", "empty: expected a folder of data files, found none in it"),
    *[(name, f"run.yml:9\\): {name}: expected at least one sample, found none$")
      for name in ("e.csv", "e.txt", "e.parquet", "e.jsonl", "e.csv.gz", "header.csv", "blank.csv", "none.parquet", "none.arrow")],
    ("shards", "shards: expected rows in each parquet file, found one without: remove it"),
    ("broken.parquet", "broken.parquet: .*not a parquet file"),
    ("state", "state: expected a folder of save_to_disk, found a broken state/state.json: save it again"),
    ("listing", "listing: expected a folder of save_to_disk, found a broken listing/dataset_dict.json"),
    ("array", "array: expected a folder of save_to_disk, found no object in array/state.json"),
])
def test_what_cannot_be_found_or_read_is_said_in_one_sentence(tmp_path, tokenizer_folder, monkeypatch, source, error):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.csv", PAIRS)
    shutil.copy("a.csv", "a.tsv")
    for name in ("e.csv", "e.txt", "e.parquet", "e.jsonl"):
        (tmp_path / name).touch()
    pack(tmp_path / "e.csv", "gz")
    (tmp_path / "header.csv").write_text("prompt,completion\n")
    (tmp_path / "blank.csv").write_text("\n\n")
    write(tmp_path / "none.parquet", [])
    write(tmp_path / "none.arrow", [])
    write(tmp_path / "shards/a.parquet", [])
    write(tmp_path / "shards/b.parquet", PAIRS)
    (tmp_path / "broken.parquet").write_text("not a parquet file at all")
    (tmp_path / "empty").mkdir()
    for folder, file, text in (("state", "state.json", "{"), ("listing", "dataset_dict.json", "{"), ("array", "state.json", "[]")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text(text)
    with pytest.raises(UserError, match=error) as raised:
        made(tmp_path, tokenizer_folder, source, "txt" if str(source).endswith(".txt") else "sft")
    assert "\n" not in str(raised.value)
    assert not [name for name in os.listdir(tmp_path) if name == "cache" and [n for n in os.listdir(name) if not n.endswith(".lock")]]


def test_an_object_around_the_rows_may_stand_on_one_line(tmp_path, tokenizer_folder):
    rows = [chat("a", "yes"), chat("b", "no")]
    want = tokens(made(tmp_path, tokenizer_folder, write_lines(tmp_path / "a.jsonl", rows)))
    for text in (json.dumps({"data": rows}), json.dumps({"data": rows}, indent=1), json.dumps({"version": "1", "data": rows}) + "\n"):
        (tmp_path / "a.json").write_text(text)
        assert tokens(made(tmp_path, tokenizer_folder, str(tmp_path / "a.json"))) == want
    for text in (json.dumps(rows[0]), json.dumps(rows[0], indent=1)):    # one chat
        (tmp_path / "a.json").write_text(text)
        assert tokens(made(tmp_path, tokenizer_folder, str(tmp_path / "a.json")))[0] == want[0][:1]
    (tmp_path / "a.json").write_text(json.dumps({"data": []}))
    with pytest.raises(UserError, match="expected at least one sample, found none"):
        made(tmp_path, tokenizer_folder, str(tmp_path / "a.json"))


# Plain texts.

def test_empty_texts_are_left_out_and_counted(tmp_path, tokenizer_folder, capsys):
    (tmp_path / "a.txt").write_text("the answer\n\n \nno\n")
    for cached in (False, True):
        answer = made(tmp_path, tokenizer_folder, str(tmp_path / "a.txt"), "causal")
        assert (answer["num_samples"], answer["num_empty"], answer["num_skipped"], answer["cached"]) == (2, 2, 0, cached)
        assert "left out 2 empty texts of 4\n" in capsys.readouterr().err
    assert [make_tokenizer().decode(ids) for ids in tokens(answer)[0]] == ["the answer<|end|>", "no<|end|>"]
    (tmp_path / "b.txt").write_text("\n\n")
    with pytest.raises(UserError, match=r"b.txt: expected text, found only empty texts \(2\)"):
        made(tmp_path, tokenizer_folder, str(tmp_path / "b.txt"), "causal")
    with pytest.raises(UserError, match="sample 1: expected text in text, found none: correct or remove the sample"):
        made(tmp_path, tokenizer_folder, write_lines(tmp_path / "a.jsonl", [{"text": "a"}, {"text": None}]), "causal")


def test_half_a_surrogate_pair_is_no_text(tmp_path, tokenizer_folder):
    path = write_lines(tmp_path / "a.jsonl", ['{"text": "good"}\n', '{"text": "\\ud83d"}\n'])
    with pytest.raises(UserError, match=r"a.jsonl, sample 1: expected text, found half of a surrogate pair, '\\ud83d': correct or remove the sample"):
        made(tmp_path, tokenizer_folder, path, "causal")
    answer = made(tmp_path, tokenizer_folder, path, "causal", on_error="skip")
    assert (answer["num_samples"], answer["num_skipped"]) == (1, 1)


def test_a_text_without_tokens_is_an_empty_one(tmp_path):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Replace("-", ""), pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(tmp_path / "words")
    answer = made(tmp_path, str(tmp_path / "words"), write_lines(tmp_path / "a.jsonl", [{"text": "a b"}, {"text": "--"}]), "causal")
    assert (answer["num_samples"], answer["num_empty"]) == (1, 1)


# What is said, also of data that were prepared before.

def test_what_was_skipped_is_said_again_of_data_in_the_cache(tmp_path, tokenizer_folder, capsys):
    path = write_lines(tmp_path / "a.jsonl", ["oops\n", chat("a"), chat("b")])
    made(tmp_path, tokenizer_folder, path, on_error="skip")
    assert "skipped 1 of 3 samples; the first: " in capsys.readouterr().err
    assert made(tmp_path, tokenizer_folder, path, on_error="skip")["cached"]
    assert capsys.readouterr().err == "skipped 1 of 3 samples\n"
    with pytest.raises(UserError, match="a.jsonl:1: expected one JSON object"):
        made(tmp_path, tokenizer_folder, path)


def test_a_sample_count_above_the_size_is_said_once(tmp_path, tokenizer_folder, capsys):
    source = {"name_or_path": write_lines(tmp_path / "a.jsonl", [chat("a"), chat("b")]), "split": "train[:1]", "sample_count": 2000}
    for cached in (False, True):
        answer = made(tmp_path, tokenizer_folder, source)
        assert (answer["cached"], answer["num_samples"]) == (cached, 1)
        assert capsys.readouterr().err.count("data.sources (run.yml:9): " + source["name_or_path"] + ": sample_count 2,000 is above its 1 samples: all are taken\n") == 1


def test_well_known_sets_bring_their_splits_and_arguments(tmp_path, tokenizer_folder, monkeypatch):
    asked = []
    monkeypatch.setattr(hf_datasets, "load_hub", lambda *given: asked.append(given) or (_ for _ in ()).throw(UserError("stop")))
    for name in ("nvidia/AceMath-Instruct-Training-Data", "huggingface_instruct:HuggingFaceH4/ultrachat_200k:train[:5%]", "a/b:c"):
        with pytest.raises(UserError, match="stop"):
            made(tmp_path, tokenizer_folder, name)
    assert [(name, split, kwargs) for name, split, _, kwargs in asked] == [
        ("nvidia/AceMath-Instruct-Training-Data", "general_sft_stage2", {"verification_mode": "no_checks"}),
        ("HuggingFaceH4/ultrachat_200k", "train_sft[:5%]", {}), ("a/b", "c", {}),
    ]


# The folder of the cache.

def test_a_disk_that_fills_while_parts_are_joined_keeps_the_parts_alone(tmp_path, tokenizer_folder, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", [chat("a" * (i % 50 + 1), "yes") for i in range(300)])

    def full(paths, whole, *_):
        Path(whole).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(token_file, "join", full)
        with pytest.raises(UserError, match="data.cache_dir: no room left on the disk"):
            made(tmp_path, tokenizer_folder, path)
    (folder,) = (tmp_path / "cache").glob("*.parts")
    assert parts_in(tmp_path / "cache") and not (folder / "whole").exists()
    monkeypatch.setattr(parts, "_made", lambda *_: pytest.fail("made again"))
    assert made(tmp_path, tokenizer_folder, path)["num_samples"] == 300


def as_nobody(work):
    """What `work` returns, or the sentence that it raises, where a user without rights calls it. Its imports must have been made."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            told = work()
        except UserError as error:
            told = str(error)
        except BaseException as error:
            told = repr(error)
        os.write(writing, json.dumps(told).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        told = json.loads(file.read())
    os.waitpid(pid, 0)
    return told


@pytest.fixture
def open_folder():
    """A folder that everybody may look into."""
    if os.getuid() != 0:
        pytest.skip("another user is played by root alone")
    folder = Path(tempfile.mkdtemp(prefix="ulysses-open-", dir="/tmp"))
    folder.chmod(0o755)
    make_tokenizer().save_pretrained(folder / "tokenizer")
    yield folder
    shutil.rmtree(folder)


def test_a_folder_that_cannot_be_written_is_read(open_folder):
    path, tokenizer = write_lines(open_folder / "a.jsonl", [chat("a"), chat("b")]), str(open_folder / "tokenizer")
    answer = made(open_folder, tokenizer, path)
    for lock in (open_folder / "cache").glob("*.lock"):
        lock.unlink()
    for options in ({}, {"fail_on_missing_cache": True}):
        assert as_nobody(lambda: made(open_folder, tokenizer, path, **options)) == {**answer, "cached": True}
    assert "data.cache_dir: expected a folder that can be written, found " in as_nobody(lambda: made(open_folder, tokenizer, path, mask_inputs=False))
    missing = as_nobody(lambda: made(open_folder, tokenizer, path, mask_inputs=False, fail_on_missing_cache=True))
    assert missing.startswith("data.fail_on_missing_cache: expected the prepared data ")
    nowhere = as_nobody(lambda: made(open_folder, tokenizer, path, cache_dir=str(open_folder / "none"), fail_on_missing_cache=True))
    assert nowhere.startswith("data.fail_on_missing_cache: expected the prepared data ")


def test_files_that_may_not_be_read_are_said(open_folder):
    (open_folder / "cache").mkdir(mode=0o777)
    save(open_folder / "saved", PAIRS)
    for suffix in BUILDERS:
        path = write(open_folder / f"a.{suffix}", PAIRS)
        path.chmod(0)
        said = as_nobody(lambda: made(open_folder, str(open_folder / "tokenizer"), str(path), suffix))
        assert said == f"data.sources (run.yml:9): {path}: expected a readable file, found no permission to read it"
    (open_folder / "saved" / "state.json").chmod(0)
    said = as_nobody(lambda: made(open_folder, str(open_folder / "tokenizer"), str(open_folder / "saved")))
    assert said == f"data.sources (run.yml:9): {open_folder}/saved: {open_folder}/saved/state.json: expected a readable file, found no permission to read it"
    (open_folder / "saved").chmod(0)
    said = as_nobody(lambda: made(open_folder, str(open_folder / "tokenizer"), str(open_folder / "saved")))
    assert said == f"data.sources (run.yml:9): {open_folder}/saved: expected a readable folder, found no permission to read it"


@pytest.mark.parametrize("mode", [0o1777, 0o777])
def test_another_users_lock_and_parts_are_in_nobodys_way(open_folder, mode):
    path, tokenizer = write_lines(open_folder / "a.jsonl", [chat("a"), chat("b")]), str(open_folder / "tokenizer")
    want = made(open_folder, tokenizer, path)    # which also imports all
    cache = open_folder / "cache"
    cache.chmod(mode)
    token_path = Path(want["tokens"])
    for lock_mode in (0o644, 0o600):
        token_path.unlink()
        (lock,) = cache.glob("*.lock")
        lock.chmod(lock_mode)
        theirs = token_path.with_suffix(".parts")
        theirs.mkdir(exist_ok=True)
        assert as_nobody(lambda: made(open_folder, tokenizer, path)) == want
        assert token_path.stat().st_uid == NOBODY and os.listdir(theirs) == []


def test_what_another_user_left_and_cannot_be_replaced_is_said(open_folder):
    path, tokenizer = write_lines(open_folder / "a.jsonl", [chat("a"), chat("b")]), str(open_folder / "tokenizer")
    token_path = Path(made(open_folder, tokenizer, path)["tokens"])
    (open_folder / "cache").chmod(0o1777)
    token_path.write_bytes(b"broken")
    said = as_nobody(lambda: made(open_folder, tokenizer, path))
    assert said.startswith("data.cache_dir: expected files that this user may write, found ") and said.endswith("remove it or choose another cache_dir")


def test_the_hash_of_a_large_file_is_remembered_until_it_changes(tmp_path, monkeypatch):
    from ulysses_plus import local_files

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(local_files, "LARGE", 1)
    hashed = []
    monkeypatch.setattr(local_files, "_sha256", lambda path: hashed.append(path) or str(len(hashed)))
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    state = list(local_files._state(path))

    def digest(changed_at):
        return local_files._remembered_sha256(str(path), (*state[:4], changed_at))

    assert [digest(time.time_ns()), digest(time.time_ns())] == ["1", "2"], "just written: not remembered"
    assert [digest(5), digest(5), digest(6), digest(6)] == ["3", "3", "4", "4"]
