"""Rows of a .jsonl or .json file (also .gz), one dict a row, read when asked for; errors name file and line."""

import array
import gzip
import json
import os

from ulysses_plus.errors import UserError, one_line

SUFFIXES = (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz", ".ndjson.gz")


class JsonRows:
    """A sequence of dicts out of one file.

    Holds 8 bytes a row for plain files with one object a line, and the decoded text for .gz files and JSON arrays.
    Raises UserError (file and line) for what is not JSON, when that row is read.
    """

    def __init__(self, path):
        self.path = path
        self.x_file = None
        self.x_rows = None       # the decoded rows of a JSON array
        self.x_lines = None      # the lines of a .gz file: (line number, bytes)
        self.x_offsets = None    # byte offset of each row of a plain file
        self.x_numbers = None    # its line number
        if path.endswith(".gz"):
            try:
                with gzip.open(path, "rb") as file:
                    lines = file.read().split(b"\n")
            except (OSError, EOFError) as error:
                raise UserError(f"{path}: expected a gzip file, found a broken one: {one_line(error)}") from error
            self.x_lines = [(i + 1, line) for i, line in enumerate(lines) if line.strip()]
            if self.x_lines and not _is_object(self.x_lines[0][1]):
                self.x_rows = self._whole(b"\n".join(lines))
            return
        with open(path, "rb") as file:
            first = next((line for line in file if line.strip()), b"")
            file.seek(0)
            if first and not _is_object(first) and not path.endswith((".jsonl", ".ndjson")):
                self.x_rows = self._whole(file.read())
                return
            self.x_offsets, self.x_numbers = array.array("q"), array.array("q")
            offset = 0
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    self.x_offsets.append(offset)
                    self.x_numbers.append(number)
                offset += len(line)

    def __len__(self):
        if self.x_rows is not None:
            return len(self.x_rows)
        return len(self.x_offsets if self.x_offsets is not None else self.x_lines)

    def __getitem__(self, index):
        if self.x_rows is not None:
            row, number = self.x_rows[index], None
        elif self.x_lines is not None:
            number, line = self.x_lines[index]
            row = self._decoded(line, number)
        else:
            if self.x_file is None or self.x_file[0] != os.getpid():
                self.x_file = (os.getpid(), open(self.path, "rb"))
            self.x_file[1].seek(self.x_offsets[index])
            number = self.x_numbers[index]
            row = self._decoded(self.x_file[1].readline(), number)
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
            lists = [v for v in value.values() if isinstance(v, list)]
            value = lists[0] if len(lists) == 1 else [value]
        if not isinstance(value, list):
            raise UserError(f"{self.path}: expected a JSON array of objects, found {_kind(value)}")
        return value


def _is_object(line):
    """Whether the line alone is a JSON object."""
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def _kind(value):
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
