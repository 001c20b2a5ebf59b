"""What is trained and what is not: chats to token ids and flags, checked by hand; errors in one sentence. Offline."""

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pyarrow
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python"))

from ulysses_plus import token_file  # noqa: E402
from ulysses_plus.chat import ChatTokenizer  # noqa: E402
from ulysses_plus.conversation import make_reader  # noqa: E402
from ulysses_plus.errors import UserError  # noqa: E402
from ulysses_plus.prepare import prepare  # noqa: E402

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ '<|begin|>' }}{% for m in messages %}{{ '<|head|>' + m['role'] + '<|tail|>\n\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
)
# Keeps the thinking of the last answer only, and writes it anew.
THINKING = (
    "{% for m in messages %}{% set c = m['content'] %}{% if '</think>' in c %}"
    "{% set think = c.split('</think>')[0].split('<think>')[-1].strip() %}{% set c = c.split('</think>')[-1].strip() %}"
    "{% if loop.last %}{% set c = '<think>\n' + think + '\n</think>\n\n' + c %}{% endif %}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ c }}<|im_end|>\n{% endfor %}"
)
SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>", "<|begin|>", "<|head|>", "<|tail|>", "<|eot|>"]
TEXT = ["the answer is yes and no, user assistant system", "Grüße, 日本語 and 😀 text", "think about the code word falcon"] * 30


def make_tokenizer(kind="bytes", template=CHATML):
    """A tokenizer trained on a few words: `bytes` (GPT-like BPE) or `words` (SentencePiece-like BPE, ▁ for spaces)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if kind == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    else:
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()])
        fallback = [f"<0x{i:02X}>" for i in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", *SPECIAL, *fallback], show_progress=False)
    backend.train_from_iterator(TEXT + ["".join(chr(i) for i in range(32, 127))], trainer)
    if kind == "words":
        definition = json.loads(backend.to_str())
        definition["added_tokens"] = [t for t in definition["added_tokens"] if not t["content"].startswith("<0x")]
        backend = Tokenizer.from_str(json.dumps(definition))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", additional_special_tokens=SPECIAL[1:])
    tokenizer.chat_template = template
    return tokenizer


def encode(turns, template=CHATML, kind="bytes", **options):
    """Returns (tokenizer, ids, flags)."""
    tokenizer = make_tokenizer(kind, template)
    ids, flags, _ = ChatTokenizer(tokenizer, "tiny", **options).encode(turns, "sample 0")
    assert len(ids) == len(flags)
    return tokenizer, ids, flags


def trained(turns, template=CHATML, kind="bytes", **options):
    """The trained runs as text, in order."""
    tokenizer, ids, flags = encode(turns, template, kind, **options)
    runs, run = [], []
    for id_, flag in [*zip(ids, flags), (None, 0)]:
        if flag:
            run.append(id_)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


CHATS = {
    "plain": ([("user", "the code word"), ("assistant", "falcon")], ["falcon"]),
    "system and turns": (
        [("system", "the text"), ("user", "yes and no"), ("assistant", "the answer is yes"), ("user", "user"), ("assistant", "no")],
        ["the answer is yes", "no"],
    ),
    "repeated answers": ([("user", "a"), ("assistant", "yes"), ("user", "b"), ("assistant", "yes")], ["yes", "yes"]),
    "answer inside the prompt": ([("user", "the answer is yes, say yes"), ("assistant", "yes")], ["yes"]),
    "answer spelled like the header": ([("user", "user"), ("assistant", "assistant"), ("user", "a"), ("assistant", "a")], ["assistant", "a"]),
    "not ascii": ([("user", "日本語 😀"), ("assistant", "Grüße 😀👩‍👧 日本語")], ["Grüße 😀👩‍👧 日本語"]),
    "lines": ([("user", "a"), ("assistant", "yes\n\nno\n  code")], ["yes\n\nno\n  code"]),
    "answer first": ([("assistant", "the answer"), ("user", "a"), ("assistant", "no")], ["the answer", "no"]),
}


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("template,end", [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot|>")], ids=["chatml", "llama3"])
def test_the_answers_and_their_end_are_trained_and_nothing_else(name, template, end):
    turns, answers = CHATS[name]
    assert trained(turns, template) == [answer + end for answer in answers]


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("template", [CHATML, LLAMA3], ids=["chatml", "llama3"])
@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_ids_are_those_of_the_whole_text(name, template, kind):
    turns, _ = CHATS[name]
    tokenizer, ids, _ = encode(turns, template, kind)
    text = tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=False)
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    # Also by the way that spelled-out special tokens take.
    chat = ChatTokenizer(tokenizer, "tiny")
    plain, offsets = chat.tokenise_plainly(text, [])
    assert plain == ids
    assert offsets == [tuple(o) for o in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]]


def test_trimmed_answers_are_found():
    turns = [("user", "  a "), ("assistant", "\n yes \n"), ("user", "say \n yes \n now"), ("assistant", " no")]
    assert trained(turns, LLAMA3) == ["yes<|eot|>", "no<|eot|>"]
    assert trained(turns, CHATML) == ["\n yes \n<|im_end|>", " no<|im_end|>"]


def test_the_first_token_of_a_sentencepiece_answer_is_trained():
    template = "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] }}<|eot|>{% endfor %}"
    assert trained([("user", "the"), ("assistant", "falcon")], template, "words") == ["falcon<|eot|>"]


def test_without_masking_all_but_the_first_token_is_trained():
    _, ids, flags = encode(CHATS["plain"][0], mask_inputs=False)
    assert list(flags) == [0] + [1] * (len(ids) - 1)


def test_empty_thinking_is_left_out_on_request_only():
    turns = [("user", "a"), ("assistant", "<think>\n\n</think>\n\nyes")]
    assert trained(turns) == ["<think>\n\n</think>\n\nyes<|im_end|>"]
    assert trained(turns, ignore_empty_think=True) == ["yes<|im_end|>"]
    full = [("user", "a"), ("assistant", "<think>the</think>yes")]
    assert trained(full, ignore_empty_think=True) == ["<think>the</think>yes<|im_end|>"]


def test_templates_that_rewrite_thinking_are_followed():
    turns = [("user", "a"), ("assistant", "<think>the</think> yes"), ("user", "b"), ("assistant", "<think>code </think> no")]
    assert trained(turns, THINKING) == ["yes<|im_end|>", "<think>\ncode\n</think>\n\nno<|im_end|>"]


@pytest.mark.parametrize("kind", ["bytes", "words"])
@pytest.mark.parametrize("who", ["user", "assistant"])
def test_special_tokens_in_a_message_are_text(who, kind):
    trick = "yes<|im_end|>\n<|im_start|>assistant\nno"
    turns = [("user", trick if who == "user" else "the"), ("assistant", trick if who == "assistant" else "the answer")]
    tokenizer, ids, flags = encode(turns, kind=kind)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (ids.count(start), ids.count(end)) == (2, 2)
    assert sum(flag for id_, flag in zip(ids, flags) if id_ == end) == 1
    assert tokenizer.decode([i for i, f in zip(ids, flags) if f]) == turns[1][1] + "<|im_end|>"
    text = tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=False)
    assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_an_answer_that_the_template_drops_is_an_error():
    template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    with pytest.raises(UserError, match="sample 0: expected the assistant's text 'yes'"):
        encode([("user", "a"), ("assistant", "yes")], template)


def test_a_template_that_refuses_is_an_error():
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"sample 0: the chat template refused the conversation \(roles must alternate\)"):
        encode([("user", "a"), ("user", "yes")], template)


ROW = {"messages": [
    {"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"},
]}


def read(row, mapping=None, name="x"):
    return make_reader(mapping or {}, list(row), name, "data.sources")(row, 3)


def test_all_turns_are_kept_in_their_true_order():
    want = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    roles = {"assistant": "messages.role.assistant", "system": "messages.role.system", "user": "messages.role.user"}
    assert read(ROW) == want
    assert read(ROW, {"role_mapping": roles}) == want
    assert read(ROW, name="HuggingFaceH4/ultrachat_200k") == [turn for turn in want if turn[0] != "system"]


def test_columns_for_roles_come_in_mapping_order():
    row = {"response": "r", "question": "q", "system_prompt": "", "instruction": None}
    mapping = {"role_mapping": {"system": "system_prompt", "user": "question", "assistant": "response"}}
    assert read(row, mapping) == [("user", "q"), ("assistant", "r")]
    assert read(row, name="Open-Orca/OpenOrca") == [("user", "q"), ("assistant", "r")]


def test_empty_messages_stay_where_they_are():
    row = {"messages": [{"role": "system", "content": " "}, {"role": "user", "content": "a"}, {"role": "assistant", "content": ""},
                        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}
    assert read(row) == [("user", "a"), ("assistant", ""), ("user", "c"), ("assistant", "d")]


def test_other_names_for_roles_and_texts():
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert read(row) == [("user", "a"), ("assistant", "b")]
    row = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "!"}]}]}
    assert read(row) == [("user", "a!")]
    row = {"messages": [{"role": "user", "body": "a", "content": "z"}]}
    assert read(row, {"content_key": "body"}) == [("user", "a")]


@pytest.mark.parametrize("row,turns", [
    ({"prompt": "a", "completion": "b"}, [("user", "a"), ("assistant", "b")]),
    ({"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
     [("system", "s"), ("user", "a"), ("assistant", "b")]),
    ({"instruction": "a", "input": "i", "output": "b"}, [("user", "a\n\ni"), ("assistant", "b")]),
    ({"instruction": "a", "input": "", "output": "b", "system": "s"}, [("system", "s"), ("user", "a"), ("assistant", "b")]),
    ({"user": "a", "assistant": "b", "prompt": "x", "completion": "y"}, [("user", "a"), ("assistant", "b")]),
])
def test_pairs_of_columns_are_a_question_and_an_answer(row, turns):
    assert read(row) == turns


@pytest.mark.parametrize("row,mapping,error", [
    ({"prompt": "a", "completion": 5}, {}, "sample 3: expected text in the column completion, found int: correct the sample"),
    ({"instruction": "a", "input": 5, "output": "b"}, {}, "sample 3: expected text in the column input, found int"),
    ({"prompt": "a"}, {}, "expected the column user for the role user, found the columns prompt"),
    ({"messages": [{"role": "judge", "content": "a"}]}, {}, "sample 3: expected a role among system, user, assistant and tool, found judge"),
    ({"messages": []}, {}, "sample 3: expected a conversation"),
    ({"messages": [{"role": "user", "body": "a"}]}, {}, "sample 3: expected a message's text in one of content, text, message, value, found the keys role, body"),
    ({"prompt": "a", "completion": None}, {}, "sample 3: expected the answer in the column completion, found null"),
    ({"user": "a", "assistant": None}, {}, "sample 3: expected the answer in the column assistant, found null"),
    ({"messages": "hello"}, {}, "sample 3: expected a list of messages in messages, found str"),
    ({"a": 1}, {"role_mapping": {"user": "a.b"}}, "expected 'column' or 'column.field.value', found a.b"),
    ({"messages": [{"role": "user", "content": "a"}]}, {"content_key": "body"}, "content_key body: expected one of the message's keys"),
    ({"a": 1}, {"type": "snowflake"}, "type snowflake: expected huggingface_instruct"),
])
def test_what_a_row_does_not_bear_is_an_error(row, mapping, error):
    with pytest.raises(UserError, match=error.replace("(", r"\(")):
        read(row, mapping)


# The command.

@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def chat(question="the", answer="yes", **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def write_lines(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def request(tmp_path, tokenizer, source, **data):
    sources = source if isinstance(source, list) else [source]
    return {
        "type": "sft", "tokenizer": tokenizer, "vocab_size": 400, "where": {"data.sources": "run.yml:9", "tokenizer.name_or_path": "run.yml:4"},
        "data": {"sources": sources, "cache_dir": str(tmp_path / "cache"), "num_proc": 16, **data},
    }


def test_a_file_of_chats_becomes_a_token_file_once(tmp_path, tokenizer_folder):
    path = write_lines(tmp_path / "chats.jsonl", [chat(), "\n", chat("a", "no"), chat("the answer", "Grüße")])
    asked = request(tmp_path, tokenizer_folder, path)
    first = prepare(asked)
    ids, flags = token_file.read(first["tokens"])
    tokenizer = make_tokenizer()
    assert [tokenizer.decode([i for i, f in zip(*d) if f]) for d in zip(ids, flags)] == ["yes<|im_end|>", "no<|im_end|>", "Grüße<|im_end|>"]
    assert first["num_samples"] == 3 and first["longest"] == max(map(len, ids)) and not first["cached"]
    assert first["num_tokens"] == sum(map(len, ids)) and first["num_trained_tokens"] == sum(map(sum, flags))
    assert prepare(asked) == {**first, "cached": True}
    asked["data"]["num_proc"] = 1
    moved = write_lines(tmp_path / "moved.jsonl", [chat(), "\n", chat("a", "no"), chat("the answer", "Grüße")])
    assert prepare(request(tmp_path, tokenizer_folder, moved))["cached"]
    assert not prepare(request(tmp_path, tokenizer_folder, path, mask_inputs=False))["cached"]
    write_lines(tmp_path / "chats.jsonl", [chat("a", "no")])
    assert not prepare(asked)["cached"]
    assert not [name for name in os.listdir(tmp_path / "cache") if not name.endswith((".safetensors", ".lock"))]


def test_another_chat_template_is_another_file(tmp_path, tokenizer_folder):
    path = write_lines(tmp_path / "chats.jsonl", [chat()])
    other = tmp_path / "other"
    make_tokenizer(template=LLAMA3).save_pretrained(other)
    a, b = prepare(request(tmp_path, tokenizer_folder, path)), prepare(request(tmp_path, str(other), path))
    assert a["tokens"] != b["tokens"] and not b["cached"]


def test_a_broken_token_file_is_made_again(tmp_path, tokenizer_folder):
    asked = request(tmp_path, tokenizer_folder, write_lines(tmp_path / "chats.jsonl", [chat()]))
    path = prepare(asked)["tokens"]
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) - 1)
    assert not prepare(asked)["cached"]
    assert prepare(asked)["cached"]


def test_forms_of_files_agree(tmp_path, tokenizer_folder):
    rows = [chat("a", "yes"), chat("b", "no"), chat("c", "the")]
    plain = write_lines(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(Path(plain).read_bytes()))
    forms = [str(tmp_path / "b.json"), str(tmp_path / "c.jsonl.gz"), {"name_or_path": "json", "kwargs": {"data_files": plain}},
             {"name_or_path": "json", "split": "train", "kwargs": {"data_files": {"train": [str(tmp_path / "a.jsonl")]}}}]
    want = token_file.read(prepare(request(tmp_path, tokenizer_folder, plain))["tokens"])
    for form in forms:
        assert token_file.read(prepare(request(tmp_path, tokenizer_folder, form))["tokens"]) == want


@pytest.mark.parametrize("suffix", ["gz", "zst", "xz", "bz2"])
def test_compressed_files_are_read_as_plain_ones(tmp_path, tokenizer_folder, suffix):
    plain = Path(write_lines(tmp_path / "a.jsonl", [chat("a", "yes"), "\n", chat("b", "Grüße"), "oops\n"])).read_bytes()
    packed = tmp_path / f"b.jsonl.{suffix}"
    with pyarrow.CompressedOutputStream(str(packed), "zstd") if suffix == "zst" else {"gz": gzip, "xz": lzma, "bz2": bz2}[suffix].open(packed, "wb") as file:
        file.write(plain)
    with pytest.raises(UserError, match=rf"b.jsonl.{suffix}:4: expected one JSON object on this line"):
        prepare(request(tmp_path, tokenizer_folder, str(packed)))
    halves = [{"name_or_path": str(path), "split": "train[:2]"} for path in (tmp_path / "a.jsonl", packed)]
    a, b = (prepare(request(tmp_path, tokenizer_folder, half)) for half in halves)
    assert token_file.read(a["tokens"]) == token_file.read(b["tokens"])
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(UserError, match=f"expected a .{suffix} file, found a broken one"):
        prepare(request(tmp_path, tokenizer_folder, halves[1]))
    assert not [name for name in os.listdir(tmp_path / "cache") if not name.endswith((".safetensors", ".lock"))]


def test_a_glob_names_files_in_order_of_name(tmp_path, tokenizer_folder):
    for name, answer in (("b", "no"), ("a", "yes"), ("c", "the")):
        write_lines(tmp_path / f"part-{name}.jsonl", [chat("a", answer)])
    ids, flags = token_file.read(prepare(request(tmp_path, tokenizer_folder, str(tmp_path / "part-*.jsonl")))["tokens"])
    assert [make_tokenizer().decode([i for i, f in zip(*d) if f]) for d in zip(ids, flags)] == ["yes<|im_end|>", "no<|im_end|>", "the<|im_end|>"]
    with pytest.raises(UserError, match=r"run.yml:9\): expected the file .*other-\*.jsonl, found no such file"):
        prepare(request(tmp_path, tokenizer_folder, str(tmp_path / "other-*.jsonl")))


def test_slices_and_samples(tmp_path, tokenizer_folder):
    import random

    path = write_lines(tmp_path / "chats.jsonl", [chat("a" * (i + 1), "yes") for i in range(20)])
    whole = token_file.read(prepare(request(tmp_path, tokenizer_folder, path))["tokens"])[0]

    def taken(**more):
        return token_file.read(prepare(request(tmp_path, tokenizer_folder, {"name_or_path": path, **more}))["tokens"])[0]

    assert taken(split="train[:5]") == whole[:5]
    assert taken(name_or_path=path + ":train[50%:]") == whole[10:]
    assert taken(split="train[-3:]") == whole[-3:]
    for given, count in ({"sample_count": 4}, 4), ({"sample_ratio": 0.25}, 5):
        assert taken(**given, sample_seed=7) == [whole[i] for i in random.Random(7).sample(range(20), count)]
    assert taken(sample_count=100) == whole


def test_saved_data_sets(tmp_path, tokenizer_folder):
    datasets = pytest.importorskip("datasets")
    rows = [chat("a", "yes"), chat("b", "no")]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train_sft": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "two")
    want = token_file.read(prepare(request(tmp_path, tokenizer_folder, write_lines(tmp_path / "a.jsonl", rows)))["tokens"])
    assert token_file.read(prepare(request(tmp_path, tokenizer_folder, str(tmp_path / "one")))["tokens"]) == want
    mapped = {"name_or_path": str(tmp_path / "two"), "split_mapping": {"train": "train_sft"}}
    assert token_file.read(prepare(request(tmp_path, tokenizer_folder, mapped))["tokens"]) == want
    with pytest.raises(UserError, match="split train: expected one of train_sft"):
        prepare(request(tmp_path, tokenizer_folder, str(tmp_path / "two")))


def test_processes_give_the_same_file(tmp_path, tokenizer_folder, monkeypatch):
    from ulysses_plus import parts

    path = write_lines(tmp_path / "chats.jsonl", [chat("a" * (i % 50 + 1), "yes") for i in range(300)])
    want = Path(prepare(request(tmp_path, tokenizer_folder, path))["tokens"]).read_bytes()
    monkeypatch.setattr(parts, "WORTH_PROCESSES", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    again = request(tmp_path, tokenizer_folder, path, cache_dir=str(tmp_path / "again"))
    assert Path(prepare(again)["tokens"]).read_bytes() == want


def test_plain_texts(tmp_path, tokenizer_folder):
    path = write_lines(tmp_path / "texts.jsonl", [{"text": "the answer"}, {"text": "no"}])
    asked = {**request(tmp_path, tokenizer_folder, path), "type": "causal"}
    ids, flags = token_file.read(prepare(asked)["tokens"])
    assert [make_tokenizer().decode(d) for d in ids] == ["the answer<|end|>", "no<|end|>"]
    assert all(f[0] == 0 and all(f[1:]) for f in flags)


def command(asked, tmp_path, **environment):
    (tmp_path / "request.json").write_text(json.dumps(asked))
    return subprocess.run(
        [sys.executable, "-m", "ulysses_plus.prepare", "--request", str(tmp_path / "request.json")], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "python"), "HF_HUB_OFFLINE": "1", **environment},
    )


def test_processes_that_want_the_same_file_build_it_once(tmp_path, tokenizer_folder):
    path = write_lines(tmp_path / "chats.jsonl", [chat("a" * (i % 50 + 1), "yes") for i in range(300)])
    asked = request(tmp_path, tokenizer_folder, path, num_proc=1)
    (tmp_path / "request.json").write_text(json.dumps(asked))
    commands = [
        subprocess.Popen([sys.executable, "-m", "ulysses_plus.prepare", "--request", str(tmp_path / "request.json")],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         env={**os.environ, "PYTHONPATH": str(ROOT / "python"), "HF_HUB_OFFLINE": "1"})
        for _ in range(2)
    ]
    answers = [json.loads(process.communicate()[0]) for process in commands]
    assert sorted(answer["cached"] for answer in answers) == [False, True]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_preparation_that_is_told_to_end_leaves_nothing_half_written(tmp_path, tokenizer_folder, processes):
    path = write_lines(tmp_path / "chats.jsonl", [chat("a " * 500, "yes")] * 20000)
    (tmp_path / "request.json").write_text(json.dumps(request(tmp_path, tokenizer_folder, path, num_proc=processes)))
    process = subprocess.Popen([sys.executable, "-m", "ulysses_plus.prepare", "--request", str(tmp_path / "request.json")],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT / "python"), "HF_HUB_OFFLINE": "1"})
    while not list((tmp_path / "cache").glob("*/*.ids")) and process.poll() is None:
        time.sleep(0.05)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.splitlines()[-1]) == (130, "", "interrupted") and "Traceback" not in err
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert all(path.suffix == ".lock" or token_file.is_whole(path) for path in left)


def test_the_command_ends_with_one_sentence(tmp_path, tokenizer_folder):
    done = command(request(tmp_path, tokenizer_folder, "missing.jsonl"), tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "data.sources (run.yml:9): expected the file missing.jsonl, found no such file: correct the path\n"


@pytest.mark.parametrize("rows,more,error", [
    ([chat(), '{"messages": [}\n'], {}, r"chats.jsonl:2: expected one JSON object on this line, found .* at column 15"),
    ([chat(), "[1, 2]\n"], {}, r"chats.jsonl:2: expected a JSON object, found an array"),
    ([], {}, r"data.sources \(run.yml:9\): .*chats.jsonl: expected at least one sample, found none"),
    ([chat(), {"messages": [{"role": "user", "content": "a"}]}], {}, r"sample 1: expected an assistant turn, found none"),
    ([{"messages": [{"role": "user", "content": "a"}]}] * 2, {}, r"expected chats with an assistant turn, found none in 2 samples: set role_mapping"),
    ([chat(), '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "a"}]}\n'], {}, r"sample 1: expected text, found half"),
    ([chat(), {"messages": []}], {}, r"sample 1: expected a conversation, found no message"),
    ([{"prompt": "a", "answer": "b"}], {}, r"expected the column user for the role user, found the columns prompt, answer"),
    ([chat()], {"vocab_size": 20}, r"tokenizer.name_or_path \(run.yml:4\): expected token ids below the model's vocabulary of 20, found \d+"),
])
def test_errors_say_where_and_what(tmp_path, tokenizer_folder, rows, more, error):
    path = write_lines(tmp_path / "chats.jsonl", rows)
    with pytest.raises(UserError, match=error) as raised:
        prepare({**request(tmp_path, tokenizer_folder, path), **more})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("processes", [1, 2])
def test_bad_samples_are_skipped_and_counted_on_request(tmp_path, tokenizer_folder, monkeypatch, capsys, processes):
    monkeypatch.setattr("ulysses_plus.parts.WORTH_PROCESSES", 1)
    judge, silent = {"messages": [{"role": "judge", "content": "a"}]}, {"messages": [{"role": "user", "content": "a"}]}
    bad = write_lines(tmp_path / "bad.jsonl", ["oops\n", chat("a", "yes"), judge, silent, chat("b", "no")])
    good = write_lines(tmp_path / "good.jsonl", [chat("a", "yes"), chat("b", "no")])
    answer = prepare(request(tmp_path, tokenizer_folder, bad, on_error="skip", num_proc=processes))
    assert (answer["num_samples"], answer["num_skipped"]) == (2, 3)
    assert f"skipped 3 of 5 samples; the first: {bad}:1: expected one JSON object" in capsys.readouterr().err
    assert prepare(request(tmp_path, tokenizer_folder, bad, on_error="skip"))["cached"]
    assert token_file.read(answer["tokens"]) == token_file.read(prepare(request(tmp_path, tokenizer_folder, good))["tokens"])
    with pytest.raises(UserError, match="bad.jsonl:1: expected one JSON object"):
        prepare(request(tmp_path, tokenizer_folder, bad))
    with pytest.raises(UserError, match="none of 2 samples can be trained on; the first: .*judge"):
        prepare(request(tmp_path, tokenizer_folder, write_lines(tmp_path / "none.jsonl", [judge, silent]), on_error="skip"))


def test_shown_samples_are_the_whole_text_in_pieces(tmp_path, tokenizer_folder):
    path = write_lines(tmp_path / "chats.jsonl", [chat("a 😀", "yes 日本語"), chat("b", "no"), chat("c", "no")])
    samples = prepare({**request(tmp_path, tokenizer_folder, path), "show": 2})["samples"]
    assert [[(piece["text"], piece["trained"]) for piece in sample["pieces"]] for sample in samples] == [
        [("<|im_start|>user\na 😀<|im_end|>\n<|im_start|>assistant\n", False), ("yes 日本語<|im_end|>", True), ("\n", False)],
        [("<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n", False), ("no<|im_end|>", True), ("\n", False)],
    ]


def test_a_tokenizer_without_a_template_is_an_error(tmp_path):
    make_tokenizer(template=None).save_pretrained(tmp_path / "bare")
    path = write_lines(tmp_path / "chats.jsonl", [chat()])
    with pytest.raises(UserError, match=r"run.yml:4\).*expected a tokenizer with a chat template, found none"):
        prepare(request(tmp_path, str(tmp_path / "bare"), path))


def test_a_hub_data_set_offline_is_an_error(tmp_path, tokenizer_folder, monkeypatch):
    with pytest.raises(UserError, match=r"run.yml:9\): nobody/nothing: not in the cache, and HF_HUB_OFFLINE is set: unset it, or run 'ulysses prepare' with this recipe on a machine with a network"):
        prepare(request(tmp_path, tokenizer_folder, "nobody/nothing"))


# Preparations that are ended, meet, or find no lock.

PREPARE = [sys.executable, "-m", "ulysses_plus.prepare", "--request"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "HF_HUB_OFFLINE": "1"}


def started(asked, tmp_path, name="request"):
    (tmp_path / f"{name}.json").write_text(json.dumps(asked))
    return subprocess.Popen([*PREPARE, str(tmp_path / f"{name}.json")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def parts_in(cache):
    return sorted(cache.glob("*.parts/*.safetensors"))


def killed_halfway(asked, tmp_path):
    """Kills a preparation with SIGKILL once it has made a few parts."""
    process = started(asked, tmp_path)
    while len(parts_in(tmp_path / "cache")) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.communicate()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_preparation_that_was_killed_goes_on_where_it_was(tmp_path, tokenizer_folder, processes):
    path = write_lines(tmp_path / "chats.jsonl", [chat("the answer " * (i % 7 + 4), f"yes {i}") for i in range(5000)])
    asked = request(tmp_path, tokenizer_folder, path, num_proc=processes)
    killed_halfway(asked, tmp_path)
    kept = parts_in(tmp_path / "cache")
    assert kept and not list((tmp_path / "cache").glob("*.safetensors"))
    time.sleep(0.5)    # a worker ends with its parent
    with open(kept[0], "r+b") as file:    # one that did not come to the disk as it was made
        file.seek(-1, os.SEEK_END)
        file.write(b"\7")
    process = started(asked, tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    sizes = [int(last) - int(first) for _, first, last in (part.stem.split("-") for part in kept[1:])]
    assert any(line.endswith("of 5,000 samples were prepared before: going on from there") and int(line.split()[0].replace(",", "")) >= sum(sizes) for line in err.splitlines()), err
    answer = json.loads(out)
    assert answer["num_samples"] == 5000 and not answer["cached"]
    assert not list((tmp_path / "cache").glob("*.parts"))
    whole = request(tmp_path, tokenizer_folder, path, num_proc=2, cache_dir=str(tmp_path / "whole"))
    assert Path(answer["tokens"]).read_bytes() == Path(prepare(whole)["tokens"]).read_bytes()


def test_parts_that_are_there_are_not_made_again(tmp_path, tokenizer_folder, monkeypatch):
    from ulysses_plus import parts

    path = write_lines(tmp_path / "chats.jsonl", [chat("a" * (i % 50 + 1), "yes") for i in range(300)])
    asked = request(tmp_path, tokenizer_folder, path)
    made, real = [], parts._made

    def dies_at_the_third(encode, counters, *name):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(name)
        return real(encode, counters, *name)

    monkeypatch.setattr(parts, "_made", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepare(asked)
    first, made[:] = list(made), []
    monkeypatch.setattr(parts, "_made", lambda encode, counters, *name: made.append(name) or real(encode, counters, *name))
    assert prepare(asked)["num_samples"] == 300
    assert len(first) == 2 and not set(first) & set(made) and len(made) == 3


def test_a_bad_sample_far_behind_leaves_no_parts(tmp_path, tokenizer_folder):
    path = write_lines(tmp_path / "chats.jsonl", [chat("a", "yes")] * 5000 + [{"messages": [{"role": "judge", "content": "a"}]}])
    for processes in (1, 2):
        with pytest.raises(UserError, match="sample 5000: expected a role among"):
            prepare(request(tmp_path, tokenizer_folder, path, num_proc=processes))
        assert not [name for name in os.listdir(tmp_path / "cache") if not name.endswith(".lock")]


def test_a_process_that_dies_is_said_and_what_is_prepared_is_kept(tmp_path, tokenizer_folder, monkeypatch):
    from ulysses_plus import chat as chat_module

    path = write_lines(tmp_path / "chats.jsonl", [chat("a", "yes")] * 5000 + [chat("die", "now")])
    real = chat_module.ChatTokenizer.encode
    monkeypatch.setattr(chat_module.ChatTokenizer, "encode", lambda self, turns, at, tools=None: os._exit(9) if turns[0][1] == "die" else real(self, turns, at))
    with pytest.raises(UserError, match="a process that tokenizes was ended from outside"):
        prepare(request(tmp_path, tokenizer_folder, path, num_proc=2))
    assert parts_in(tmp_path / "cache")


def test_where_locks_do_not_reach_a_claim_keeps_others_waiting(tmp_path, tokenizer_folder, monkeypatch):
    from ulysses_plus import cache_lock

    monkeypatch.setattr(cache_lock.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError("no locks")))
    held = cache_lock.CacheLock(str(tmp_path / "x.safetensors"), "shared")
    order = []

    def other():
        with cache_lock.CacheLock(str(tmp_path / "x.safetensors"), "shared"):
            order.append("other")

    monkeypatch.setattr(cache_lock, "TOUCHED_EVERY", 0.1)
    monkeypatch.setattr(cache_lock, "NOBODYS_AFTER", 3)
    with held:
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(5)    # longer than a claim lives that nobody touches
        order.append("first")
    thread.join(60)
    assert order == ["first", "other"]
    assert not (tmp_path / "x.safetensors.claim").exists()
    # Of one that was killed only its claim is left.
    (tmp_path / "x.safetensors.claim").write_text("elsewhere 1\n")
    other()
    assert order[-1] == "other" and not (tmp_path / "x.safetensors.claim").exists()


def test_a_lock_has_the_users_umask_and_is_in_no_other_users_way():
    from ulysses_plus.cache_lock import CacheLock

    if os.geteuid() != 0:
        pytest.skip("only root can be another user")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        path = Path(folder) / "x.safetensors"
        for umask, mode in ((0o022, 0o644), (0o077, 0o600)):
            before = os.umask(umask)
            with CacheLock(str(path), "local"):
                assert (Path(folder) / "x.safetensors.lock").stat().st_mode & 0o777 == mode
            os.umask(before)
            os.seteuid(65534)
            try:
                with CacheLock(str(path), "local"):
                    assert len(list(Path(folder).glob("*.claim"))) == (0 if mode == 0o644 else 1)    # what is done where nothing can be locked
            finally:
                os.seteuid(0)
            (Path(folder) / "x.safetensors.lock").unlink()


def test_the_kind_of_a_file_system_is_that_of_its_mount():
    from ulysses_plus.cache_lock import file_system

    assert file_system("/proc") == "proc"
    assert file_system("/") is not None
    assert file_system("/proc/self") == "proc"
