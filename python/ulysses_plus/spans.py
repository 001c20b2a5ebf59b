"""Where each message stands in the text that a chat template renders.

The template's own text is learnt by rendering the same roles with placeholders; the spans follow by reading the real
text from left to right. Templates that rewrite a message (strip it, drop its thinking) are met by trying those forms.
"""

import re

EMPTY_THINK = re.compile(r"\s*<think>\s*</think>\s*")
_THINK = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


def placeholder(i):
    """Stands for message i in the skeleton; private-use characters, no white space."""
    return f"\ue0f3{i}\ue0f4"


def skeleton_pieces(skeleton, count):
    """Returns the `count` + 1 texts of the template around `count` placeholders, or None if they do not stand in order,
    each once (a template that merges, repeats or drops messages)."""
    pieces = []
    for i in range(count):
        before, found, skeleton = skeleton.partition(placeholder(i))
        if not found:
            return None
        pieces.append(before)
    pieces.append(skeleton)
    return pieces if not any("\ue0f3" in piece for piece in pieces) else None


def message_spans(text, contents, pieces):
    """Returns [(start, end) or None] for each of `contents` in `text`, character offsets, in order.

    pieces   as skeleton_pieces gives them, or None
    A message that is found in no form is None; the caller decides whether it needed it.
    """
    if pieces is not None:
        spans = _anchored(text, contents, pieces)
        if spans is not None:
            return spans
    return _searched(text, contents, pieces)


def _anchored(text, contents, pieces):
    """The template's text and the messages must make up `text` exactly, message forms aside; else None."""
    spans, cursor = [], 0
    for i, content in enumerate(contents):
        if not text.startswith(pieces[i], cursor):
            return None
        cursor += len(pieces[i])
        for form in _stripped_forms(content):
            end = cursor + len(form)
            if text.startswith(form, cursor) and text.startswith(pieces[i + 1], end):
                spans.append((cursor, end))
                cursor = end
                break
        else:
            return None
    return spans if text[cursor:] == pieces[-1] else None


def _searched(text, contents, pieces):
    """Looks for each message after the end of the one before and, where it can, after its header."""
    spans, cursor = [], 0
    for i, content in enumerate(contents):
        start = cursor
        if pieces is not None and pieces[i]:
            header = text.find(pieces[i], cursor)
            start = header + len(pieces[i]) if header >= 0 else cursor
        span = _find(text, content, start)
        if span is None and start != cursor:
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
