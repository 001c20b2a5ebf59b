"""Token files: what training reads. See docs/design.md.

A safetensors file with `starts` I64 [n+1], `rows` I64 [n, 2], `ids` I32 [T] and `trained` U8 [T], in this order, so that each
is aligned; metadata of strings: format, vocabulary, provenance and, where several sources were joined, `sources`: samples of each.
"""

import array
import contextlib
import json
import os
import shutil
import struct
import sys
import zlib

FORMAT = "ulysses-tokens-1"


class TokenFileWriter:
    """Writes a token file without holding it: `append` documents, then `finish`.

    ids and flags go to two files beside `path` first (5 bytes a token on disk, twice that while finishing). The file
    appears under its name at once and whole; its checksum tells whether it has come to the disk so (is_whole).
    """

    def __init__(self, path):
        self.path = path
        self.num_tokens = self.num_trained_tokens = self.longest = self.largest_id = 0
        self.x_starts, self.x_rows = array.array("q", [0]), array.array("q")
        self.x_checksums = [0, 0]
        self.x_names = [f"{path}.{os.getpid()}.{kind}" for kind in ("ids", "trained", "whole")]
        self.x_ids, self.x_trained = open(self.x_names[0], "wb"), open(self.x_names[1], "wb")

    @property
    def num_samples(self):
        return len(self.x_starts) - 1

    def append(self, ids, flags, row):
        """Adds one document: ids and flags (0 or 1), of equal length; its source and its place there."""
        assert len(ids) == len(flags)
        for i, (file, part) in enumerate(((self.x_ids, _little(array.array("i", ids))), (self.x_trained, bytes(flags)))):
            file.write(part)
            self.x_checksums[i] = zlib.crc32(part, self.x_checksums[i])
        self.num_tokens += len(ids)
        self.num_trained_tokens += sum(flags)
        self.longest = max(self.longest, len(ids))
        self.largest_id = max(self.largest_id, max(ids, default=0))
        self.x_starts.append(self.num_tokens)
        self.x_rows.extend(row)

    def summary(self):
        return {
            "num_samples": self.num_samples, "longest": self.longest, "num_tokens": self.num_tokens,
            "num_trained_tokens": self.num_trained_tokens,
        }

    def finish(self, provenance, **more):
        """Puts the file together and renames it into place. `provenance` is a JSON-like dict; the summary, with `more`, joins it."""
        self.x_ids.close()
        self.x_trained.close()
        starts, rows = _little(self.x_starts), _little(self.x_rows)
        summary = {**self.summary(), **more, "checksums": [zlib.crc32(starts), zlib.crc32(rows), *self.x_checksums]}
        header = make_header(self.num_samples, self.num_tokens, self.largest_id + 1, {**provenance, "summary": summary})
        try:
            with open(self.x_names[2], "wb") as whole:
                whole.write(header)
                whole.write(starts)
                whole.write(rows)
                for name in self.x_names[:2]:
                    with open(name, "rb") as part:
                        shutil.copyfileobj(part, whole, 1 << 20)
            os.replace(self.x_names[2], self.path)
        finally:
            self.discard()

    def discard(self):
        """Removes what is left of the temporary files."""
        for file in (self.x_ids, self.x_trained):
            with contextlib.suppress(OSError):    # what the disk has no room for is thrown away anyway
                file.close()
        for name in self.x_names:
            if os.path.exists(name):
                os.unlink(name)


def join(paths, path, num_samples, num_tokens, vocabulary, sources, provenance):
    """Writes the token file `path` of the documents of `paths`, in order, and syncs it. Holds the starts of one at a time.

    num_samples, num_tokens   sums over paths;  vocabulary   their largest;  sources   samples of each source
    """
    with open(path, "wb") as whole:
        whole.write(make_header(num_samples, num_tokens, vocabulary, provenance, sources))
        whole.write(_little(array.array("q", [0])))
        before = 0
        for each in paths:
            starts = array.array("q", b"".join(_blocks(each, "starts")))
            if sys.byteorder == "big":
                starts.byteswap()
            whole.write(_little(array.array("q", [before + start for start in starts[1:]])))
            before += starts[-1]
        for name in ("rows", "ids", "trained"):
            for each in paths:
                for block in _blocks(each, name):
                    whole.write(block)
        whole.flush()
        os.fsync(whole.fileno())


def _blocks(path, name):
    """Yields the bytes of a tensor of a token file, a MiB at a time."""
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        first, last = json.loads(file.read(size))[name]["data_offsets"]
        file.seek(8 + size + first)
        while first < last:
            block = file.read(min(last - first, 1 << 20))
            if not block:
                raise OSError(f"{path} has become shorter")
            yield block
            first += len(block)


def is_whole(path):
    """Whether a file that TokenFileWriter made is there as it was made."""
    found = read_summary(path)
    if found is None:
        return False
    for name, wanted in zip(("starts", "rows", "ids", "trained"), found[0].get("checksums", [])):
        checksum = 0
        for block in _blocks(path, name):
            checksum = zlib.crc32(block, checksum)
        if checksum != wanted:
            return False
    return "checksums" in found[0]


def make_header(num_samples, num_tokens, vocabulary, provenance, sources=()):
    """Returns the safetensors header (length and JSON, padded to 8 bytes) of a token file."""
    ends = [8 * (num_samples + 1), 8 * (3 * num_samples + 1)]
    ends += [ends[1] + 4 * num_tokens, ends[1] + 5 * num_tokens]
    header = {
        "__metadata__": {"format": FORMAT, "vocabulary": str(vocabulary), "provenance": json.dumps(provenance, sort_keys=True), **({"sources": ",".join(map(str, sources))} if sources else {})},
        "starts": {"dtype": "I64", "shape": [num_samples + 1], "data_offsets": [0, ends[0]]},
        "rows": {"dtype": "I64", "shape": [num_samples, 2], "data_offsets": [ends[0], ends[1]]},
        "ids": {"dtype": "I32", "shape": [num_tokens], "data_offsets": [ends[1], ends[2]]},
        "trained": {"dtype": "U8", "shape": [num_tokens], "data_offsets": [ends[2], ends[3]]},
    }
    text = json.dumps(header, ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_summary(path):
    """Returns (summary, vocabulary) of a token file, or None if it is not a whole one."""
    try:
        with open(path, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > 1 << 26:
                return None
            header = json.loads(file.read(size))
        metadata = header["__metadata__"]
        whole = 8 + size + max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        if metadata["format"] != FORMAT or os.path.getsize(path) != whole:
            return None
        return json.loads(metadata["provenance"])["summary"], int(metadata["vocabulary"])
    except (OSError, ValueError, KeyError, struct.error):
        return None


def read(path):
    """Returns (ids, flags) as two lists of lists, one a document: for tests and small files."""
    from safetensors.numpy import load_file

    data = load_file(path)
    cuts = list(zip(data["starts"][:-1].tolist(), data["starts"][1:].tolist()))
    return [data["ids"][a:b].tolist() for a, b in cuts], [data["trained"][a:b].tolist() for a, b in cuts]


def _little(numbers):
    if sys.byteorder == "big":
        numbers = array.array(numbers.typecode, numbers)
        numbers.byteswap()
    return numbers.tobytes()


def sync_folder(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
