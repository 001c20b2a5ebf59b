"""The local files behind a source: found by path, glob, folder or builder, known by their content, read when needed.

`find` gives one of three: Files (read by one builder), Folder (sorted into splits by the library) or Saved (`save_to_disk`). Each has

    splits              names of its splits; None: it has one, by any name
    identity(split)     what decides the rows of a split, for the cache key: hashes of the files' contents, never names or times
    rows(split, scratch)    the rows; what is unpacked or converted goes into the folder `scratch`, made if needed
    changed()           a file that is no longer what was hashed, or None
"""

import contextlib
import glob
import hashlib
import json
import os
import tempfile
import time
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

from ulysses_plus import hf_datasets
from ulysses_plus.errors import UserError, one_line
from ulysses_plus.json_rows import COMPRESSED, PLAIN, JsonRows, bare_name, unpack

BUILDERS = ("json", "parquet", "csv", "text", "arrow")
LARGE = 64 << 20    # bytes; smaller files are hashed at every start
_BUILDER_OF = {**dict.fromkeys(PLAIN, "json"), ".parquet": "parquet", ".csv": "csv", ".txt": "text", ".arrow": "arrow"}


def find(name, kwargs, where):
    """Returns the Files, Folder or Saved that name_or_path and the arguments of load_dataset mean; None: they are not local."""
    path = os.path.expanduser(name)
    data_files = kwargs.get("data_files")
    if os.path.isdir(path) and not (name in BUILDERS and (data_files or kwargs.get("data_dir"))):
        if not os.access(path, os.R_OK | os.X_OK):
            raise UserError(f"{where}: {name}: expected a readable folder, found no permission to read it")
        if any(os.path.lexists(os.path.join(path, file)) for file in ("state.json", "dataset_dict.json")):
            return Saved(path, where, name)
        return Folder(os.path.abspath(path), kwargs, where, name)
    if os.path.isfile(path):
        return Files(None, {"train": [path]}, kwargs, where, name)
    if data_files is not None and "/" not in name:
        splits = _splits(data_files, where)
        if any("://" in pattern for patterns in splits.values() for pattern in patterns):
            return None
        if name == "pandas":
            raise UserError(f"{where}: pandas: pickled data may hold code, which is never run: write them as parquet")
        found = {split: [file for pattern in patterns for file in _matching(pattern, where, "data_files: ")] for split, patterns in splits.items()}
        return Files(name, found, kwargs, where, name)
    if name in BUILDERS:
        if kwargs.get("data_dir"):
            return Folder(name, {**kwargs, "data_dir": os.path.abspath(os.path.expanduser(str(kwargs["data_dir"])))}, where, name)
        raise UserError(f"{where}: {name}: expected the builder's files in kwargs, as data_files, found none: name them, or give their path as name_or_path")
    if glob.has_magic(path):
        return Files(None, {"train": _matching(name, where, "")}, kwargs, where, name)
    if "://" in name:
        raise UserError(f"{where}: {name}: expected a hub id, a folder, a file or a glob, found a URL: give a builder such as json, and the URL in kwargs as data_files")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or _builder_of(name) or name.lower().endswith(COMPRESSED):
        raise UserError(f"{where}: expected the file {name}, found no such file: correct the path")
    return None


def exists(name):
    return os.path.exists(os.path.expanduser(name))


def _splits(data_files, where):
    """{split: patterns} of the argument data_files in any of its forms."""
    if isinstance(data_files, list) and data_files and all(isinstance(each, dict) and {"split", "path"} == set(each) for each in data_files):
        data_files = {each["split"]: each["path"] for each in data_files}
    splits = data_files if isinstance(data_files, dict) else {"train": data_files}
    splits = {str(split): [patterns] if isinstance(patterns, str) else patterns for split, patterns in splits.items()}
    if not splits or not all(isinstance(patterns, list) and patterns and all(isinstance(pattern, str) for pattern in patterns) for patterns in splits.values()):
        raise UserError(f"{where}: data_files: expected a file's name, a list of them or a mapping from splits, found {data_files}")
    return splits


def _matching(pattern, where, what):
    """The files that a path or a glob names, sorted by name; none is an error."""
    path = os.path.expanduser(pattern)
    if glob.has_magic(path) and not os.path.exists(path):
        found = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
    else:
        found = [path] if os.path.isfile(path) else []
    if not found:
        raise UserError(f"{where}: {what}expected the file {pattern}, found no such file: correct the path")
    return found


def _builder_of(path):
    """The builder that reads a file of this name, None if none does."""
    return _BUILDER_OF.get(os.path.splitext(bare_name(path))[1].lower())


class _Local:
    def __init__(self, where, name, kwargs):
        self.where, self.name = where, name
        # Two that check_arguments has seen.
        self.kwargs = {key: value for key, value in kwargs.items() if key not in ("trust_remote_code", "streaming")}
        self.x_known = {}    # of each file that was hashed: its state just before, and the hash

    def _hash(self, path):
        if path not in self.x_known:
            try:
                before = _written_state(path)
                self.x_known[path] = before, _remembered_sha256(path, before)
            except FileNotFoundError as error:
                raise UserError(f"{self.where}: {self.name}: expected the file {path}, found no such file: correct the path") from error
            except OSError as error:
                what = "no permission to read it" if isinstance(error, PermissionError) else error.strerror or one_line(error)
                at = "" if os.path.expanduser(self.name) == path else f": {path}"
                raise UserError(f"{self.where}: {self.name}{at}: expected a readable file, found {what}") from error
        return self.x_known[path][1]

    def _hash_all(self, paths):
        # Hashing leaves Python to other threads.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return list(pool.map(self._hash, paths))

    def changed(self):
        for path, (before, digest) in self.x_known.items():
            try:
                if _state(path) != before and _sha256(path) != digest:
                    return path
            except OSError:
                return path
        return None


class Files(_Local):
    """Files that one builder reads; without a name it is taken from the files' suffixes.

    JSON files are read by this program, unless there are arguments for the library's way.
    """

    def __init__(self, builder, splits, kwargs, where, name):
        super().__init__(where, name, {key: value for key, value in kwargs.items() if key not in ("data_files", "data_dir")})
        self.splits = list(splits)
        self.x_files = splits
        self.x_builder = builder or self._by_suffix([path for paths in splits.values() for path in paths])
        self.x_json = self.x_builder == "json" and not hf_datasets.content_of(self.kwargs)

    def _by_suffix(self, paths):
        builders = {}
        for path in paths:
            if _builder_of(path) is None:
                at = "" if os.path.expanduser(self.name) == path else f": {path}"
                raise UserError(
                    f"{self.where}: {self.name}{at}: expected .jsonl, .json, .parquet, .csv, .txt or .arrow (or one of these with {', '.join(COMPRESSED)})"
                )
            builders.setdefault(_builder_of(path), path)
        if len(builders) > 1:
            raise UserError(f"{self.where}: {self.name}: expected files of one kind, found {' and '.join(builders.values())}: give each kind a source of its own")
        return next(iter(builders))

    def identity(self, split):
        # How the rows of a JSON file begin and end depends on its suffix.
        paths = self.x_files[split]
        files = [[digest, _is_lines(path)] if self.x_json else [digest] for path, digest in zip(paths, self._hash_all(paths))]
        return {"builder": self.x_builder, "files": files, "kwargs": hf_datasets.content_of(self.kwargs)}

    def rows(self, split, scratch):
        files = self.x_files[split]
        if self.x_json:
            return Concatenated([JsonRows(path, os.path.dirname(scratch)) for path in files])
        os.makedirs(scratch, exist_ok=True)
        files = [file for file in (self._unpacked(path, scratch) for path in files) if not self._holds_nothing(file)]
        csv = files[0] if files and self.x_builder == "csv" else None
        # As names, not as patterns.
        files = [glob.escape(os.path.abspath(file)) for file in files]
        return hf_datasets.load_local(self.x_builder, {"train": files}, "train", scratch, self.where, self.name, self.kwargs, csv=csv) if files else []

    def _holds_nothing(self, path):
        if os.path.getsize(path) == 0:
            return True
        return self.x_builder == "parquet" and hf_datasets.is_parquet_without_rows(path)

    def _unpacked(self, path, scratch):
        if not path.lower().endswith(COMPRESSED):
            return path
        descriptor, plain = tempfile.mkstemp("-" + os.path.basename(bare_name(path)), dir=scratch)
        with open(descriptor, "wb") as file:
            unpack(path, file)
        return plain


class Folder(_Local):
    """A folder of data files, which the library sorts into splits by their names and a README.md; or a builder's name with data_dir."""

    def __init__(self, path, kwargs, where, name):
        super().__init__(where, name, kwargs)
        self.x_path = path
        self.x_files = self._listed()
        self.splits = list(self.x_files)

    def _listed(self):
        with tempfile.TemporaryDirectory() as scratch:
            return hf_datasets.files_of(self.x_path, scratch, self.where, self.name, self.kwargs)

    def changed(self):
        return super().changed() or (self.x_path if self._listed() != self.x_files else None)

    def identity(self, split):
        # Columns are those of all splits.
        files = {each: self._hash_all(paths) for each, paths in self.x_files.items()}
        said = [os.path.join(self.x_path, file) for file in ("README.md", ".huggingface.yaml", "dataset_infos.json")]
        kwargs = {key: value for key, value in hf_datasets.content_of(self.kwargs).items() if key != "data_dir"}
        builder = self.x_path if self.x_path in BUILDERS else None
        return {"builder": builder, "split": split, "files": files, "said": [self._hash(path) for path in said if os.path.isfile(path)], "kwargs": kwargs}

    def rows(self, split, scratch):
        os.makedirs(scratch, exist_ok=True)
        files = [path for paths in self.x_files.values() for path in paths]
        csv = files[0] if all(path.lower().endswith(".csv") for path in files) else None
        return hf_datasets.load_local(self.x_path, None, split, scratch, self.where, self.name, self.kwargs, csv=csv)


class Saved(_Local):
    """A folder that `save_to_disk` wrote, of one data set or of a dictionary of splits."""

    def __init__(self, folder, where, name):
        super().__init__(where, name, {})
        self.x_folder, self.splits = folder, None
        listing = os.path.join(folder, "dataset_dict.json")
        if os.path.exists(listing):
            splits = self._json(listing).get("splits")
            if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
                raise UserError(f"{where}: {name}: expected a folder of save_to_disk, found no list of splits in {listing}")
            self.splits = splits

    def _folder_of(self, split):
        return self.x_folder if self.splits is None else os.path.join(self.x_folder, split)

    def identity(self, split):
        folder = self._folder_of(split)
        # A fingerprint is another each time that the same rows are saved.
        state = {key: value for key, value in self._json(os.path.join(folder, "state.json")).items() if key not in ("_fingerprint", "_split")}
        features = self._json(os.path.join(folder, "dataset_info.json")).get("features")
        arrows = sorted(glob.glob(os.path.join(glob.escape(folder), "**", "*.arrow"), recursive=True))
        return {"saved": {os.path.relpath(path, folder): digest for path, digest in zip(arrows, self._hash_all(arrows))}, "state": state, "features": features}

    def rows(self, split, scratch):
        return hf_datasets.load_saved(self._folder_of(split), self.where, self.name)

    def _json(self, path):
        self._hash(path)
        try:
            with open(path, encoding="utf-8") as file:
                value = json.load(file)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.where}: {self.name}: expected a folder of save_to_disk, found a broken {path}: save it again") from error
        if not isinstance(value, dict):
            raise UserError(f"{self.where}: {self.name}: expected a folder of save_to_disk, found no object in {path}: save it again")
        return value


class Concatenated:
    """Several sequences of rows as one."""

    def __init__(self, parts):
        self.x_parts = parts
        self.x_ends = list(accumulate(len(part) for part in parts))

    def __len__(self):
        return self.x_ends[-1]

    def __getitem__(self, i):
        part = bisect_right(self.x_ends, i)
        return self.x_parts[part][i - (self.x_ends[part - 1] if part else 0)]


def _is_lines(path):
    return bare_name(path).lower().endswith((".jsonl", ".ndjson"))


def _state(path):
    """What changes whenever a file is written; also where it does not change its content."""
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _written_state(path):
    """The state of a file; of a large one once its pages have come to the disk: a program that wrote into them by a map is seen from then on."""
    if os.path.getsize(path) >= LARGE:
        with contextlib.suppress(OSError), open(path, "rb") as file:
            os.fsync(file.fileno())
    return _state(path)


def _remembered_sha256(path, state):
    """The hash of a file in `state`; of a large one from where an earlier start has left it.

    Whatever is written to a file changes its ctime, which nobody can set back. Only what was last changed a while ago is remembered: of two
    writes at once a clock may show one time.
    """
    if state[2] < LARGE:
        return _sha256(path)
    folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ulysses", "hashes")
    memo = os.path.join(folder, hashlib.sha256(os.path.realpath(path).encode()).hexdigest())
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        with open(memo, encoding="utf-8") as file:
            known = json.load(file)
        if known["state"] == list(state):
            return known["sha256"]
    settled = time.time_ns() - state[4] > 2_000_000_000
    digest = _sha256(path)
    if settled:
        with contextlib.suppress(OSError):    # it is hashed again next time
            os.makedirs(folder, exist_ok=True)
            descriptor, beside = tempfile.mkstemp(dir=folder)
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump({"state": state, "sha256": digest}, file)
            os.replace(beside, memo)
    return digest


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
