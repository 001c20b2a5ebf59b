"""python -m ulysses_plus.prepare --request REQUEST.json

Makes (or finds in the cache) the token file of a recipe's data and prints one line of JSON on stdout:

    {"tokens": PATH, "num_samples": n, "longest": tokens, "num_tokens": t, "num_trained_tokens": k, "num_skipped": m, "num_empty": e, "cached": bool}

REQUEST.json:
    type         "sft" (chats) or "causal" (plain text)
    tokenizer    hub id or folder
    vocab_size   the model's; a token id at or above it is refused
    data         the recipe's data section, defaults filled in, sources as mappings
    sources_key  "sources" (default) or "eval_sources": which list to prepare
    show         so many samples are added, from the first on:
                 "samples": [{"num_tokens": t, "num_trained_tokens": k, "pieces": [{"text": "...", "trained": bool}, ...]}, ...]
    where        {"data.sources": "run.yml:9", ...}: places for errors; "data.sources[1].name_or_path" is tried first

num_empty counts plain texts that hold nothing: they are left out. Progress goes to stderr. Processes that want the same file build it once: the others wait. A preparation
that was ended goes on where it was (parts.py). See errors.py for how it ends.
"""

import argparse
import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import signal
import sys
from concurrent.futures.process import BrokenProcessPool

from ulysses_plus import sources as sources_
from ulysses_plus import token_file
from ulysses_plus.cache_lock import CacheLock
from ulysses_plus.conversation import DEFAULT_ROLES, KNOWN_ROLES
from ulysses_plus.errors import UserError, one_line, run
from ulysses_plus.fetch import TOKENIZER_PATTERNS, fetch

COUNTS = ("num_samples", "longest", "num_tokens", "num_trained_tokens", "num_skipped", "num_empty")
# Raise it when the same request would give other tokens or flags than before.
VERSION = 5


def prepare(request):
    """Returns the answer that the head of this file describes. Raises UserError and NetworkError."""
    request = {"where": {}, "sources_key": "sources", "type": "sft", **request}
    data, key = request["data"], f"data.{request['sources_key']}"
    if request["type"] not in ("sft", "causal"):
        raise UserError(f"{sources_.place(request['where'], 'type')}: expected sft or causal, found {request['type']}")
    mappings = data.get(request["sources_key"]) or []
    if not mappings:
        raise UserError(f"{sources_.place(request['where'], key)}: expected at least one source, found none")
    at = sources_.place(request["where"], "tokenizer.name_or_path")
    try:
        folder = fetch(request["tokenizer"], tokenizer_only=True)
    except UserError as error:
        raise UserError(f"{at}: {error}") from error
    sources = [sources_.described(mapping, i, request, key) for i, mapping in enumerate(mappings)]
    provenance = {
        "version": VERSION, "type": request["type"], "sources": [source.identity for source in sources],
        "tokenizer": {"name": request["tokenizer"], "files": _tokenizer_hashes(folder, at)}, "options": _options(request, sources),
    }
    cache = os.path.abspath(os.path.expanduser(data.get("cache_dir") or "/tmp"))
    path, found = _find(cache, provenance)
    cached = found is not None
    if cached:
        _say(found[0], sources)
    else:
        if data.get("fail_on_missing_cache"):
            raise UserError(
                f"{sources_.place(request['where'], 'data.fail_on_missing_cache')}: expected the prepared data {path}, found none: "
                "make it with 'ulysses prepare' and the same recipe (on another machine, if need be: the file may be copied), or set it to false"
            )
        _make_cache_folder(cache, request["where"])
        with _room(path, request["where"]), CacheLock(path, data.get("cache_fs_type")):
            found = token_file.read_summary(path)
            cached = found is not None
            if not cached:
                _build(request, sources, folder, at, path, provenance)
                found = token_file.read_summary(path)
    summary, vocabulary = found
    vocab_size = request.get("vocab_size")
    if vocab_size and vocabulary > vocab_size:
        raise UserError(
            f"{at}: expected token ids below the model's vocabulary of {vocab_size}, found {vocabulary - 1}: "
            "use the tokenizer that belongs to the model"
        )
    counts = {key: summary[key] for key in COUNTS}
    answer = {"tokens": path, **counts, "cached": cached}
    if request.get("show"):
        answer["samples"] = _shown(path, load_tokenizer(folder, request["tokenizer"], at), min(request["show"], summary["num_samples"]))
    return answer


def _shown(path, tokenizer, count):
    """The first samples of a token file as pieces of text, trained and not trained in turn."""
    from itertools import groupby

    from safetensors import safe_open

    def decoded(ids):
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    samples = []
    with safe_open(path, framework="numpy") as file:
        starts = file.get_slice("starts")[: count + 1].tolist()
        for first, last in zip(starts, starts[1:]):
            ids, flags = file.get_slice("ids")[first:last].tolist(), file.get_slice("trained")[first:last].tolist()
            pieces, before, cut = [], 0, 0
            for trained, run in groupby(flags):
                end = cut + len(list(run))
                # Decoded after the piece before it: some tokenizers drop a space that begins a text.
                known = decoded(ids[before:cut])
                whole = decoded(ids[before:end])
                pieces.append({"text": whole[len(known):] if whole.startswith(known) else decoded(ids[cut:end]), "trained": bool(trained)})
                before, cut = cut, end
            samples.append({"num_tokens": last - first, "num_trained_tokens": sum(flags), "pieces": pieces})
    return samples


def _build(request, sources, folder, at, path, provenance):
    from ulysses_plus.documents import check_answers, check_first, make_encoder
    from ulysses_plus.parts import Parts

    scratch = _workplace(path, ".rows")
    shutil.rmtree(scratch, ignore_errors=True)
    parts = None
    try:
        sources = [sources_.opened(source, scratch) for source in sources]
        check_first(request, sources)
        encode = make_encoder(request, sources, load_tokenizer(folder, request["tokenizer"], at))
        parts = Parts(_workplace(path, ".parts"), encode, sources)
        _Interrupt.waits = True
        parts.make(request["data"].get("num_proc") or 1, lambda: _Interrupt.came)
        _Interrupt.waits = False
        summary = parts.summary()
        check_answers(sources[0], summary)
        skipped, first = summary["num_skipped"], summary.pop("first_skipped")
        if skipped and summary["num_samples"] == 0:
            raise UserError(f"none of {skipped} samples can be trained on; the first: {first}")
        sources_.check_unchanged(sources)
        kept = {**{key: summary[key] for key in COUNTS}, "sizes": [source.size for source in sources]}
        _say(kept, sources, first)
        if summary["num_empty"] and summary["num_samples"] == 0:
            raise UserError(f"{sources[0].where}: {sources[0].name}: expected text, found only empty texts ({summary['num_empty']})")
        if summary["num_trained_tokens"] == 0:
            raise UserError(f"{sources[0].where}: expected tokens to train on, found none: check the sources and role_mapping")
        parts.join(path, summary, {**provenance, "summary": kept})
    except UserError as error:
        if parts is not None and not isinstance(error.__cause__, BrokenProcessPool):
            parts.remove()    # mended data have another key
        raise
    except (FileNotFoundError, PermissionError):
        if token_file.read_summary(path) is None:    # else another process, which no lock kept out, has finished it
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if parts is not None:
            with contextlib.suppress(OSError):
                os.rmdir(parts.folder)    # if it is empty


def _say(summary, sources, first_skipped=None):
    """Says on stderr what was left out of the token file with this summary, whether or not it was made just now."""
    for source, size in zip(sources, summary["sizes"]):
        sources_.warn_of_few(source, size)
    skipped, empty = summary["num_skipped"], summary["num_empty"]
    total = summary["num_samples"] + skipped + empty
    if skipped:
        print(f"skipped {skipped:,} of {total:,} samples{f'; the first: {first_skipped}' if first_skipped else ''}", file=sys.stderr, flush=True)
    if empty:
        print(f"left out {empty:,} empty texts of {total:,}", file=sys.stderr, flush=True)


def _workplace(path, suffix):
    """A folder beside the token file `path` for what is needed while it is made: one of this user's, where another user left one."""
    base = path.removesuffix(".safetensors")
    folder = base + suffix
    return folder if not os.path.lexists(folder) or os.access(folder, os.W_OK) else f"{base}.{os.getuid()}{suffix}"


@contextlib.contextmanager
def _room(path, where):
    """Within it a full disk, and files of another user, are errors that name the cache."""
    try:
        yield
    except PermissionError as error:
        if not str(error.filename or "").startswith(os.path.dirname(path)):
            raise
        raise UserError(
            f"{sources_.place(where, 'data.cache_dir')}: expected files that this user may write, found {error.filename} of another user: "
            "remove it or choose another cache_dir"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{sources_.place(where, 'data.cache_dir')}: no room left on the disk of {os.path.dirname(path)}: make room or "
            "choose another cache_dir"
        ) from error


def load_tokenizer(folder, name, at):
    """Returns the Transformers tokenizer of a folder; code that comes with it is never run."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{at}: {name}: expected a tokenizer, found one that cannot be read: {type(error).__name__}: {one_line(error, 160)}") from error
    if tokenizer.is_fast:    # what tokenizer.json says of them is for inference
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _options(request, sources):
    """The options that change ids or flags, as they take effect; whatever else the data section holds does not belong to the key."""
    data = request["data"]
    chats = request["type"] == "sft"
    chosen = {"sources": [_reading(source) if chats else {"column": source.mapping.get("column") or None} for source in sources]}
    if data.get("on_error") == "skip":
        chosen["on_error"] = "skip"
    if chats:
        chosen["mask_inputs"] = data.get("mask_inputs", True)
        chosen["ignore_empty_think"] = data.get("ignore_empty_think", False)
    return chosen


def _reading(source):
    """How the rows of a source of chats are read (conversation.make_reader)."""
    roles = source.mapping.get("role_mapping")
    if not roles or roles == DEFAULT_ROLES:
        roles = KNOWN_ROLES.get(source.name)
    # In its order: that of the turns.
    return {"role_mapping": list(roles.items()) if isinstance(roles, dict) else roles, "content_key": source.mapping.get("content_key")}


def _tokenizer_hashes(folder, at):
    patterns = [pattern for pattern in TOKENIZER_PATTERNS if pattern != "config.json"]
    paths = {path for pattern in patterns for path in glob.glob(os.path.join(glob.escape(folder), pattern))}
    hashes = {}
    for path in sorted(path for path in paths if os.path.isfile(path)):
        with open(path, "rb") as file:
            hashes[os.path.relpath(path, folder)] = hashlib.sha256(file.read()).hexdigest()
    if all(name.startswith(("chat_template", "additional_chat_templates")) for name in hashes):
        raise UserError(f"{at}: expected a tokenizer (tokenizer.json) in {folder}, found none: give tokenizer.name_or_path")
    return hashes


def _make_cache_folder(folder, where):
    try:
        os.makedirs(folder, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("no permission to write")
    except OSError as error:
        raise UserError(
            f"{sources_.place(where, 'data.cache_dir')}: expected a folder that can be written, found {folder}: "
            f"{error.strerror or one_line(error)}"
        ) from error


def _find(cache, provenance):
    """Returns (path, what token_file.read_summary says of it): None if there is none in the folder `cache`.

    Where no sample had to be skipped, it makes no difference whether one would have been.
    """
    path = os.path.join(cache, f"ulysses-tokens-{_key(provenance)}.safetensors")
    found = token_file.read_summary(path)
    if found is None:
        options = {**provenance["options"]}
        if options.pop("on_error", None) is None:
            options["on_error"] = "skip"
        other = os.path.join(cache, f"ulysses-tokens-{_key({**provenance, 'options': options})}.safetensors")
        there = token_file.read_summary(other)
        if there is not None and there[0]["num_skipped"] == 0:
            return other, there
    return path, found


def _key(provenance):
    """Names cannot matter, contents do: the sources' and tokenizer's names are left out where their files are hashed."""
    def nameless(identity):
        return {k: v for k, v in identity.items() if k != "name" or "fingerprint" in identity}

    content = {**provenance, "sources": [nameless(s) for s in provenance["sources"]], "tokenizer": provenance["tokenizer"]["files"]}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]


class _Interrupt:
    """SIGINT and SIGTERM end a preparation: what is half written is removed, processes are ended.

    While documents come, the next one sees it: beside a fork Python drops exceptions of a signal's handler.
    """

    came = waits = False

    @classmethod
    def handle(cls, *_):
        cls.came = True
        if not cls.waits:
            raise KeyboardInterrupt


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m ulysses_plus.prepare", description="Makes the token file of a recipe's data.")
    parser.add_argument("--request", required=True, help="a JSON file; see the head of this module")
    arguments = parser.parse_args(argv)
    try:
        with open(arguments.request, encoding="utf-8") as file:
            request = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{arguments.request}: expected a request as JSON: {one_line(error)}") from error
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, _Interrupt.handle)
    print(json.dumps(prepare(request)), flush=True)


if __name__ == "__main__":
    run(main)
