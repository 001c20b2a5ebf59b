"""Chats to token ids and training flags, with a tokenizer's own chat template."""

import json
import re
from bisect import bisect_left, bisect_right
from collections import Counter

from ulysses_plus.errors import UserError, one_line
from ulysses_plus.spans import EMPTY_THINK, PLAIN, PRIVATE, THINKS, placeholder, shape_of, skeleton_of, spans_of, thought


_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Keys of a message, beside role and content, that hold what the assistant says: calls of functions, and thinking under its three names.
CALLS = ("tool_calls", "function_call")
THINKING = ("reasoning_content", "thinking", "reasoning")


class ChatTokenizer:
    """Renders, tokenises and marks conversations.

    What the assistant said is where the template says so ({% generation %}), else its text as the template shows it, with
    the thinking that the template writes before it and the calls of functions that it writes into the same turn.

    tokenizer   a fast Transformers tokenizer with a chat template; of several templates those that Transformers would take,
                `default` and, with tools, `tool_use`; raises UserError else, naming `name`
    """

    def __init__(self, tokenizer, name, mask_inputs=True, ignore_empty_think=False):
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"{name}: expected a tokenizer with tokenizer.json, found one without: convert it once with Transformers")
        if not tokenizer.chat_template:
            raise UserError(
                f"{name}: expected a tokenizer with a chat template, found none: use an instruct model's tokenizer "
                "(tokenizer.name_or_path)"
            )
        if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
            raise UserError(
                f"{name}: expected a chat template named default among the tokenizer's, found {', '.join(sorted(tokenizer.chat_template))}: "
                "name one of them default in its files"
            )
        self.tokenizer = tokenizer
        # Whether there are tools -> the template and whether it marks what the assistant said.
        self.x_templates = {}
        for tools in (None, [{}]):
            template = tokenizer.get_chat_template(tools=tools)
            self.x_templates[bool(tools)] = template, bool(_MARKS.search(template))
        self.mask_inputs = mask_inputs
        self.ignore_empty_think = ignore_empty_think
        # Tokens that steer a template: never made from what somebody wrote in a message.
        added = tokenizer.added_tokens_decoder
        self.x_control = {
            token.content: token for token in added.values() if token.special or token.content.startswith(("<|", "<\uff5c"))
        }
        others = {tokenizer.unk_token, tokenizer.bos_token} - {tokenizer.eos_token}
        self.x_ends = {id_: token.content for id_, token in added.items() if token.content in self.x_control and token.content not in others}
        self.x_plain = None          # made when the first message spells out a control token
        self.x_skeletons = {}        # roles and shapes of a conversation's messages, tools -> Skeleton or None

    def encode(self, turns, at, tools=None):
        """Returns (ids, flags, assistant): a list and a bytearray of equal length, and whether anybody answered.

        turns   [(role, text) or (role, text, the message's other keys), ...]
        tools   what the template is told of functions that can be called: a list of JSON-like dicts
        flags   1 where the token is a target: with mask_inputs what the template marks as generated or, without marks,
                the assistant's text and the end of its turn (flags_of); else all; never the first token
        at      names the sample in errors
        Raises UserError when the template refuses the conversation, leaves out or changes an answer or leaves out calls.
        """
        messages = [{**(more[0] if more else {}), "role": role, "content": content} for role, content, *more in turns]
        contents = [message["content"] for message in messages]
        answering = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        calling = [i for i in answering if any(key in messages[i] for key in CALLS)]
        text, marks = self._render(messages, at, tools)
        if calling:
            messages, text, marks = self._with_calls(messages, text, marks, calling, at, tools)
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"{at}: expected text, found half of a surrogate pair, {text[error.start]!r}: correct or remove the sample") from error
        by_marks = self.x_templates[bool(tools)][1] and self.mask_inputs
        if by_marks and not any(first < last for first, last in marks) and any(contents[i].strip() for i in answering):
            raise UserError(f"{at}: expected the chat template to mark the assistant's text (generation), found no mark: correct the template or remove the sample")
        described = json.dumps(tools, ensure_ascii=False) if tools else ""
        if any(name in described for name in self.x_control):
            raise UserError(f"{at}: tools: a description spells out a special token, which the model would take for one: remove it")
        spelled = [i for i, content in enumerate(contents) if any(name in content for name in self.x_control)]
        self._check_other_keys(messages, calling, at)
        unmarked = set(answering if self.mask_inputs and not by_marks else ())
        wanted = sorted(unmarked.union(spelled))
        spans = self._spans(text, messages, wanted, unmarked, calling, described, at, tools) if wanted else []
        answers = marks if by_marks else [(first, last) for i, first, last in spans if i in unmarked]
        ids, offsets = self._tokenise(text, [(first, last) for i, first, last in spans if i not in calling] if spelled else None, at)
        if not self.mask_inputs:
            flags = bytearray(b"\1") * len(ids)
        else:
            answers = [self._without_empty_think(text, span) for span in answers]
            flags = marked_flags(text, offsets, answers) if by_marks else flags_of(text, offsets, answers, ids, self.x_ends)
        if flags:
            flags[0] = 0
        return ids, flags, bool(answering)

    def _render(self, messages, at, tools, asks=False):
        """Returns (text, the parts of it that the template marks as the assistant's): character offsets. `asks` adds the beginning of an answer."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template, has_marks = self.x_templates[bool(tools)]
        try:
            texts, marks = render_jinja_template(
                [messages], tools=tools, chat_template=template, return_assistant_tokens_mask=has_marks,
                add_generation_prompt=asks, **self.tokenizer.special_tokens_map
            )
            return texts[0], [tuple(mark) for mark in marks[0]] if has_marks else []
        except Exception as error:
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
            raise UserError(
                f"{at}: the chat template refused the conversation ({one_line(error, 160)}), whose roles are {roles}: "
                "correct the sample or use another template"
            ) from error

    def _with_calls(self, messages, text, marks, calling, at, tools):
        """Returns (messages, text, marks) in which the template shows each call: some do beside a content of null only."""
        unseen = self._unseen(messages, text, calling, at, tools)
        if unseen is not None and any(not messages[i]["content"] for i in calling):
            messages = [{**m, "content": None} if i in calling and not m["content"] else m for i, m in enumerate(messages)]
            text, marks = self._render(messages, at, tools)
            unseen = self._unseen(messages, text, calling, at, tools)
        if unseen is not None:
            found = next(key for key in CALLS if key in messages[unseen])
            raise UserError(
                f"{at}: expected a chat template that shows {found}, found one that leaves them out: use another chat template, or write "
                "the calls as text into the message's content, as the model is to say them"
            )
        return messages, text, marks

    def _unseen(self, messages, text, calling, at, tools):
        """The first message whose calls do not matter to what the template renders; None without."""
        named = [{**m, **_calls_named(m, placeholder(i))} if i in calling else m for i, m in enumerate(messages)]
        try:
            shown = self._render(named, at, tools)[0]
        except UserError:    # it knows names
            shown = ""
        for i in calling:
            if placeholder(i) in shown and placeholder(i) not in text:
                continue
            try:
                if self._render(_with(messages, i, _without_calls(messages[i])), at, tools)[0] == text:
                    return i
            except UserError:    # it cannot do without them
                continue
        return None

    def _check_other_keys(self, messages, calling, at):
        """Special tokens are text in contents alone, and not in one whose turn holds the special tokens of calls."""
        for i, message in enumerate(messages):
            for key, value in message.items() if len(message) > 2 else ():
                own = key == "role" or (key == "content" and i not in calling)
                if not own and any(name in json.dumps(value, ensure_ascii=False, default=str) for name in self.x_control):
                    raise UserError(f"{at}: {key}: spells out a special token, which the model would take for one: remove it")

    def _spans(self, text, messages, wanted, answering, calling, described, at, tools):
        """Returns [(message, start, end), ...] of at least the messages `wanted` that are in `text`, ascending; each of `answering` once.

        First with the skeleton of all conversations of such roles. Where the template's own text depends on what is said, with one of this
        conversation in which only what is wanted is replaced.
        """
        contents = [message["content"] or "" for message in messages]
        skeleton = self._skeleton(messages, contents, tools, described)
        if skeleton is not None:
            counts = Counter(skeleton.order)
            spans, _ = spans_of(text, contents, skeleton) if all(counts[i] == 1 for i in answering) else (None, None)
            if spans is not None:
                return spans
        if any(mark in text for mark in PRIVATE):
            raise UserError(f"{at}: a message holds one of the private characters U+E0F3 and U+E0F7, which stand for messages here: remove it")
        thoughts, shapes, replaced = {}, {}, list(messages)
        for i in wanted:
            if i not in calling:
                replaced[i], shapes[i], thoughts[i] = _replaced(messages[i], i, at)
        skeleton, empty = self._learnt(replaced, shapes, at, tools), set()
        if not _fits(text, contents, skeleton, thoughts, answering.difference(calling)):
            # A template may write an empty answer's turn in a way of its own: such ones stay as they are.
            empty = {i for i in answering.difference(calling) if not contents[i].strip() and not thoughts[i]}
            if empty:
                skeleton = self._learnt([messages[i] if i in empty else m for i, m in enumerate(replaced)], shapes, at, tools)
        if skeleton is None and any(thoughts.values()):
            raise UserError(
                f"{at}: expected the assistant's thinking between <think> and </think> in what the chat template rendered, found it elsewhere: "
                "write it as text into the message's content, or use another chat template"
            )
        counts = Counter(skeleton.order if skeleton is not None else ())
        for i in sorted(answering.difference(calling, empty)):
            if counts[i] == 0:
                raise _lost(contents[i], at)
            if counts[i] > 1:
                raise UserError(
                    f"{at}: expected the assistant's text {_quoted(contents[i])} once in what the chat template rendered, found it {counts[i]} times: "
                    "use another chat template or remove the sample"
                )
        spans, stray = spans_of(text, contents, skeleton, thoughts) if skeleton is not None else (None, None)
        if spans is None and stray in answering:
            raise _lost(contents[stray], at)
        if spans is None:
            raise UserError(f"{at}: a message spells out a special token, and the chat template changed that message: remove it")
        called = self._turns_with_calls(text, messages, [i for i in calling if i in answering], at, tools)
        silent = [(i, *turn) for i in empty if (turn := self._empty_turn(text, messages, i, at, tools)) is not None]
        return sorted([*spans, *called, *silent], key=lambda span: span[1:])

    def _skeleton(self, messages, contents, tools, described):
        shape = tuple((m["role"], shape_of(content) if m["role"] == "assistant" else PLAIN) for m, content in zip(messages, contents))
        key = shape, described
        if key not in self.x_skeletons:
            if len(self.x_skeletons) > 4096:
                self.x_skeletons.clear()
            stand_ins = [{"role": role, "content": placeholder(i, kind)} for i, (role, kind) in enumerate(shape)]
            self.x_skeletons[key] = self._learnt(stand_ins, {i: kind for i, (_, kind) in enumerate(shape)}, "", tools)
        return self.x_skeletons[key]

    def _learnt(self, messages, shapes, at, tools):
        try:
            return skeleton_of(self._render(messages, at, tools)[0], shapes)
        except UserError:
            return None

    def _turns_with_calls(self, text, messages, calling, at, tools):
        """Returns [(message, start, end), ...] of all that the template shows of the messages `calling`, ascending.

        Nothing that another message says may stand between: with placeholders for all other messages each turn reads as in `text`.
        """
        if not calling:
            return []
        alone = [m if i in calling else _replaced(m, i, at)[0] for i, m in enumerate(messages)]
        shown = self._render(alone, at, tools)[0]
        found = self._all_turns_with_calls(text, messages, calling, at, tools)
        if found is not None and all(text[first:last] in shown for _, first, last in found):
            return found
        found, cursor = [], 0
        for i in calling:
            turns = []
            for find in (self._turn_by_stand_in, self._turn_by_prefixes):
                if (turn := find(text, messages, i, at, tools)) is not None:
                    turns.append((turn, cursor <= turn[0] and text[slice(*turn)] in shown))
                    if turns[-1][1]:
                        break
            if not turns:
                raise UserError(
                    f"{at}: expected the calls of message {i} between the beginning and the end of an assistant's turn, found that the chat template "
                    "writes them or that turn's text otherwise: write the calls as text into the message's content, as the model is to say them"
                )
            (first, last), is_alone = turns[-1]
            if not is_alone:
                raise UserError(
                    f"{at}: expected the calls of message {i} alone in an assistant's turn, found that the chat template writes another message, "
                    "as a tool's result, into the same turn: use another chat template, or write calls and results as text into the messages' content"
                )
            found.append((i, first, last))
            cursor = last
        return found

    def _all_turns_with_calls(self, text, messages, calling, at, tools):
        """Returns what _turns_with_calls does, found in one rendering with stand-ins for all of them; None where that is not certain."""
        stand_ins, shapes = list(messages), {}
        for i in calling:
            stand_ins[i], shapes[i], _ = _replaced(_without_calls(messages[i]), i, at)
        skeleton = self._learnt(stand_ins, shapes, at, tools)
        if skeleton is None or skeleton.order != calling or not text.startswith(skeleton.pieces[0]) or not text.endswith(skeleton.pieces[-1]):
            return None
        found, cursor, end = [], len(skeleton.pieces[0]), len(text) - len(skeleton.pieces[-1])
        ends = [end]             # of the turns, from the last to the first, each as late as can be
        starts = []
        for piece in skeleton.pieces[-2:0:-1]:
            end = text.rfind(piece, cursor, end) if end >= 0 else -1
            starts.append(end + len(piece))
            ends.append(end)
        starts.append(cursor)
        for i, first, last, after in zip(calling, reversed(starts), reversed(ends), skeleton.pieces[1:]):
            as_early = len(text) - len(after) if i == calling[-1] else text.find(after, cursor)
            if first != cursor or last != as_early or first >= last or _answer(messages[i]) not in text[first:last]:
                return None
            found.append((i, first, last))
            cursor = last + len(after)
        return found

    def _turn_by_stand_in(self, text, messages, i, at, tools):
        """Returns (start, end) of what stands where a text alone would in place of message i with its calls; None where that is not certain."""
        stand_in, shape, _ = _replaced(_without_calls(messages[i]), i, at)
        skeleton = self._learnt(_with(messages, i, stand_in), {i: shape}, at, tools)
        if skeleton is None or skeleton.order != [i]:
            return None
        before, after = skeleton.pieces
        before = before if text.startswith(before) else before.rstrip()
        first, last = len(before), len(text) - len(after)
        if first < last and text.startswith(before) and text.endswith(after) and _answer(messages[i]) in text[first:last]:
            return first, last
        return None

    def _turn_by_prefixes(self, text, messages, i, at, tools):
        """Returns (start, end) of what the template adds for message i with its calls, from where it asks for an answer to the special
        token that ends the turn; None where that is not certain."""
        try:
            before, through = self._render(messages[:i], at, tools, asks=True)[0], self._render(messages[: i + 1], at, tools)[0].rstrip()
            asked = before != self._render(messages[:i], at, tools)[0]
        except UserError:
            return None
        end = max((name for name in self.x_ends.values() if through.endswith(name)), key=len, default=None)
        if end is None or not (through.startswith(before) and text.startswith(through)):
            return None
        # A template that never asks may write more than the answer; one may ask by itself behind the last message.
        answered = None if asked else self._learnt([*messages[:i], {"role": "assistant", "content": placeholder(i)}], {i: PLAIN}, at, tools)
        if not asked and (answered is None or answered.pieces[0].rstrip() != before.rstrip()):
            return None
        if i + 1 == len(messages) and not any(self._goes_on(through, messages, role, at, tools) for role in ("tool", "user")):
            return None
        first, last = len(before), len(through) - len(end)
        return (first, last) if first < last and _answer(messages[i]) in text[first:last] else None

    def _goes_on(self, text, messages, role, at, tools):
        try:
            return self._render([*messages, {"role": role, "content": placeholder(len(messages))}], at, tools)[0].startswith(text)
        except UserError:
            return False

    def _empty_turn(self, text, messages, i, at, tools):
        """Returns (start, end) of an empty answer that the template writes without the white space around a text; None where the turn has no end."""
        skeleton = self._learnt(_with(messages, i, _replaced(messages[i], i, at)[0]), {i: PLAIN}, at, tools)
        if skeleton is None or skeleton.order != [i]:
            return None
        before, after = skeleton.pieces
        before = before if text.startswith(before) else before.rstrip()
        after = after if text.endswith(after) else after.lstrip()
        first, last = len(before), len(text) - len(after)
        return (first, last) if text.startswith(before) and text.endswith(after) and first <= last and not text[first:last].strip() else None

    def _without_empty_think(self, text, span):
        start, end = span
        if self.ignore_empty_think:
            found = EMPTY_THINK.match(text, start, end)
            start = found.end() if found else start
        return start, end

    def _tokenise(self, text, spans, at):
        """Returns (ids, character offsets). With `spans` control tokens spelled out inside one become plain text."""
        if spans is not None:
            return self.tokenise_plainly(text, spans, at)
        encoding = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets if self.mask_inputs else []

    def tokenise_plainly(self, text, spans, at=""):
        """As ordinary tokenisation, but with control tokens inside `spans` read as plain text.

        The template's own control tokens are rewritten as stand-ins that a copy of the tokenizer knows as tokens, and
        that copy reads every spelled-out control token as text; ids and offsets are then translated back.
        """
        if self.x_plain is None:
            self.x_plain = _PlainTokenizer(self.tokenizer, self.x_control)
        return self.x_plain.encode(text, spans, at)


def _with(messages, i, message):
    return [*messages[:i], message, *messages[i + 1 :]]


def _answer(message):
    return (message["content"] or "").rpartition("</think>")[2].strip()


def _without_calls(message):
    return {key: value for key, value in message.items() if key not in CALLS}


def _calls_named(message, name):
    """The message's calls, with `name` for the names of all functions."""
    def named(value):
        if isinstance(value, dict):
            return {key: name if key == "name" else named(item) if key == "function" else item for key, item in value.items()}
        return [named(item) for item in value] if isinstance(value, list) else value

    return {key: named(message[key]) for key in CALLS if key in message}


def _replaced(message, i, at):
    """Returns (the message with placeholders for what it says, its shape, its thinking under a key of its own or None)."""
    content, replaced, said = message["content"] or "", dict(message), None
    for key in THINKING if message["role"] == "assistant" else ():
        if not isinstance(message.get(key, ""), str):
            raise UserError(f"{at}: expected text in {key}, found {type(message[key]).__name__}: correct the sample")
        if message.get(key, "").strip():
            replaced[key] = thought(i)
            said = message[key] if said is None else said
    shape = PLAIN if message["role"] != "assistant" else shape_of(content) if said is None else THINKS
    replaced["content"] = placeholder(i, PLAIN if said is not None else shape)
    return replaced, shape, said


def _fits(text, contents, skeleton, thoughts, answering):
    """Whether each of `answering` stands once in `text`, and all else is as the skeleton has it."""
    if skeleton is None:
        return False
    counts = Counter(skeleton.order)
    return all(counts[i] == 1 for i in answering) and spans_of(text, contents, skeleton, thoughts)[0] is not None


def _quoted(content):
    return one_line(repr(content), 40)


def _lost(content, at):
    return UserError(
        f"{at}: expected the assistant's text {_quoted(content)} in what the chat template rendered, found it changed or left out: "
        "use another chat template or remove the sample"
    )


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
        # What the model makes of unknown characters steers nothing.
        model = definition["model"]
        unknown = {model.get("unk_id"), self.x_backend.token_to_id(model["unk_token"]) if model.get("unk_token") else None} - {tokenizer.eos_token_id}
        self.x_control_ids = set(self.x_ids.values()) - unknown
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


def flags_of(text, offsets, spans, ids=(), ends=()):
    """Returns 1 for each token whose characters, white space at its edges aside, lie inside one of `spans`, and for the
    one token right after each span, which ends the turn: of an empty one, the token that begins where it stands. Where that is white
    space with one of `ends` behind it, up to the next span, this is the end of the turn and trained too.

    offsets   (start, end) of each token in `text`, ascending; spans ascending and disjoint; a token of spaces alone may have
              nothing between them and stand where it ends (trim_offsets)
    ids       the tokens; `ends` holds those of control tokens that can end a turn
    """
    flags = bytearray(len(offsets))
    for k_span, (first, last) in enumerate(spans):
        begin, end = (_first_from(offsets, place) for place in (first, last))
        flags[begin:end] = b"\1" * (end - begin)
        # A token that takes in white space before it (lstrip) ends the turn, though it begins inside.
        if end > 0 and (place := offsets[end - 1])[1] > last and not text[place[0] : last].strip() and text[last : place[1]].strip():
            end -= 1
            begin = min(begin, end)
            flags[end] = 0
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
            behind, limit = end, spans[k_span + 1][0] if k_span + 1 < len(spans) else len(text)
            while behind < len(ids) and ids[behind] not in ends and offsets[behind][0] < limit and not text[slice(*offsets[behind])].strip():
                behind += 1
            if behind < len(ids) and ids[behind] in ends and offsets[behind][1] <= limit:
                flags[end : behind + 1] = b"\1" * (behind + 1 - end)
    return flags


def _first_from(offsets, place):
    """The first token that begins at `place` or later; one without characters at `place` has ended there."""
    i = bisect_left(offsets, (place,))
    while i < len(offsets) and offsets[i] == (place, place):
        i += 1
    return i


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
