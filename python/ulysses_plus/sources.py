"""Opens the sources of a recipe: a JSON file, a folder of `save_to_disk`, or a data set of the hub.

A source is a mapping as in the recipe; `opened` gives its rows after split, slice and sampling.
"""

import array
import glob
import hashlib
import json
import os
import random
import re
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

from ulysses_plus.errors import UserError, one_line
from ulysses_plus.json_rows import SUFFIXES, JsonRows

# Well-known sets whose splits have their own names.
KNOWN_SPLITS = {
    "HuggingFaceH4/ultrachat_200k": {"train": "train_sft", "eval": "test_sft"},
    "HuggingFaceH4/ultrafeedback_binarized": {"train": "train_prefs", "eval": "test_prefs"},
    "nvidia/AceMath-Instruct-Training-Data": {"train": "general_sft_stage2"},
}
_SLICE = re.compile(r"^\[\s*(-?\d+%?)?\s*:\s*(-?\d+%?)?\s*\]$")


@dataclass
class Source:
    """One source, opened. `rows[i]` is a dict; `indices` are the rows taken, in order (None: all)."""

    name: str                       # as a person knows it: chats.jsonl, HuggingFaceH4/ultrachat_200k
    where: str                      # the place in the recipe: "data.sources (run.yml:9)"
    mapping: dict                   # the recipe's mapping
    identity: dict                  # what decides its content, for the cache key
    rows: object = None
    indices: object = None          # a range, or eight bytes a row that was drawn

    def __len__(self):
        return len(self.rows) if self.indices is None else len(self.indices)

    def __getitem__(self, i):
        return self.rows[i if self.indices is None else self.indices[i]]

    def row_number(self, i):
        """The place of sample i in the source as stored."""
        return i if self.indices is None else self.indices[i]


def place(where, key, index=None):
    """Returns "key (run.yml:9)" for the most exact place that the request knows, else "key"."""
    names = [] if index is None else [f"{key}[{index}].name_or_path", f"{key}.{index}.name_or_path", f"{key}[{index}]", f"{key}.{index}"]
    found = next((where[name] for name in [*names, key] if name in where), None)
    return f"{key} ({found})" if found else key


def described(mapping, index, request, key):
    """Returns the Source of one mapping, not opened yet: local files are hashed, data sets of the hub are looked up."""
    at = place(request["where"], key, index)
    mapping = {"name_or_path": mapping} if isinstance(mapping, str) else dict(mapping)
    name = mapping.get("name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{at}: expected name_or_path: a hub id, a folder or a .jsonl file, found none")
    if ":" in name and not os.path.exists(name):
        name, mapping["split"] = name.split(":", 1)
        mapping["name_or_path"] = name
    mapping["split"] = _split(name, mapping, key)
    options = {k: mapping.get(k) for k in ("split", "kwargs", "sample_ratio", "sample_count", "sample_seed") if mapping.get(k) is not None}
    source = Source(name, at, mapping, {"name": name, "options": options})
    files = _json_files(source)
    if files:
        source.identity["files"] = [_sha256(file) for file in files]
    elif _saved(name):
        source.identity["saved"] = _saved_identity(name)
    else:
        source.rows = _load_dataset(source)
        source.identity["fingerprint"] = getattr(source.rows, "_fingerprint", None)
    return source


def opened(source, scratch=None):
    """Fills in rows and indices. Raises UserError when nothing is left. Compressed files are unpacked into the folder `scratch`."""
    files = _json_files(source)
    if files:
        source.rows = _Concatenated([JsonRows(file, scratch) for file in files])
        source.indices = _sliced(len(source.rows), source)
    elif _saved(source.name):
        source.rows = _load_saved(source)
    if len(source) == 0:
        raise UserError(f"{source.where}: {source.name}: expected at least one sample, found none")
    _sample(source)
    return source


def columns(source, skip=False):
    """The column names of an opened source; for a JSON file those of the first row, with `skip` of the first that can be read."""
    names = getattr(source.rows, "column_names", None)
    if names:
        return list(names)
    for i in range(len(source) if skip else 1):
        try:
            return list(source[i].keys())
        except UserError as error:
            first = error if i == 0 else first
    raise first


class _Concatenated:
    def __init__(self, parts):
        self.x_parts = parts
        self.x_ends = list(accumulate(len(part) for part in parts))

    def __len__(self):
        return self.x_ends[-1]

    def __getitem__(self, i):
        part = bisect_right(self.x_ends, i)
        return self.x_parts[part][i - (self.x_ends[part - 1] if part else 0)]


def _split(name, mapping, key):
    split = str(mapping.get("split") or ("eval" if key.endswith("eval_sources") else "train"))
    base, bracket, rest = split.partition("[")
    names = mapping.get("split_mapping") or KNOWN_SPLITS.get(name, {})
    if base in names and base not in names.values():
        base = names[base]
    return base + bracket + rest


def _json_files(source):
    """The local JSON files that a source names, or [] if it names something else."""
    name, kwargs = source.name, source.mapping.get("kwargs") or {}
    if name.endswith(SUFFIXES) and glob.has_magic(name) and not os.path.exists(name):
        return _matching(name, source, "")
    if name.endswith(SUFFIXES) and (os.path.exists(name) or "/" not in name or name.startswith(("/", ".", "~"))):
        path = os.path.expanduser(name)
        if not os.path.isfile(path):
            raise UserError(f"{source.where}: expected the file {name}, found no such file: correct the path")
        if not os.access(path, os.R_OK):
            raise UserError(f"{source.where}: {name}: expected a readable file, found no permission to read it")
        return [path]
    data_files = kwargs.get("data_files")
    if name != "json" or data_files is None or set(kwargs) != {"data_files"}:
        return []
    if isinstance(data_files, dict):
        base = source.mapping["split"].partition("[")[0]
        if base not in data_files:
            raise UserError(f"{source.where}: split {base}: expected one of the data_files' names, found {', '.join(data_files)}")
        data_files = data_files[base]
    files = []
    patterns = [data_files] if isinstance(data_files, str) else data_files
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise UserError(f"{source.where}: data_files: expected a file's name, a list of them or a mapping from splits, found {data_files}")
    for pattern in patterns:
        if "://" in pattern:
            return []
        files += _matching(pattern, source, "data_files: ")
    return files


def _matching(pattern, source, what):
    """The files that a path or a glob names, sorted by name; none is an error."""
    path = os.path.expanduser(pattern)
    found = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) and not os.path.exists(path) else [path]
    if not found or not all(os.path.isfile(path) for path in found):
        raise UserError(f"{source.where}: {what}expected the file {pattern}, found no such file: correct the path")
    return found


def _sliced(count, source):
    """The indices that a split such as train[:50] or train[10%:] takes out of `count` rows; None for all."""
    split = source.mapping["split"]
    base, bracket, rest = split.partition("[")
    if not bracket:
        return None
    match = _SLICE.match(bracket + rest)
    if not match:
        raise UserError(f"{source.where}: split: expected a slice like train[:50] or train[10%:20%], found {split}")

    def bound(text, default):
        if text is None:
            return default
        value = round(int(text[:-1]) / 100 * count) if text.endswith("%") else int(text)
        return max(0, min(count, value + count if value < 0 else value))

    return range(bound(match[1], 0), bound(match[2], count))


def _sample(source):
    ratio, wanted = source.mapping.get("sample_ratio"), source.mapping.get("sample_count")
    if ratio is not None and wanted is not None:
        raise UserError(f"{source.where}: expected sample_ratio or sample_count, found both")
    if ratio is None and wanted is None:
        return
    count = len(source)
    wanted = int(count * float(ratio)) if wanted is None else int(wanted)
    if wanted >= count:
        return
    if wanted < 1:
        raise UserError(f"{source.where}: {source.name}: expected to sample at least one of {count} samples, found {wanted}")
    chosen = random.Random(int(source.mapping.get("sample_seed", 42))).sample(range(count), wanted)
    source.indices = array.array("q", chosen if source.indices is None else (source.indices[i] for i in chosen))


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _saved(name):
    return any(os.path.exists(os.path.join(name, file)) for file in ("state.json", "dataset_dict.json"))


def _saved_identity(folder):
    """What tells one `save_to_disk` folder from another: its fingerprints and the sizes of its files."""
    found = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "**", "*"), recursive=True)):
        relative = os.path.relpath(path, folder)
        if path.endswith("state.json"):
            with open(path, encoding="utf-8") as file:
                found[relative] = json.load(file).get("_fingerprint")
        elif path.endswith(".arrow"):
            found[relative] = os.path.getsize(path)
    return found


def _load_saved(source):
    import datasets

    _quiet(datasets)
    try:
        loaded = datasets.load_from_disk(source.name)
    except Exception as error:
        raise UserError(f"{source.where}: {source.name}: expected a folder of save_to_disk, found {one_line(error)}") from error
    if isinstance(loaded, datasets.DatasetDict):
        base = source.mapping["split"].partition("[")[0]
        if base not in loaded:
            raise UserError(f"{source.where}: {source.name}: split {base}: expected one of {', '.join(loaded)}")
        loaded = loaded[base]
    kept = _sliced(len(loaded), source)
    return loaded if kept is None else loaded.select(kept)


def _load_dataset(source):
    """Loads a data set of the hub, a builder (json, parquet ...) or a folder of data files."""
    import datasets

    from ulysses_plus.fetch import sorted_by_who_must_act

    _quiet(datasets)
    name, kwargs = source.name, dict(source.mapping.get("kwargs") or {})
    if kwargs.pop("trust_remote_code", False):
        raise UserError(f"{source.where}: trust_remote_code: code of a data set is never run; give its data as files")
    if os.path.isfile(name):
        builder = {"parquet": "parquet", "csv": "csv", "txt": "text", "arrow": "arrow"}.get(name.rsplit(".", 1)[-1])
        if builder is None:
            raise UserError(f"{source.where}: {name}: expected .jsonl, .json, .parquet, .csv, .txt or .arrow")
        name, kwargs["data_files"] = builder, name
    elif name.startswith(("/", ".", "~")) and not os.path.isdir(name):
        raise UserError(f"{source.where}: expected the file or folder {name}, found none: correct the path")
    try:
        return datasets.load_dataset(name, split=source.mapping["split"], **kwargs)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{source.where}: {source.name}: {one_line(error)}") from error
    except Exception as error:
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
            raise UserError(f"{source.where}: {source.name}: {one_line(error.__cause__)}") from error
        if isinstance(error, FileNotFoundError) and not isinstance(error, datasets.exceptions.DatasetsError) and os.path.exists(name):
            raise UserError(f"{source.where}: {source.name}: {one_line(error)}") from error
        told = sorted_by_who_must_act(error, name, "dataset")
        if told is error:
            raise
        raise type(told)(f"{source.where}: {told}") from error


def _quiet(datasets):
    import sys

    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    datasets.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
