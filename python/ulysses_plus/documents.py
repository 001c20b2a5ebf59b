"""Turns opened sources into documents of token ids and flags: chats (sft) or plain texts (causal)."""

from ulysses_plus.chat import ChatTokenizer
from ulysses_plus.conversation import make_reader, tools_of
from ulysses_plus.errors import UserError
from ulysses_plus.sources import columns, place


def make_encoder(request, sources, tokenizer):
    """Returns f(source's index, sample's index) -> (ids, flags, whether somebody answers), with `sources` and `skip`.

    f returns None for a plain text that holds nothing; it raises UserError, naming source and sample, for a sample that cannot be trained on.
    """
    name = f"{place(request['where'], 'tokenizer.name_or_path')}: {request['tokenizer']}"
    if request["type"] == "causal":
        return _TextEncoder(sources, tokenizer, skips(request))
    return _ChatEncoder(sources, tokenizer, name, request["data"], skips(request))


def check_answers(source, summary):
    """Raises UserError where chats have no answer: `summary` as Parts.summary gives it."""
    silent = summary["silent"]
    if not silent:
        return
    if summary["num_samples"] == 0:
        raise UserError(
            f"{source.where}: {source.name}: expected chats with an assistant turn, found none in {silent} sample{'s' * (silent > 1)}: "
            "set role_mapping in the source"
        )
    more = f" ({silent} such samples)" if silent > 1 else ""
    raise UserError(f"{summary['first_silent']}{more}: remove the sample or set mask_inputs to false")


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
        row, at = source[i], f"{source.where}: {source.name}, sample {sample}"
        ids, flags, answered = self.chat.encode(self.readers[which](row, sample), at, tools_of(row, at))
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
        source = self.sources[which]
        text = source[i].get(self.columns[which])
        at = f"{source.where}: {source.name}, sample {source.row_number(i)}"
        if not isinstance(text, str):
            found = "none" if text is None else type(text).__name__
            raise UserError(f"{at}: expected text in {self.columns[which]}, found {found}: correct or remove the sample")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{at}: expected text, found half of a surrogate pair, {text[error.start]!r}: correct or remove the sample") from error
        ids = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids if text.strip() else []
        if not ids:
            return None
        first, last = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = ([] if first is None else [first]) + ids + ([] if last is None else [last])
        return ids, [0] + [1] * (len(ids) - 1), True
