"""Turns opened sources into documents of token ids and flags: chats (sft) or plain texts (causal)."""

import multiprocessing
import os
import signal

from ulysses_plus.chat import ChatTokenizer
from ulysses_plus.conversation import make_reader
from ulysses_plus.errors import UserError
from ulysses_plus.sources import columns, place

# Below this many samples, starting processes costs more than it saves.
WORTH_PROCESSES = 4000
BLOCK = 64


def documents(request, sources, tokenizer):
    """Yields (ids, flags, (which source, sample in it)) for every sample of every source, in order.

    Raises UserError, naming source and sample, for a sample that cannot be trained on; for samples without an assistant
    turn after all have been read. With `on_error: skip` yields for these the sentence, a str, in their place.
    """
    skip = skips(request)
    where = place(request["where"], "tokenizer.name_or_path")
    name = f"{where}: {request['tokenizer']}"
    if request["type"] == "causal":
        encode = _TextEncoder(sources, tokenizer, skip)
    else:
        encode = _ChatEncoder(sources, tokenizer, name, request["data"], skip)
    silent, spoken = [], 0
    number = {id(source): i for i, source in enumerate(sources)}
    for source, sample, ids, flags, answered in _mapped(encode, sources, request["data"].get("num_proc") or 1):
        if isinstance(ids, UserError):
            yield str(ids)
        elif answered:
            spoken += 1
            yield ids, flags, (number[id(source)], sample)
        elif skip:
            yield f"{source.where}: {source.name}, sample {sample}: expected an assistant turn, found none"
        else:
            silent.append((source, sample))
    if not silent:
        return
    source, sample = silent[0]
    at = f"{source.where}: {source.name}"
    if spoken == 0:
        raise UserError(
            f"{at}: expected chats with an assistant turn, found none in {len(silent)} sample{'s' * (len(silent) > 1)}: set role_mapping in the source"
        )
    more = f" ({len(silent)} such samples)" if len(silent) > 1 else ""
    raise UserError(f"{at}, sample {sample}: expected an assistant turn, found none{more}: remove the sample or set mask_inputs to false")


def skips(request):
    return request["data"].get("on_error") == "skip"


def check_first(request, sources):
    """Reads the first chat of every source: a wrong mapping is said before a tokenizer is loaded."""
    for source in sources if request["type"] == "sft" else ():
        read = make_reader(source.mapping, columns(source, skips(request)), source.name, source.where)
        if not skips(request):
            read(source[0], source.row_number(0))


class _ChatEncoder:
    def __init__(self, sources, tokenizer, name, data, skip):
        self.sources, self.skip = sources, skip
        self.mask_inputs = data.get("mask_inputs", True)
        self.chat = ChatTokenizer(tokenizer, name, self.mask_inputs, data.get("ignore_empty_think", False))
        self.readers = [make_reader(s.mapping, columns(s, skip), s.name, s.where) for s in sources]

    def __call__(self, which, i):
        source = self.sources[which]
        sample = source.row_number(i)
        turns = self.readers[which](source[i], sample)
        ids, flags, answered = self.chat.encode(turns, f"{source.where}: {source.name}, sample {sample}")
        return ids, flags, answered or not self.mask_inputs


class _TextEncoder:
    """One document a text: BOS and EOS around it where the tokenizer has them; all but the first token are targets."""

    def __init__(self, sources, tokenizer, skip):
        self.sources, self.tokenizer, self.skip = sources, tokenizer, skip
        self.columns = [self._column(source) for source in sources]

    def _column(self, source):
        found, wanted = columns(source, self.skip), source.mapping.get("column") or "text"
        if wanted not in found and len(found) == 1 and not source.mapping.get("column"):
            return found[0]
        if wanted not in found:
            raise UserError(
                f"{source.where}: {source.name}: expected the column {wanted}, found the columns {', '.join(found)}: "
                "set column in the source"
            )
        return wanted

    def __call__(self, which, i):
        text = self.sources[which][i].get(self.columns[which])
        if not isinstance(text, str) or not text:
            source = self.sources[which]
            raise UserError(f"{source.where}: {source.name}, sample {source.row_number(i)}: expected text in {self.columns[which]}, found none")
        ids = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        first, last = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = ([] if first is None else [first]) + ids + ([] if last is None else [last])
        return ids, [0] + [1] * (len(ids) - 1), True


def _mapped(encode, sources, num_proc):
    """Yields (source, sample, ids, flags, answered) in order, with processes where they pay."""
    blocks = [(which, i, min(i + BLOCK, len(s))) for which, s in enumerate(sources) for i in range(0, len(s), BLOCK)]
    workers = min(num_proc, os.cpu_count() or 1)
    if workers > 1 and sum(len(s) for s in sources) >= WORTH_PROCESSES:
        # Forked, so that rows and tokenizer are shared; the tokenizer's own threads must not have started.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        with multiprocessing.get_context("fork").Pool(workers, _start, (encode,)) as pool:
            for block, results in zip(blocks, pool.imap(_block_in_worker, blocks)):
                yield from _labelled(sources, block, results)
        return
    for block in blocks:
        yield from _labelled(sources, block, _block(encode, block))


def _labelled(sources, block, results):
    if isinstance(results, Exception):
        raise results
    which, first, _ = block
    for i, (ids, flags, answered) in enumerate(results, first):
        yield sources[which], sources[which].row_number(i), ids, bytes(flags), answered


def _block(encode, block):
    which, first, last = block
    return [_encoded(encode, which, i) for i in range(first, last)]


def _encoded(encode, which, i):
    """(ids, flags, answered); with on_error: skip the error in place of ids."""
    try:
        return encode(which, i)
    except UserError as error:
        if not encode.skip:
            raise
        return error, b"", False


def _start(encode):
    global _encode
    # The process that collects the results ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _encode = encode


def _block_in_worker(block):
    try:
        return [(ids, bytes(flags), answered) for ids, flags, answered in _block(_encode, block)]
    except UserError as error:
        return error
