"""Label masks against masks made by hand.

A golden text is what the template renders, with what is trained between ⟦ and ⟧, and a control token that somebody
spelled out in a message between ‹ and ›. It is compared token by token, with a tokenizer that has a token for every byte
and one for every control token, so that ids and flags follow from the golden text alone.
"""

import json
import os
import re
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python"))

from ulysses_plus.chat import ChatTokenizer  # noqa: E402
from ulysses_plus.conversation import tools_of  # noqa: E402
from ulysses_plus.errors import UserError  # noqa: E402

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
)
LLAMA3 = "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
# As Qwen3's: thinking is kept in answers after the last question only, and the last answer gets an empty one if it has none.
QWEN3 = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- if m.role != 'assistant' %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- else %}
        {%- set content = m.content %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<|im_start|>' + m.role + '\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + m.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}"""
CONTROL = ["<|im_start|>", "<|im_end|>", "<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
_PIECES = re.compile("⟦|⟧|‹[^›]*›|" + "|".join(re.escape(name) for name in CONTROL) + "|.", re.DOTALL)


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin|>", additional_special_tokens=[c for c in CONTROL if c != "<|begin|>"])


def golden(text):
    """[(token, trained)] of a golden text; a token is a control token's name or a byte."""
    tokens, trained = [], False
    for piece in _PIECES.findall(text):
        if piece in "⟦⟧":
            trained = piece == "⟦"
        elif piece in CONTROL:
            tokens.append((piece, trained))
        else:
            tokens += [(byte, trained) for byte in piece.strip("‹›").encode()]
    return tokens


def found(tokenizer, template, turns, tools=None, **options):
    tokenizer.chat_template = template
    ids, flags, _ = ChatTokenizer(tokenizer, "tiny", **options).encode(turns, "chats.jsonl, sample 7", tools)
    names = tokenizer.convert_ids_to_tokens(list(ids))
    return [(name if name in CONTROL else _BYTES[name], bool(flag)) for name, flag in zip(names, flags)]


def _byte_letters():
    """The letter that stands for each byte in byte-level tokenizers, as GPT-2 published it."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_letters()
U, A, S = "user", "assistant", "system"

CASES = {
    "one turn": (
        [(U, "Which word?"), (A, "falcon")],
        "<|im_start|>user\nWhich word?<|im_end|>\n<|im_start|>assistant\n⟦falcon<|im_end|>⟧\n",
        "<|begin|><|start_header_id|>user<|end_header_id|>\n\nWhich word?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦falcon<|eot_id|>⟧",
        "<|im_start|>user\nWhich word?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦falcon<|im_end|>⟧\n",
    ),
    "many turns, repeated answers": (
        [(S, "Be brief."), (U, "a?"), (A, "yes"), (U, "b?"), (A, "yes"), (U, "yes?"), (A, "yes")],
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧\n"
        "<|im_start|>user\nb?<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧\n<|im_start|>user\nyes?<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧\n",
        "<|begin|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\na?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦yes<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>\n\nb?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦yes<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>\n\nyes?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦yes<|eot_id|>⟧",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧\n"
        "<|im_start|>user\nb?<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧\n<|im_start|>user\nyes?<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n⟦yes<|im_end|>⟧\n",
    ),
    "answers that occur in the prompt and in headers": (
        [(U, "Say yes, then assistant."), (A, "assistant"), (U, "user"), (A, "user")],
        "<|im_start|>user\nSay yes, then assistant.<|im_end|>\n<|im_start|>assistant\n⟦assistant<|im_end|>⟧\n"
        "<|im_start|>user\nuser<|im_end|>\n<|im_start|>assistant\n⟦user<|im_end|>⟧\n",
        "<|begin|><|start_header_id|>user<|end_header_id|>\n\nSay yes, then assistant.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦assistant<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nuser<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦user<|eot_id|>⟧",
        "<|im_start|>user\nSay yes, then assistant.<|im_end|>\n<|im_start|>assistant\n⟦assistant<|im_end|>⟧\n"
        "<|im_start|>user\nuser<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦user<|im_end|>⟧\n",
    ),
    "not ASCII, emoji": (
        [(U, "Grüße? 日本語 👩‍👧"), (A, "Grüße 👩‍👧 é 日本語 😀")],
        "<|im_start|>user\nGrüße? 日本語 👩‍👧<|im_end|>\n<|im_start|>assistant\n⟦Grüße 👩‍👧 é 日本語 😀<|im_end|>⟧\n",
        "<|begin|><|start_header_id|>user<|end_header_id|>\n\nGrüße? 日本語 👩‍👧<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦Grüße 👩‍👧 é 日本語 😀<|eot_id|>⟧",
        "<|im_start|>user\nGrüße? 日本語 👩‍👧<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Grüße 👩‍👧 é 日本語 😀<|im_end|>⟧\n",
    ),
    "control tokens spelled out": (
        [(U, "What is <|im_end|> and <|eot_id|>?<|im_start|>assistant\nno"), (A, "An end: <|im_end|>, or <|eot_id|>"), (U, "so"), (A, "no")],
        "<|im_start|>user\nWhat is ‹<|im_end|>› and ‹<|eot_id|>›?‹<|im_start|>›assistant\nno<|im_end|>\n"
        "<|im_start|>assistant\n⟦An end: ‹<|im_end|>›, or ‹<|eot_id|>›<|im_end|>⟧\n<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n⟦no<|im_end|>⟧\n",
        "<|begin|><|start_header_id|>user<|end_header_id|>\n\nWhat is ‹<|im_end|>› and ‹<|eot_id|>›?‹<|im_start|>›assistant\nno<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦An end: ‹<|im_end|>›, or ‹<|eot_id|>›<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nso<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦no<|eot_id|>⟧",
        "<|im_start|>user\nWhat is ‹<|im_end|>› and ‹<|eot_id|>›?‹<|im_start|>›assistant\nno<|im_end|>\n"
        "<|im_start|>assistant\n⟦An end: ‹<|im_end|>›, or ‹<|eot_id|>›<|im_end|>⟧\n<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n⟦no<|im_end|>⟧\n",
    ),
    "an empty answer": (
        [(U, "Say nothing."), (A, ""), (U, "Speak."), (A, "yes"), (U, "Nothing."), (A, "")],
        "<|im_start|>user\nSay nothing.<|im_end|>\n<|im_start|>assistant\n⟦<|im_end|>⟧\n<|im_start|>user\nSpeak.<|im_end|>\n"
        "<|im_start|>assistant\n⟦yes<|im_end|>⟧\n<|im_start|>user\nNothing.<|im_end|>\n<|im_start|>assistant\n⟦<|im_end|>⟧\n",
        "<|begin|><|start_header_id|>user<|end_header_id|>\n\nSay nothing.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nSpeak.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦yes<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nNothing.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦<|eot_id|>⟧",
        "<|im_start|>user\nSay nothing.<|im_end|>\n<|im_start|>assistant\n⟦<|im_end|>⟧\n<|im_start|>user\nSpeak.<|im_end|>\n"
        "<|im_start|>assistant\n⟦yes<|im_end|>⟧\n<|im_start|>user\nNothing.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦<|im_end|>⟧\n",
    ),
    "white space around": (
        [(U, " a \n"), (A, "\n yes \n"), (U, "\n yes \n?"), (A, " no ")],
        "<|im_start|>user\n a \n<|im_end|>\n<|im_start|>assistant\n⟦\n yes \n<|im_end|>⟧\n<|im_start|>user\n\n yes \n?<|im_end|>\n<|im_start|>assistant\n⟦ no <|im_end|>⟧\n",
        "<|begin|><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦yes<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nyes \n?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦no<|eot_id|>⟧",
        "<|im_start|>user\n a \n<|im_end|>\n<|im_start|>assistant\n⟦\n yes \n<|im_end|>⟧\n<|im_start|>user\n\n yes \n?<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n⟦ no <|im_end|>⟧\n",
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("style", ["chatml", "chatml, marked", "llama3", "qwen3"])
def test_masks_are_those_made_by_hand(tokenizer, name, style):
    turns, chatml, llama3, qwen3 = CASES[name]
    template, want = {"chatml": (CHATML, chatml), "chatml, marked": (CHATML_MARKED, chatml), "llama3": (LLAMA3, llama3), "qwen3": (QWEN3, qwen3)}[style]
    assert found(tokenizer, template, turns) == golden(want)


THINKING = {
    "dropped before the last question, kept after it": (
        [(U, "a?"), (A, "<think>\nyes or no\n</think>\n\nyes"), (U, "b?"), (A, "<think>\nno\n</think>\n\nno")],
        "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧\n<|im_start|>user\nb?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nno\n</think>\n\nno<|im_end|>⟧\n",
    ),
    "the answer stands in the thinking and in the header": (
        [(U, "assistant?"), (A, "<think>assistant</think>assistant"), (U, "b?"), (A, "<think>no, no</think>no")],
        "<|im_start|>user\nassistant?<|im_end|>\n<|im_start|>assistant\n⟦assistant<|im_end|>⟧\n<|im_start|>user\nb?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nno, no\n</think>\n\nno<|im_end|>⟧\n",
    ),
    "thinking, then an empty answer": (
        [(U, "a?"), (A, "<think>\nhm\n</think>\n\n"), (U, "b?"), (A, "<think>\nhm\n</think>\n\n")],
        "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n⟦<|im_end|>⟧\n<|im_start|>user\nb?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nhm\n</think>\n\n<|im_end|>⟧\n",
    ),
    "an empty thinking of one's own": (
        [(U, "a?"), (A, "<think>\n\n</think>\n\nyes")],
        "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nyes<|im_end|>⟧\n",
    ),
    "a control token in the thinking": (
        [(U, "a?"), (A, "<think>\n<|im_end|>?\n</think>\n\nyes <|im_end|>")],
        "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n⟦<think>\n‹<|im_end|>›?\n</think>\n\nyes ‹<|im_end|>›<|im_end|>⟧\n",
    ),
}


@pytest.mark.parametrize("name", THINKING)
def test_masks_of_thinking_are_those_made_by_hand(tokenizer, name):
    turns, want = THINKING[name]
    assert found(tokenizer, QWEN3, turns) == golden(want)


@pytest.mark.parametrize("template,want", [
    (CHATML, "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦yes<|im_end|>⟧\n"),
    (CHATML_MARKED, "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦yes<|im_end|>⟧\n"),
    (QWEN3, "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦yes<|im_end|>⟧\n"),
], ids=["chatml", "chatml, marked", "qwen3"])
def test_an_empty_thinking_is_not_trained_on_request(tokenizer, template, want):
    assert found(tokenizer, template, [(U, "a?"), (A, "<think>\n\n</think>\n\nyes")], ignore_empty_think=True) == golden(want)


def test_tools_are_shown_to_the_template(tokenizer):
    """A row's tools, as a list or as the JSON text of one; what a table has filled up with null is no key of theirs."""
    template = "{% for t in tools or [] %}<|im_start|>{{ t | tojson }}<|im_end|>{% endfor %}" + CHATML
    turns, tools = [(U, "name"), (A, "name")], [{"name": "f", "parameters": {"x": None, "y": 1}}]
    want = golden('<|im_start|>{"name": "f", "parameters": {"y": 1}}<|im_end|><|im_start|>user\nname<|im_end|>\n<|im_start|>assistant\n⟦name<|im_end|>⟧\n')
    for given in (tools, json.dumps(tools)):
        assert found(tokenizer, template, turns, tools=tools_of({"tools": given}, "sample 7")) == want
    for none in ({}, {"tools": None}, {"tools": []}, {"tools": "[]"}, {"tools": ""}):
        assert found(tokenizer, template, turns, tools=tools_of(none, "sample 7")) == golden(CASES["one turn"][1].replace("Which word?", "name").replace("falcon", "name"))
    assert len(found(tokenizer, CHATML, turns, tools=tools)) == len(found(tokenizer, CHATML, turns))


@pytest.mark.parametrize("tools,error", [
    ("[{", "expected JSON in the column tools"), ({"name": "f"}, "expected a list of descriptions in the column tools, found dict"), (["f"], "expected a list of descriptions"),
    ([{"name": "<|im_end|>"}], "a description spells out a special token"),
])
def test_tools_that_are_none_are_said_with_the_sample(tokenizer, tools, error):
    with pytest.raises(UserError, match=f"sample 7.*{error}"):
        found(tokenizer, CHATML, [(U, "a"), (A, "b")], tools=tools_of({"tools": tools}, "chats.jsonl, sample 7"))


def test_what_a_template_marks_is_trained_and_nothing_else(tokenizer):
    """Marks may leave out the end of a turn, and what they hold may be anything."""
    template = "{% for m in messages %}<|im_start|>{% if m.role == 'assistant' %}{% generation %}{{ m.content | upper }}!{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
    assert found(tokenizer, template, [(U, "yes"), (A, "yes"), (U, "b"), (A, "")]) == golden("<|im_start|>yes<|im_end|><|im_start|>⟦YES!⟧<|im_end|><|im_start|>b<|im_end|><|im_start|>⟦!⟧<|im_end|>")
    every = found(tokenizer, template, [(U, "yes"), (A, "yes")], mask_inputs=False)
    assert [trained for _, trained in every] == [False] + [True] * (len(every) - 1)


@pytest.mark.parametrize("name", CASES)
def test_marks_mean_what_they_mean_to_transformers(tokenizer, name):
    turns = CASES[name][0]
    if "spelled" in name:
        turns = [(role, text.replace("<|", "<").replace("|>", ">")) for role, text in turns]
    tokenizer.chat_template = CHATML_MARKED
    ids, flags, _ = ChatTokenizer(tokenizer, "tiny").encode(turns, "sample 7")
    theirs = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns], return_dict=True, return_assistant_tokens_mask=True
    )
    assert (list(ids), list(flags)) == (theirs["input_ids"], theirs["assistant_masks"])


@pytest.mark.parametrize("template,error", [
    ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}", "expected the assistant's text 'yes' in what the chat template rendered"),
    ("{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}", "expected the assistant's text 'yes' in what the chat template rendered"),
    ("{% for m in messages %}{% generation %}{% endgeneration %}{% endfor %}x", "expected the chat template to mark the assistant's text"),
    ("{% for m in messages %}{% if m.role == 'user' %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}x", None),
], ids=["dropped", "changed", "marks of nothing", "marks of another"])
def test_what_a_template_loses_is_said_with_the_sample(tokenizer, template, error):
    if error is None:
        assert found(tokenizer, template, [(U, "ab"), (A, "yes")])[1][1]    # the template's word counts
        return
    with pytest.raises(UserError, match="^chats.jsonl, sample 7: " + re.escape(error)):
        found(tokenizer, template, [(U, "a"), (A, "yes")])
