"""Rows of a .jsonl or .json file (also .gz, .zst, .xz, .bz2), one dict a row, read when asked for; errors name file and line."""

import array
import bz2
import errno
import gzip
import json
import lzma
import os
import shutil
import tempfile

from ulysses_plus.errors import UserError, one_line

PLAIN = (".jsonl", ".json", ".ndjson")
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
# An object with one of these is a row.
_OF_A_ROW = ("messages", "conversations", "conversation", "prompt", "instruction", "user", "assistant", "text")


class JsonRows:
    """A sequence of dicts out of one file.

    scratch   folder for what a compressed file holds: a file without a name, gone with the process; by default TMPDIR
    Where the rows of a file with one object a line stand is kept in such a file too; of a JSON array all decoded rows are held.
    Raises UserError (file and line) for what is not JSON, when that row is read.
    """

    def __init__(self, path, scratch=None):
        self.path = path
        self.x_rows = None       # the decoded rows of a JSON array
        self.x_file = file = _decompressed(path, scratch) if path.lower().endswith(COMPRESSED) else open(path, "rb")
        if not bare_name(path).lower().endswith((".jsonl", ".ndjson")) and _is_whole(file):
            file.seek(0)
            self.x_rows = self._whole(file.read())
            return
        file.seek(0)
        self.x_index, self.x_count = tempfile.TemporaryFile(dir=scratch), 0    # of each row its byte offset and line number; the end
        offset, entries = 0, array.array("q")
        for number, line in enumerate(file, 1):
            if not line.isspace():
                entries.extend((offset, number))
                self.x_count += 1
                if len(entries) >= 1 << 16:
                    entries.tofile(self.x_index)
                    entries = array.array("q")
            offset += len(line)
        entries.extend((offset, 0))
        entries.tofile(self.x_index)
        self.x_index.flush()

    def __len__(self):
        return self.x_count if self.x_rows is None else len(self.x_rows)

    def __getitem__(self, index):
        if self.x_rows is not None:
            row, number = self.x_rows[index], None
        else:
            # pread: processes forked from this one share the file's position.
            if not 0 <= index < self.x_count:
                raise IndexError(index)
            start, number, end, _ = array.array("q", os.pread(self.x_index.fileno(), 32, 16 * index))
            row = self._decoded(os.pread(self.x_file.fileno(), end - start, start), number)
        if not isinstance(row, dict):
            place = f"{self.path}:{number}" if number else f"{self.path}, item {index}"
            raise UserError(f"{place}: expected a JSON object, found {_kind(row)}: write one chat as one object")
        return row

    def _decoded(self, line, number):
        try:
            return json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip())
        except json.JSONDecodeError as error:
            raise UserError(
                f"{self.path}:{number}: expected one JSON object on this line, found an error at column {error.pos + 1} "
                f"({error.msg[0].lower()}{error.msg[1:]}): correct or remove the line"
            ) from error
        except RecursionError as error:
            raise UserError(f"{self.path}:{number}: expected one JSON object on this line, found one nested too deeply: correct or remove the line") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}:{number}: expected UTF-8 text, found byte {error.object[error.start]:#04x}") from error

    def _whole(self, data):
        try:
            value = json.loads(data.decode("utf-8-sig"))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{self.path}:{error.lineno}: expected JSON, found {error.msg[0].lower()}{error.msg[1:]} at column "
                f"{error.colno}: correct the file"
            ) from error
        except RecursionError as error:
            raise UserError(f"{self.path}: expected JSON, found lists or objects nested too deeply: correct the file") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: expected UTF-8 text, found byte {error.object[error.start]:#04x}") from error
        if isinstance(value, dict):
            rows = _wrapped(value)
            value = [value] if rows is None else rows
        if not isinstance(value, list):
            raise UserError(f"{self.path}: expected a JSON array of objects, found {_kind(value)}")
        return value


def bare_name(path):
    """The path without the suffix of a compressed file."""
    return os.path.splitext(path)[0] if path.lower().endswith(COMPRESSED) else path


def _decompressed(path, scratch):
    """Returns an open file without a name that holds what the compressed file `path` does."""
    file = tempfile.TemporaryFile(dir=scratch)
    unpack(path, file)
    file.seek(0)
    return file


def unpack(path, file):
    """Writes what the compressed file `path` holds to the open `file`. Raises UserError for a broken one."""
    kind = path.rsplit(".", 1)[-1].lower()
    try:
        with open(path, "rb"):
            pass    # a file that cannot be opened is no broken one
        with _OPENERS[kind](path) as packed:
            shutil.copyfileobj(packed, file, 1 << 20)
    except (OSError, EOFError, lzma.LZMAError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.ENOENT, errno.EACCES):
            raise
        raise UserError(f"{path}: expected a .{kind} file, found a broken one: {one_line(error)}") from error


def _open_zst(path):
    import pyarrow    # of `datasets`; Python itself reads .zst from 3.14 on

    return pyarrow.input_stream(path, compression="zstd")


_OPENERS = {"gz": gzip.open, "xz": lzma.open, "bz2": bz2.open, "zst": _open_zst}


def _is_whole(file):
    """Whether the open file is one JSON value, not one object a line."""
    lines = (line for line in file if line.strip())
    first = next(lines, None)
    if first is None:
        return False
    try:
        value = json.loads(first.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return True
    # One object on the one line there is: all rows, or one.
    return not isinstance(value, dict) or (_wrapped(value) is not None and next(lines, None) is None)


def _wrapped(value):
    """The rows that one object holds as its one list of objects, {"data": [...]}; None where it is a row itself."""
    lists = [items for items in value.values() if isinstance(items, list)]
    if len(lists) != 1 or any(key in value for key in _OF_A_ROW) or not all(isinstance(item, dict) for item in lists[0]):
        return None
    return lists[0]


def _kind(value):
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
