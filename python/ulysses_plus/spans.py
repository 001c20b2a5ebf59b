"""Where each message stands in the text that a chat template renders.

The template's own text is learnt by rendering the same roles with placeholders; the spans follow by reading the real
text from left to right. Templates that rewrite a message (strip it, write its thinking anew or drop it) are met by trying
those forms.
"""

import re
from dataclasses import dataclass

EMPTY_THINK = re.compile(r"\s*<think>\s*</think>\s*")
_THINK = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
_ENDS_WITH_EMPTY_THINK = re.compile(r"<think>\s*</think>\s*$")
# Shapes of a message: templates treat thinking, and thinking without words, in ways of their own.
PLAIN, THINKS, THINKS_NOTHING = "plain", "thinks", "thinks nothing"


@dataclass
class Skeleton:
    """The template's own text around n messages."""

    pieces: list    # n + 1 texts
    kept: list      # for each message whether its thinking is rendered


def shape_of(content):
    found = _THINK.fullmatch(content)
    return PLAIN if not found else THINKS if found[1].strip() else THINKS_NOTHING


def placeholder(i, shape=PLAIN):
    """Stands for message i in the skeleton; private-use characters, no white space."""
    thinking = {PLAIN: "", THINKS: f"<think>\n{_thought(i)}\n</think>\n\n", THINKS_NOTHING: "<think>\n\n</think>\n\n"}[shape]
    return f"{thinking}\ue0f3{i}\ue0f4"


def _thought(i):
    return f"\ue0f7{i}\ue0f4"


def skeleton_of(text, shapes):
    """Returns the Skeleton of a rendering of placeholders, or None if they do not stand in order, each once (a template
    that merges, repeats or drops messages)."""
    pieces, kept = [], []
    for i, shape in enumerate(shapes):
        before, found, text = text.partition(placeholder(i))
        if not found:
            return None
        cut = None
        if shape == THINKS and _thought(i) in before:
            cut = before.rfind("<think>", 0, before.index(_thought(i)))
        elif shape == THINKS_NOTHING and (thinking := _ENDS_WITH_EMPTY_THINK.search(before)):
            cut = thinking.start()
        kept.append(cut is not None)
        pieces.append(before if cut is None or cut < 0 else before[:cut])
    pieces.append(text)
    return Skeleton(pieces, kept) if not any("\ue0f3" in piece or "\ue0f7" in piece for piece in pieces) else None


def message_spans(text, contents, skeleton):
    """Returns [(start, end) or None] for each of `contents` in `text`, character offsets, in order.

    skeleton   as skeleton_of gives it, or None
    A message that is found in no form is None; the caller decides whether it needed it.
    """
    if skeleton is not None:
        spans = _anchored(text, contents, skeleton)
        if spans is not None:
            return spans
    return _searched(text, contents, skeleton and skeleton.pieces)


def _anchored(text, contents, skeleton):
    """The template's text and the messages must make up `text` exactly, message forms aside; else None."""
    spans, cursor, pieces = [], 0, skeleton.pieces
    for i, content in enumerate(contents):
        if not text.startswith(pieces[i], cursor):
            return None
        cursor += len(pieces[i])
        end = _form_at(text, cursor, content, skeleton.kept[i], pieces[i + 1])
        if end is None:
            return None
        spans.append((cursor, end))
        cursor = end
    return spans if text[cursor:] == pieces[-1] else None


def _form_at(text, cursor, content, kept, after):
    """Where the message ends that begins at `cursor` in one of its forms, with `after` behind it; None where it does not."""
    thinking = _THINK.fullmatch(content)
    for form in _stripped_forms(thinking[2] if thinking and not kept else content):
        end = cursor + len(form)
        if text.startswith(form, cursor) and text.startswith(after, end):
            return end
    if thinking and kept:
        inner, answer = thinking[1].strip(), thinking[2]
        trailing = answer[len(answer.rstrip()):] if answer.strip() else ""
        pattern = rf"<think>\s*{re.escape(inner)}\s*</think>\s*{re.escape(answer.strip())}(?:{re.escape(trailing)})?(?={re.escape(after)})"
        found = re.compile(pattern).match(text, cursor)
        return found and found.end()
    return None


def _searched(text, contents, pieces):
    """Looks for each message after the end of the one before and, where it can, after its header."""
    spans, cursor = [], 0
    for i, content in enumerate(contents):
        start = cursor
        if pieces is not None and pieces[i]:
            header = text.find(pieces[i], cursor)
            start = header + len(pieces[i]) if header >= 0 else cursor
        header_found = start != cursor
        if not content.strip() and not header_found:
            spans.append(None)    # nothing to look for
            continue
        span = _find(text, content, start)
        if span is None and header_found:
            span = _find(text, content, cursor)
        spans.append(span)
        if span is not None:
            cursor = span[1]
    return spans


def _find(text, content, start):
    best = None
    for form in _stripped_forms(content):
        at = text.find(form, start)
        if at >= 0 and (best is None or at < best[0]):
            best = (at, at + len(form))
    if best is not None:
        return best
    thinking = _THINK.fullmatch(content)
    if thinking:
        inner, answer = thinking[1].strip(), thinking[2].strip()
        pattern = r"<think>\s*" + re.escape(inner) + r"\s*</think>\s*" + re.escape(answer)
        found = re.compile(pattern).search(text, start)
        if found:
            return found.span()
        at = text.find(answer, start) if answer else -1
        if at >= 0:
            return at, at + len(answer)
    return None


def _stripped_forms(content):
    """The message as it is, and as templates trim it, the longest first."""
    return dict.fromkeys([content, content.rstrip(), content.lstrip(), content.strip()])
