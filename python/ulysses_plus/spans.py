"""Where messages stand in the text that a chat template renders.

The template's own text is learnt from a rendering with placeholders in the messages' place; text and messages must then make
up the real rendering to the last character. So a template may drop, move, repeat or rewrite what it likes: either the places
are certain, or there are none. Templates that rewrite a message (strip it, write its thinking anew or drop it) are met by
trying those forms.
"""

import re
from dataclasses import dataclass

EMPTY_THINK = re.compile(r"\s*<think>\s*</think>\s*")
_THINK = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
_ENDS_WITH_EMPTY_THINK = re.compile(r"<think>\s*</think>\s*$")
_PLACEHOLDER = re.compile("\ue0f3([0-9]+)\ue0f4")
PRIVATE = "\ue0f3\ue0f7"    # begin placeholders; private-use characters, no white space
# Shapes of a message: templates treat thinking, and thinking without words, in ways of their own.
PLAIN, THINKS, THINKS_NOTHING = "plain", "thinks", "thinks nothing"


@dataclass
class Skeleton:
    """The template's own text around n places of messages, in the order of the text."""

    pieces: list    # n + 1 texts
    order: list     # which message stands in each place; one may stand in several or in none
    kept: list      # for each place whether the message's thinking is rendered; None for a plain message


def shape_of(content):
    found = _THINK.fullmatch(content)
    return PLAIN if not found else THINKS if found[1].strip() else THINKS_NOTHING


def placeholder(i, shape=PLAIN):
    """Stands for message i in a rendering that a Skeleton is learnt from."""
    thinking = {PLAIN: "", THINKS: f"<think>\n{thought(i)}\n</think>\n\n", THINKS_NOTHING: "<think>\n\n</think>\n\n"}[shape]
    return f"{thinking}\ue0f3{i}\ue0f4"


def thought(i):
    """Stands for the thinking of message i."""
    return f"\ue0f7{i}\ue0f4"


def skeleton_of(text, shapes):
    """Returns the Skeleton of a rendering with placeholders, or None if one is cut or thinking is shown but not behind <think>.

    shapes   {message: its shape} of those that placeholders stand for; THINKS also where thought(i) was given by itself
    """
    pieces, order, kept, cursor = [], [], [], 0
    for found in _PLACEHOLDER.finditer(text):
        i, before = int(found[1]), text[cursor : found.start()]
        cursor, cut = found.end(), None
        if shapes[i] == THINKS and thought(i) in before:
            cut = before.rfind("<think>", 0, before.index(thought(i)))
        elif shapes[i] == THINKS_NOTHING and (thinking := _ENDS_WITH_EMPTY_THINK.search(before)):
            cut = thinking.start()
        order.append(i)
        kept.append(cut is not None if shapes[i] != PLAIN else None)
        pieces.append(before if cut is None or cut < 0 else before[:cut])
    pieces.append(text[cursor:])
    return Skeleton(pieces, order, kept) if not any(mark in piece for piece in pieces for mark in PRIVATE) else None


def spans_of(text, contents, skeleton, thoughts=None):
    """Returns ([(message, start, end), ...], None): character offsets in `text`, ascending and disjoint; or (None, message)
    with the one where `text` is no longer what the skeleton and the messages make up.

    contents   all messages' texts
    thoughts   {message: its thinking} of messages whose thinking is not part of their text
    """
    spans, cursor, pieces = [], 0, skeleton.pieces
    for k, i in enumerate(skeleton.order):
        if not text.startswith(pieces[k], cursor):
            return None, i
        cursor += len(pieces[k])
        end = _end_at(text, cursor, contents[i], (thoughts or {}).get(i), skeleton.kept[k], pieces[k + 1])
        if end is None:
            return None, i
        spans.append((i, cursor, end))
        cursor = end
    if text[cursor:] != pieces[-1]:
        return None, skeleton.order[-1] if spans else None
    return spans, None


def _end_at(text, cursor, content, apart, kept, after):
    """Where the message ends that begins at `cursor` in one of its forms, with `after` behind it; None where it does not.

    apart   its thinking, where that is no part of `content`
    kept    whether its thinking is rendered; None without any
    """
    inner, answer = (apart, content) if apart is not None else (None, content) if kept is None else _THINK.fullmatch(content).groups()
    whole = answer if not kept else content if apart is None else None
    for form in _forms(whole) if whole is not None else ():
        end = cursor + len(form)
        if text.startswith(form, cursor) and text.startswith(after, end):
            return end
    if not kept:
        return None
    trailing = answer[len(answer.rstrip()):] if answer.strip() else ""
    pattern = rf"<think>\s*{re.escape(inner.strip())}\s*</think>\s*{re.escape(answer.strip())}(?:{re.escape(trailing)})?(?={re.escape(after)})"
    found = re.compile(pattern).match(text, cursor)
    return found and found.end()


def _forms(content):
    """Yields the message as it is, and as templates trim it: all white space or newlines only; the longest first."""
    yield content
    forms = {content.rstrip(), content.lstrip(), content.strip(), content.rstrip("\n"), content.lstrip("\n"), content.strip("\n")}
    yield from sorted(forms - {content}, key=len, reverse=True)
