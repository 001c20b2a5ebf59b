"""Chats to token ids and training flags, with a tokenizer's own chat template."""

import json
import re
from bisect import bisect_left, bisect_right

from ulysses_plus.errors import UserError, one_line
from ulysses_plus.spans import EMPTY_THINK, PLAIN, message_spans, placeholder, shape_of, skeleton_of


_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTokenizer:
    """Renders, tokenises and marks conversations.

    What the assistant said is where the template says so ({% generation %}), else where its text is found.

    tokenizer   a fast Transformers tokenizer with a chat template; raises UserError else, naming `name`
    """

    def __init__(self, tokenizer, name, mask_inputs=True, ignore_empty_think=False):
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"{name}: expected a tokenizer with tokenizer.json, found one without: convert it once with Transformers")
        if not tokenizer.chat_template:
            raise UserError(
                f"{name}: expected a tokenizer with a chat template, found none: use an instruct model's tokenizer "
                "(tokenizer.name_or_path)"
            )
        self.tokenizer = tokenizer
        self.x_template = tokenizer.get_chat_template()
        self.x_has_marks = bool(_MARKS.search(self.x_template))
        self.mask_inputs = mask_inputs
        self.ignore_empty_think = ignore_empty_think
        # Tokens that steer a template: never made from what somebody wrote in a message.
        added = tokenizer.added_tokens_decoder
        self.x_control = {
            token.content: token for token in added.values() if token.special or token.content.startswith(("<|", "<\uff5c"))
        }
        self.x_plain = None          # made when the first message spells out a control token
        self.x_skeletons = {}        # roles and shapes of a conversation's messages, tools -> Skeleton or None

    def encode(self, turns, at, tools=None):
        """Returns (ids, flags, assistant): a list and a bytearray of equal length, and whether anybody answered.

        turns   [(role, text), ...]
        tools   what the template is told of functions that can be called: a list of JSON-like dicts
        flags   1 where the token is a target: with mask_inputs what the template marks as generated or, without marks,
                the assistant's text and the one token after it; else all; never the first token
        at      names the sample in errors
        Raises UserError when the template refuses the conversation or an answer is not found in what it rendered.
        """
        text, marks = self._render(turns, at, tools)
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"{at}: expected text, found half of a surrogate pair, {text[error.start]!r}: correct or remove the sample") from error
        answered = any(role == "assistant" for role, _ in turns)
        by_marks = self.x_has_marks and self.mask_inputs
        if by_marks and not any(first < last for first, last in marks) and any(role == "assistant" and content.strip() for role, content in turns):
            raise UserError(f"{at}: expected the chat template to mark the assistant's text (generation), found no mark: correct the template or remove the sample")
        contents = [content for _, content in turns]
        spelled = any(name in content for content in contents for name in self.x_control)
        described = json.dumps(tools, ensure_ascii=False) if tools else ""
        if any(name in described for name in self.x_control):
            raise UserError(f"{at}: tools: a description spells out a special token, which the model would take for one: remove it")
        spans = message_spans(text, contents, self._skeleton(turns, tools, described)) if spelled or (self.mask_inputs and not by_marks) else []
        answers = marks if by_marks else self._answers(turns, spans, at) if self.mask_inputs else []
        ids, offsets = self._tokenise(text, contents, spans if spelled else None, at)
        if not self.mask_inputs:
            flags = bytearray(b"\1") * len(ids)
        else:
            answers = [self._without_empty_think(text, span) for span in answers]
            flags = (marked_flags if by_marks else flags_of)(text, offsets, answers)
        if flags:
            flags[0] = 0
        return ids, flags, answered

    def _answers(self, turns, spans, at):
        for (role, content), span in zip(turns, spans):
            if role == "assistant" and span is None:
                raise UserError(
                    f"{at}: expected the assistant's text {one_line(repr(content), 40)} in what the chat template "
                    "rendered, found it changed or left out: use another chat template or remove the sample"
                )
        return [span for (role, _), span in zip(turns, spans) if role == "assistant"]

    def _render(self, turns, at, tools):
        """Returns (text, the parts of it that the template marks as the assistant's): character offsets."""
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            texts, marks = render_jinja_template(
                [messages], tools=tools, chat_template=self.x_template, return_assistant_tokens_mask=self.x_has_marks, **self.tokenizer.special_tokens_map
            )
            return texts[0], [tuple(mark) for mark in marks[0]] if self.x_has_marks else []
        except Exception as error:
            roles = ", ".join(dict.fromkeys(role for role, _ in turns))
            raise UserError(
                f"{at}: the chat template refused the conversation ({one_line(error, 160)}), whose roles are {roles}: "
                "correct the sample or use another template"
            ) from error

    def _skeleton(self, turns, tools, described):
        shape = tuple((role, shape_of(content) if role == "assistant" else PLAIN) for role, content in turns)
        key = shape, described
        if key not in self.x_skeletons:
            if len(self.x_skeletons) > 4096:
                self.x_skeletons.clear()
            try:
                text, _ = self._render([(role, placeholder(i, kind)) for i, (role, kind) in enumerate(shape)], "", tools)
                self.x_skeletons[key] = skeleton_of(text, [kind for _, kind in shape])
            except UserError:
                self.x_skeletons[key] = None
        return self.x_skeletons[key]

    def _without_empty_think(self, text, span):
        start, end = span
        if self.ignore_empty_think:
            found = EMPTY_THINK.match(text, start, end)
            start = found.end() if found else start
        return start, end

    def _tokenise(self, text, contents, spans, at):
        """Returns (ids, character offsets). With `spans` control tokens spelled out inside a message become plain text."""
        if spans is None:
            encoding = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
            return encoding.ids, encoding.offsets if self.mask_inputs else []
        if any(span is None and any(name in content for name in self.x_control) for content, span in zip(contents, spans)):
            raise UserError(f"{at}: a message spells out a special token, and the chat template changed that message: remove it")
        return self.tokenise_plainly(text, [span for span in spans if span is not None], at)

    def tokenise_plainly(self, text, spans, at=""):
        """As ordinary tokenisation, but with control tokens inside `spans` read as plain text.

        The template's own control tokens are rewritten as stand-ins that a copy of the tokenizer knows as tokens, and
        that copy reads every spelled-out control token as text; ids and offsets are then translated back.
        """
        if self.x_plain is None:
            self.x_plain = _PlainTokenizer(self.tokenizer, self.x_control)
        return self.x_plain.encode(text, spans, at)


class _PlainTokenizer:
    """A copy of a tokenizer in which control tokens are spelled by stand-ins only."""

    def __init__(self, tokenizer, control):
        from tokenizers import AddedToken, Tokenizer

        definition = json.loads(tokenizer.backend_tokenizer.to_str())
        definition["truncation"] = definition["padding"] = None
        for token in definition["added_tokens"]:
            token["special"] = token["special"] or token["content"] in control
        self.x_backend = Tokenizer.from_str(json.dumps(definition))
        self.x_backend.encode_special_tokens = True
        self.x_stand_ins = {name: f"\ue0f5{i}\ue0f6" for i, name in enumerate(control)}
        self.x_ids = {}
        for name, token in control.items():
            stand_in = self.x_stand_ins[name]
            self.x_backend.add_tokens([
                AddedToken(stand_in, single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip, normalized=token.normalized)
            ])
            self.x_ids[self.x_backend.token_to_id(stand_in)] = tokenizer.convert_tokens_to_ids(name)
        self.x_control_ids = set(self.x_ids.values())
        # Longer names first: a name may begin with another.
        self.x_names = sorted(control, key=len, reverse=True)

    def encode(self, text, spans, at):
        if "\ue0f5" in text:
            raise UserError(f"{at}: a message holds the private character U+E0F5 beside a special token: remove it")
        rewritten, moved = [], [(0, 0)]      # moved: (place in the new text, place in `text`), where they part
        at_new = cursor = 0
        for start, end, name in self._template_tokens(text, spans):
            rewritten += [text[cursor:start], self.x_stand_ins[name]]
            at_new += start - cursor
            moved.append((at_new, start))
            at_new += len(self.x_stand_ins[name])
            moved.append((at_new, end))
            cursor = end
        rewritten.append(text[cursor:])
        encoding = self.x_backend.encode("".join(rewritten), add_special_tokens=False)
        places = [new for new, _ in moved]

        def back(place):
            new, old = moved[bisect_right(places, place) - 1]
            return old + place - new

        ids, offsets = [], []
        for id_, (start, end) in zip(encoding.ids, encoding.offsets):
            if id_ in self.x_control_ids:
                raise UserError(f"{at}: a message spells out a special token that this tokenizer cannot read as text: remove it")
            ids.append(self.x_ids.get(id_, id_))
            offsets.append((back(start), back(end)))
        return ids, offsets

    def _template_tokens(self, text, spans):
        """Yields (start, end, name) of the control tokens that lie outside `spans`, from left to right."""
        gaps, cursor = [], 0
        for start, end in spans:
            gaps.append((cursor, start))
            cursor = end
        gaps.append((cursor, len(text)))
        for start, end in gaps:
            while start < end:
                best = None
                for name in self.x_names:
                    found = text.find(name, start, end)
                    if found >= 0 and (best is None or found < best[0]):
                        best = (found, found + len(name), name)
                if best is None:
                    break
                yield best
                start = best[1]


def flags_of(text, offsets, spans):
    """Returns 1 for each token whose characters, white space at its edges aside, lie inside one of `spans`, and for the
    one token right after each span: of an empty one, the token that begins where it stands.

    offsets   (start, end) of each token in `text`, ascending; spans ascending and disjoint
    """
    flags = bytearray(len(offsets))
    for first, last in spans:
        begin, end = (bisect_left(offsets, (place,)) for place in (first, last))
        flags[begin:end] = b"\1" * (end - begin)
        # Tokens at the edges may stick out, with white space only.
        k = end - 1
        while k >= begin and offsets[k][1] > last:
            flags[k] = _inside(text, *offsets[k], first, last)
            k -= 1
        k = begin - 1
        while k >= 0 and offsets[k][1] > first:
            flags[k] = flags[k] or _inside(text, *offsets[k], first, last)
            k -= 1
        if end < len(offsets):
            flags[end] = 1
    return flags


def marked_flags(text, offsets, marks):
    """Returns 1 for each token with a character inside one of `marks`: what Transformers' assistant mask is."""
    flags = bytearray(len(offsets))
    for first, last in marks:
        i = max(0, bisect_left(offsets, (first,)) - 1)
        while i < len(offsets) and offsets[i][0] < last:
            flags[i] = offsets[i][1] > first or flags[i]
            i += 1
    return flags


def _inside(text, start, end, first, last):
    if first <= start and end <= last:
        return True
    piece = text[start:end]
    left = start + len(piece) - len(piece.lstrip())
    right = end - (len(piece) - len(piece.rstrip()))
    return left < right and first <= left and right <= last
