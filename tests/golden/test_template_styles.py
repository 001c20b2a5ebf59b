"""Label masks of chat templates that drop, move, repeat or rewrite what is said, of calls of functions and of thinking that has
a key of its own: against masks made by hand (test_label_masks.py says how a golden text is written)."""

import re
from pathlib import Path
import sys

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from test_label_masks import A, CHATML, CHATML_MARKED, CONTROL, QWEN3, S, U, found, golden, tokenizer  # noqa: E402, F401
from ulysses_plus.chat import ChatTokenizer  # noqa: E402
from ulysses_plus.conversation import make_reader  # noqa: E402
from ulysses_plus.errors import UserError  # noqa: E402

T = "tool"
LOST = "expected the assistant's text {} in what the chat template rendered, found it changed or left out"


def turn(role, text):
    return f"<|im_start|>{role}\n{text}<|im_end|>\n" if role != A else f"<|im_start|>assistant\n⟦{text}<|im_end|>⟧\n"


WITHOUT_SYSTEM = "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
# The system's text goes before the last message, if that is the user's.
MISTRAL = """\
{%- set ns = namespace(system='') %}{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'system' %}{%- set ns.system = m.content + '\\n\\n' %}
    {%- elif m.role == 'user' %}{{- '[INST] ' + (ns.system if loop.last else '') + m.content + ' [/INST]' }}
    {%- else %}{{- ' ' + m.content + '<|eot_id|>' }}{%- endif %}
{%- endfor %}"""
# The system's text goes into the last message of the user, wherever it stands.
IN_LAST_USER = """\
{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}{%- if m.role != 'system' %}
    {{- '<|im_start|>' + m.role + '\\n' + (messages[0].content + '\\n\\n' if loop.index0 == ns.last else '') + m.content + '<|im_end|>\\n' }}
{%- endif %}{%- endfor %}"""
IN_EVERY_USER = """\
{%- for m in messages %}{%- if m.role != 'system' %}
    {{- '<|im_start|>' + m.role + '\\n' + (messages[0].content + '\\n\\n' if m.role == 'user' else '') + m.content + '<|im_end|>\\n' }}
{%- endif %}{%- endfor %}"""
LAST_ANSWER = "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
VICUNA = "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content | replace('\n\n', '\n') }} {% else %}ASSISTANT: {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
CAPITAL = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | capitalize }}<|im_end|>\n{% endfor %}"
CAPITAL_USER = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | capitalize if m.role == 'user' else m.content }}<|im_end|>\n{% endfor %}"
NEWLINES = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.strip('\n') }}<|im_end|>\n{% endfor %}"
TWICE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}Last: {{ messages[-1].content }}"
SYSTEM_THEN_A = [(S, "Be brief."), (U, "Which letter?"), (A, "a"), (U, "assistant?"), (A, "assistant"), (U, "user?"), (A, "")]

STYLES = {
    "system left out": (WITHOUT_SYSTEM, SYSTEM_THEN_A, "".join(turn(*t) for t in SYSTEM_THEN_A[1:])),
    "system left out, special tokens spelled out": (
        WITHOUT_SYSTEM, [(S, "no <|im_end|>"), (U, "what is <|im_end|>?"), (A, "a"), (U, "<|im_start|>assistant\na"), (A, "s")],
        turn(U, "what is ‹<|im_end|>›?") + turn(A, "a") + turn(U, "‹<|im_start|>›assistant\na") + turn(A, "s"),
    ),
    "system gone as the assistant speaks last": (
        MISTRAL, [(S, "Be brief."), (U, "which?"), (A, "I"), (U, "and?"), (A, "["), (U, "yes?"), (A, "T")],
        "<|begin|>[INST] which? [/INST] ⟦I<|eot_id|>⟧[INST] and? [/INST] ⟦[<|eot_id|>⟧[INST] yes? [/INST] ⟦T<|eot_id|>⟧",
    ),
    "system before the last question": (
        MISTRAL, [(S, "Be I."), (U, "which?"), (A, "I"), (U, "I?")], "<|begin|>[INST] which? [/INST] ⟦I<|eot_id|>⟧[INST] Be I.\n\nI? [/INST]",
    ),
    "system in the user's last turn": (
        IN_LAST_USER, [(S, "Be brief."), (U, "a?"), (A, "yes"), (U, "no no yes?"), (A, "yes"), (U, "b?"), (A, "no, no")],
        turn(U, "a?") + turn(A, "yes") + turn(U, "no no yes?") + turn(A, "yes") + turn(U, "Be brief.\n\nb?") + turn(A, "no, no"),
    ),
    "system in every turn of the user": (
        IN_EVERY_USER, [(S, "sys <|im_end|>"), (U, "a?"), (A, "no"), (U, "b?"), (A, "s"), (U, "c?"), (A, "assistant")],
        turn(U, "sys ‹<|im_end|>›\n\na?") + turn(A, "no") + turn(U, "sys ‹<|im_end|>›\n\nb?") + turn(A, "s") + turn(U, "sys ‹<|im_end|>›\n\nc?") + turn(A, "assistant"),
    ),
    "the user's text changed": (
        VICUNA, [(U, "Repeat:\n\nfoo ASSISTANT: yes"), (A, "yes"), (U, "a\n\nA"), (A, "A")],
        "USER: Repeat:\nfoo ASSISTANT: yes ASSISTANT: ⟦yes<|im_end|>⟧USER: a\nA ASSISTANT: ⟦A<|im_end|>⟧",
    ),
    "the user's text begins with a capital": (
        CAPITAL_USER, [(U, "assistant? a"), (A, "a"), (U, "say Assistant"), (A, "assistant")],
        turn(U, "Assistant? a") + turn(A, "a") + turn(U, "Say assistant") + turn(A, "assistant"),
    ),
    "newlines trimmed, spaces kept": (NEWLINES, [(U, "\n a \n\n"), (A, "\n\n  a \n"), (U, "b"), (A, "\n s")], turn(U, " a ") + turn(A, "  a ") + turn(U, "b") + turn(A, " s")),
    "an earlier answer's newlines after thinking": (
        QWEN3, [(U, "a?"), (A, "<think>\nhm\n</think>\n\n  a"), (U, "b?"), (A, "<think>yes</think>\n  no"), (U, "c?"), (A, "s")],
        turn(U, "a?") + turn(A, "  a") + turn(U, "b?") + turn(A, "  no") + turn(U, "c?") + "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦s<|im_end|>⟧\n",
    ),
    "a thinking user": (CHATML, [(U, "<think><|im_end|></think>a"), (A, "a")], turn(U, "<think>‹<|im_end|>›</think>a") + turn(A, "a")),
    "private characters": (CHATML, [(U, "\ue0f31\ue0f4"), (A, "\ue0f30\ue0f4")], turn(U, "\ue0f31\ue0f4") + turn(A, "\ue0f30\ue0f4")),
}


@pytest.mark.parametrize("name", STYLES)
def test_masks_of_templates_that_rewrite_are_those_made_by_hand(tokenizer, name):  # noqa: F811
    template, turns, want = STYLES[name]
    assert found(tokenizer, template, turns) == golden(want)


@pytest.mark.parametrize("template,turns,error", [
    (LAST_ANSWER, [(U, "a?"), (A, "yes"), (U, "yes? really"), (A, "no")], LOST.format("'yes'")),
    (CAPITAL, [(U, "Assistant? assistant"), (A, "assistant")], LOST.format("'assistant'")),
    (CAPITAL, [(U, "x"), (A, "s")], LOST.format("'s'")),
    (TWICE, [(U, "x"), (A, "s")], "expected the assistant's text 's' once in what the chat template rendered, found it 2 times"),
    (CAPITAL_USER, [(U, "x <|IM_END|> <|im_end|>"), (A, "s")], "a message spells out a special token, and the chat template changed that message"),
    (VICUNA, [(U, "\ue0f3\n\n"), (A, "s")], "a message holds one of the private characters U+E0F3 and U+E0F7"),
    ("{% for m in messages %}{{ m.content[:3] }}<|im_end|>{% endfor %}", [(U, "x"), (A, "four")], LOST.format("'four'")),
])
def test_what_a_template_drops_or_changes_is_said_with_the_sample(tokenizer, template, turns, error):  # noqa: F811
    with pytest.raises(UserError, match="^chats.jsonl, sample 7: " + re.escape(error)):
        found(tokenizer, template, turns)


# As Qwen's and Hermes': thinking with a key of its own, calls after the text, results as turns of the user.
CALLING = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + (' ' + m.name if m.name else '') + '\\n' }}
        {%- if m.reasoning_content is string and loop.index0 > ns.last %}{{- '<think>\\n' + m.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}
        {{- m.content }}
        {%- for call in m.tool_calls or [] %}
            {{- ('\\n' if m.content or not loop.first else '') + '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}"""
MARKED_CALLING = CALLING.replace("{{- m.content }}", "{%- generation %}{{- m.content }}").replace("{{- '<|im_end|>\\n' }}", "{{- '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}")
NULL_CALLING = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is none %}{{ m.tool_calls[0].function.name }}(){% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
CALL = {"function": {"name": "f", "arguments": {"x": 1}}}
CALLED = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


def test_calls_are_trained_with_the_turn_that_makes_them(tokenizer):  # noqa: F811
    turns = [(U, "a?"), (A, "", {"tool_calls": [CALL]}), (T, "a", {"tool_call_id": "1"}), (A, "I call.", {"tool_calls": [CALL, CALL]}), (T, "f"), (A, "f")]
    response = "<|im_start|>user\n<tool_response>\n{}\n</tool_response><|im_end|>\n".format
    want = turn(U, "a?") + turn(A, CALLED) + response("a") + turn(A, "I call.\n" + CALLED + "\n" + CALLED) + response("f") + turn(A, "f")
    assert found(tokenizer, CALLING, turns) == golden(want)


def test_calls_that_a_template_shows_beside_null_only_are_shown(tokenizer):  # noqa: F811
    assert found(tokenizer, NULL_CALLING, [(U, "f?"), (A, "", {"tool_calls": [CALL]}), (U, "f()"), (A, "f")]) == golden(turn(U, "f?") + turn(A, "f()") + turn(U, "f()") + turn(A, "f"))


@pytest.mark.parametrize("options", [{}, {"mask_inputs": False}])
@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
@pytest.mark.parametrize("key,value", [("tool_calls", [CALL]), ("function_call", {"name": "f"})])
def test_calls_that_a_template_leaves_out_are_said(tokenizer, template, options, key, value):  # noqa: F811
    with pytest.raises(UserError, match=f"^chats.jsonl, sample 7: expected a chat template that shows {key}, found one that leaves them out"):
        found(tokenizer, template, [(U, "a?"), (A, "so", {key: value})], **options)


def test_calls_that_a_template_writes_elsewhere_are_said(tokenizer):  # noqa: F811
    template = "{% for m in messages %}<|im_start|>{{ 'call ' + m.tool_calls[0].function.name if m.tool_calls else m.role + ': ' + m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(UserError, match="sample 7: expected the calls of message 1 between the beginning and the end of an assistant's turn"):
        found(tokenizer, template, [(U, "a?"), (A, "", {"tool_calls": [CALL]})])


# As Gemma 4's: results stand in the turn that calls.
ONE_TURN = """\
{%- for m in messages %}{%- if m.role != 'tool' %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- for call in m.tool_calls or [] %}{{- '<|start_header_id|>' + call.function.name + '()' }}{%- endfor %}
    {%- if m.tool_calls and not loop.last and messages[loop.index].role == 'tool' %}{{- '<|end_header_id|>' + messages[loop.index].content + '<|eot_id|>' }}{%- endif %}
    {{- m.content + '<|im_end|>\\n' }}
{%- endif %}{%- endfor %}"""


def test_results_of_tools_in_the_turn_that_calls_are_never_trained(tokenizer):  # noqa: F811
    turns = [(U, "a?"), (A, "", {"tool_calls": [CALL]}), (T, "secret"), (A, "a")]
    with pytest.raises(UserError, match="sample 7: expected the calls of message 1 alone in an assistant's turn, found that the chat template writes another"):
        found(tokenizer, ONE_TURN, turns)
    want = "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n⟦<|start_header_id|>f()<|im_end|>⟧\n"
    assert found(tokenizer, ONE_TURN, turns[:2]) == golden(want)
    twice = [*turns[:2], (U, "f()"), (A, "so", {"tool_calls": [CALL]}), (U, "so"), (A, "so")]
    assert found(tokenizer, ONE_TURN, twice) == golden(want + turn(U, "f()") + turn(A, "<|start_header_id|>f()so") + turn(U, "so") + turn(A, "so"))


def test_results_of_tools_are_cut_out_of_the_turn_where_it_says_where_the_model_stops(tokenizer):  # noqa: F811
    """As Gemma 4's, whose model stops at the token that begins a result."""
    stops = ONE_TURN.replace("m.content + '<|im_end|>\\n'", "m.content + ('<|end_header_id|>' if m.tool_calls and loop.last else '<|im_end|>\\n')")
    stops += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    turns = [(U, "a?"), (A, "", {"tool_calls": [CALL]}), (T, "secret"), (A, "a")]
    want = turn(U, "a?") + "<|im_start|>assistant\n⟦<|start_header_id|>f()<|end_header_id|>⟧"
    assert found(tokenizer, stops, turns) == golden(want + "secret<|eot_id|><|im_end|>\n" + turn(A, "a"))
    with pytest.raises(UserError, match="sample 7: expected the calls of message 1 alone"):     # what is said stands behind the result
        found(tokenizer, stops, [turns[0], (A, "so", {"tool_calls": [CALL]}), *turns[2:]])


def test_many_calls_take_no_more_renderings_than_few(tokenizer, monkeypatch):  # noqa: F811
    renderings, render = [], ChatTokenizer._render
    monkeypatch.setattr(ChatTokenizer, "_render", lambda self, *args, **more: renderings.append(1) or render(self, *args, **more))
    counts = []
    for n in (1, 9):
        said = [(A, "x" * i, {"tool_calls": [{"function": {"name": "f", "arguments": {"x": i}}}]}) for i in range(n)]
        turns = [(U, "a?"), *(message for call in said for message in (call, (T, "<tool_call>")))]
        called = ['<tool_call>\n{"name": "f", "arguments": {"x": %d}}\n</tool_call>' % i for i in range(n)]
        want = "".join(turn(A, "x" * i + "\n" * (i > 0) + text) + turn(U, "<tool_response>\n<tool_call>\n</tool_response>") for i, text in enumerate(called))
        assert found(tokenizer, CALLING, turns) == golden(turn(U, "a?") + want)
        counts.append(len(renderings))
        renderings.clear()
    assert counts[0] == counts[1] <= 6


# As Mistral's (no header, and no result without a call before it) and gpt-oss' (the calling turn begins and ends in another way).
NEEDS_CALLS = """\
{%- for m in messages %}
    {%- set before = messages[loop.index0 - 1] if not loop.first else {} %}
    {%- if m.role == 'tool' %}
        {%- if not before.tool_calls %}{{- raise_exception('a result without a call') }}{%- endif %}
        {{- '<|start_header_id|>' + m.content + '<|end_header_id|>' }}
    {%- elif m.role == 'user' %}{{- '[INST]' + m.content + '[/INST]' }}
    {%- elif m.tool_calls %}{{- HEADER + m.content + 'to=' + m.tool_calls[0].function.name + '<|eot_id|>' }}
    {%- else %}{{- HEADER + TEXT + m.content + '<|im_end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- HEADER }}{%- endif %}"""


@pytest.mark.parametrize("header,text", [("", ""), ("<|im_start|>assistant", ""), ("<|im_start|>assistant", "<|begin|>")])
def test_calls_that_a_result_needs_are_trained_from_header_to_end(tokenizer, header, text):  # noqa: F811
    template = NEEDS_CALLS.replace("HEADER", repr(header)).replace("TEXT", repr(text))
    turns = [(U, "f?"), (A, "", {"tool_calls": [CALL]}), (T, "to=f"), (A, "f"), (U, "g?"), (A, "so ", {"tool_calls": [CALL]}), (T, "f")]
    want = (
        f"[INST]f?[/INST]{header}⟦to=f<|eot_id|>⟧<|start_header_id|>to=f<|end_header_id|>{header}{text}⟦f<|im_end|>⟧"
        f"[INST]g?[/INST]{header}⟦so to=f<|eot_id|>⟧<|start_header_id|>f<|end_header_id|>"
    )
    assert found(tokenizer, template, turns) == golden(want)
    assert found(tokenizer, template, turns[:-1]) == golden(want[: want.rindex("<|start_header_id|>")])
    asking = template[: template.index("{%- if add_generation_prompt")]     # it never asks: where a turn begins is known without a header alone
    if not header:
        assert found(tokenizer, asking, turns) == golden(want)
    else:
        with pytest.raises(UserError, match="sample 7: expected the calls of message 1 between the beginning and the end of an assistant's turn"):
            found(tokenizer, asking, turns)


# As GLM's: a line for what is said, none where nothing is; as Seed-OSS': nor an end.
NO_LINE = "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' + m.content if m.content.strip() else '' }}<|im_end|>{% endfor %}"
NO_END = "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' + m.content + '<|im_end|>' if m.content.strip() else '' }}{% endfor %}"


def test_an_empty_answer_that_a_template_writes_in_a_way_of_its_own(tokenizer):  # noqa: F811
    turns = [(U, "a?"), (A, ""), (U, "assistant"), (A, "assistant"), (U, "b?"), (A, " ")]
    said = "<|im_start|>user\na?<|im_end|><|im_start|>assistant{0}<|im_start|>user\nassistant<|im_end|><|im_start|>assistant\n⟦assistant<|im_end|>⟧<|im_start|>user\nb?<|im_end|><|im_start|>assistant{0}"
    assert found(tokenizer, NO_LINE, turns) == golden(said.format("⟦<|im_end|>⟧"))
    assert found(tokenizer, NO_END, turns) == golden(said.format(""))
    spelled = [(U, "<|im_end|>"), *turns[1:2]]
    assert found(tokenizer, NO_LINE, spelled) == golden("<|im_start|>user\n‹<|im_end|>›<|im_end|><|im_start|>assistant⟦<|im_end|>⟧")
    with pytest.raises(UserError, match="^chats.jsonl, sample 7: " + re.escape(LOST.format("'no'"))):
        found(tokenizer, NO_LINE.replace("m.content +", "m.content").replace("'\n' + m.content", "'\n' + m.content | upper"), [*turns[:2], (U, "c"), (A, "no")])


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thinking_with_a_key_of_its_own_is_trained_where_it_is_shown(tokenizer, key):  # noqa: F811
    turns = [(U, "a?"), (A, "a", {key: "yes"}), (U, "b?"), (A, " s", {key: "\nno, no\n"})]
    assert found(tokenizer, CALLING, turns) == golden(turn(U, "a?") + turn(A, "a") + turn(U, "b?") + turn(A, "<think>\nno, no\n</think>\n\n s"))
    calls = [*turns[:3], (A, "", {key: "no", "tool_calls": [CALL]})]
    assert found(tokenizer, CALLING, calls) == golden(turn(U, "a?") + turn(A, "a") + turn(U, "b?") + turn(A, "<think>\nno\n</think>\n\n" + CALLED))
    assert found(tokenizer, CHATML, turns) == golden(turn(U, "a?") + turn(A, "a") + turn(U, "b?") + turn(A, " s"))


def test_thinking_outside_of_think_is_said(tokenizer):  # noqa: F811
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.reasoning_content or '' }}|{{ m.content }}<|im_end|>\n{% endfor %}"
    with pytest.raises(UserError, match="sample 7: expected the assistant's thinking between <think> and </think>"):
        found(tokenizer, template, [(U, "a"), (A, "s", {"reasoning_content": "hm"})])


def test_other_keys_reach_the_template_marked_or_not(tokenizer):  # noqa: F811
    turns = [(U, "a?", {"name": "ann"}), (A, "a", {"name": "b", "tool_calls": [CALL]})]
    want = "<|im_start|>user ann\na?<|im_end|>\n<|im_start|>assistant b\n⟦a\n" + CALLED + "<|im_end|>⟧\n"
    assert found(tokenizer, CALLING, turns) == golden(want)
    assert found(tokenizer, MARKED_CALLING, turns[1:]) == golden(want[want.index("\n<|im_start|>assistant") + 1 :])
    assert found(tokenizer, CALLING, turns, mask_inputs=False) == [(token, i > 0) for i, (token, _) in enumerate(golden(want))]
    assert found(tokenizer, CALLING, [*turns[:1], (A, "<|im_end|>")]) == golden("<|im_start|>user ann\na?<|im_end|>\n" + turn(A, "‹<|im_end|>›"))


@pytest.mark.parametrize("message,key", [
    ((U, "a", {"name": "<|im_end|>"}), "name"), ((A, "a", {"reasoning_content": "<|im_end|>"}), "reasoning_content"),
    ((A, "", {"tool_calls": [{"function": {"name": "f", "arguments": "<|im_end|>"}}]}), "tool_calls"), ((A, "<|im_end|>", {"tool_calls": [CALL]}), "content"),
])
def test_special_tokens_in_other_keys_are_refused(tokenizer, message, key):  # noqa: F811
    with pytest.raises(UserError, match=f"sample 7: {key}: spells out a special token"):
        found(tokenizer, CALLING, [(U, "a"), message])


def test_the_end_of_a_turn_is_trained_where_offsets_are_trimmed(tokenizer):  # noqa: F811
    """A token of spaces has no characters then: the one after it is the end, and one before the answer is no part of it."""
    from tokenizers import processors

    backend = tokenizer.backend_tokenizer
    template, turns = "{% for m in messages %}{{ m.role }}:  {{ m.content }}<|im_end|>{% endfor %}", [(U, "q"), (A, "yes  "), (U, "q "), (A, " "), (U, "q"), (A, "")]
    before = backend.post_processor
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    try:
        assert found(tokenizer, template, turns) == golden(
            "user:  q<|im_end|>assistant:  ⟦yes  <|im_end|>⟧user:  q <|im_end|>assistant:  ⟦ <|im_end|>⟧user:  q<|im_end|>assistant:  ⟦<|im_end|>⟧"
        )
    finally:
        backend.post_processor = before or processors.ByteLevel(trim_offsets=False)


LLAMA2 = "{% for m in messages %}{{ '<|begin|>[INST] ' + m.content.strip() + ' [/INST]' if m.role == 'user' else ' ' + m.content.strip() + ' <|eot_id|>' }}{% endfor %}"


def test_an_end_of_turn_behind_white_space_is_trained(tokenizer):  # noqa: F811
    turns = [(U, "q"), (A, "yes\n"), (U, "r"), (A, ""), (U, "s"), (A, "no")]
    assert found(tokenizer, LLAMA2, turns) == golden(
        "<|begin|>[INST] q [/INST] ⟦yes <|eot_id|>⟧<|begin|>[INST] r [/INST] ⟦ <|eot_id|>⟧<|begin|>[INST] s [/INST] ⟦no <|eot_id|>⟧"
    )
    unended = "{% for m in messages %}{{ '<|begin|>' + m.content + ' ' }}{% endfor %}"
    assert found(tokenizer, unended, turns[:1] + turns[-1:] + turns[:1]) == golden("<|begin|>q <|begin|>⟦no ⟧<|begin|>q ")


def test_an_end_of_turn_that_takes_in_white_space_is_trained(tokenizer):  # noqa: F811
    """As Phi-4's: special tokens with lstrip and rstrip begin in the answer, where that ends in white space or is empty."""
    from tokenizers import AddedToken, Tokenizer, decoders
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.decoder = decoders.ByteLevel()
    stripping = PreTrainedTokenizerFast(tokenizer_object=backend)
    stripping.add_special_tokens({"additional_special_tokens": [AddedToken(name, lstrip=True, rstrip=True, normalized=False) for name in CONTROL]})
    template = "{% for m in messages %}<|im_start|>{{ m.role }}<|begin|>{{ m.content }}<|im_end|>{% endfor %}"
    want = "<|im_start|>user<|begin|>q<|im_end|><|im_start|>assistant<|begin|>⟦{}<|im_end|>⟧".format
    turns = [(U, "q"), (A, "four\n"), (U, "q "), (A, ""), (U, "q"), (A, " "), (U, "q"), (A, " two")]
    assert found(stripping, template, turns) == golden(want("four") + want("") + want("") + want("two"))


def test_unknown_characters_beside_a_spelled_out_special_token_are_read():
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<unk>", *"<|z>aqu"]
    backend = Tokenizer(models.Unigram([(letter, -1.0) for letter in letters], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens([AddedToken("<unk>", normalized=False), AddedToken("<|z|>", normalized=False)])
    unigram = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template="{% for m in messages %}{{ m.content }}<|z|>{% endfor %}")
    ids, flags, _ = ChatTokenizer(unigram, "tiny").encode([(U, "q\u00e9<|z|>"), (A, "a")], "sample 7")
    assert unigram.convert_ids_to_tokens(list(ids)) == ["q", "<unk>", *"<|z|>", "<|z|>", "a", "<|z|>"] and list(flags) == [0] * 8 + [1, 1]


def test_with_tools_the_template_for_tools_is_used(tokenizer):  # noqa: F811
    turns, both = [(U, "q"), (A, "a")], {"default": CHATML, "tool_use": "{{ tools[0].name }}" + CHATML}
    assert found(tokenizer, both, turns) == golden(turn(U, "q") + turn(A, "a"))
    assert found(tokenizer, both, turns, tools=[{"name": "f"}]) == golden("f" + turn(U, "q") + turn(A, "a"))
    with pytest.raises(UserError, match="^tiny: expected a chat template named default among the tokenizer's, found rag, tool_use"):
        found(tokenizer, {"tool_use": CHATML, "rag": CHATML}, turns)


# Rows.

def read(row, mapping=None):
    return make_reader(mapping or {}, list(row), "x", "data.sources")(row, 3)


def messages(*more, **row):
    return {"messages": [{"role": "user", "content": "q"}, *more], **row}


@pytest.mark.parametrize("row,mapping,want", [
    (messages({"role": "assistant", "content": "a", "name": "n", "reasoning_content": "r", "weight": 0, "tool_calls": [], "x": None}), {},
     [(U, "q"), (A, "a", {"name": "n", "reasoning_content": "r", "weight": 0})]),
    (messages({"role": "assistant", "content": None, "tool_calls": [{"id": "1", "x": None}]}, {"role": "tool", "content": "5", "tool_call_id": "1"}), {},
     [(U, "q"), (A, "", {"tool_calls": [{"id": "1"}]}), (T, "5", {"tool_call_id": "1"})]),
    (messages({"role": "assistant", "tool_calls": '[{"id": "1"}]'}), {}, [(U, "q"), (A, "", {"tool_calls": [{"id": "1"}]})]),
    (messages({"role": "assistant", "content": ""}), {}, [(U, "q"), (A, "")]),
    ({"talk": [{"who": "u", "value": "q", "name": "n"}, {"who": "b", "value": "a"}]}, {"role_mapping": {"user": "talk.who.u", "assistant": "talk.who.b"}}, [(U, "q", {"name": "n"}), (A, "a")]),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f()"}, {"from": "observation", "value": "1"}, {"from": "gpt", "value": "a"}]}, {},
     [(U, "q"), (A, "f()"), (T, "1"), (A, "a")]),
    (messages({"role": "assistant", "content": "a"}, system="s"), {}, [(S, "s"), (U, "q"), (A, "a")]),
    (messages({"role": "assistant", "content": "a"}, system=None), {}, [(U, "q"), (A, "a")]),
    ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], "system": "s"}, {}, [(S, "s"), (U, "q")]),
    ({"instruction": "i", "output": "o", "system": "s", "history": [["q1", "a1"], ["q2", "a2"]]}, {}, [(S, "s"), (U, "q1"), (A, "a1"), (U, "q2"), (A, "a2"), (U, "i"), (A, "o")]),
    ({"instruction": "i", "output": "o", "history": None}, {}, [(U, "i"), (A, "o")]),
])
def test_all_that_a_conversation_has_is_read(row, mapping, want):
    assert read(row, mapping) == want


@pytest.mark.parametrize("row,mapping,error", [
    (messages({"role": "assistant", "content": None}), {}, "expected the assistant's text in content, found null"),
    (messages({"role": "assistant", "content": None, "tool_calls": []}), {}, "expected the assistant's text in content, found null"),
    (messages({"role": "assistant", "content": False}), {}, "expected text in the message's content, found bool"),
    (messages({"role": "assistant", "content": float("nan")}), {}, "expected text in the message's content, found float"),
    (messages({"role": "assistant", "content": b"x"}), {}, "expected text in the message's content, found bytes"),
    ({"conversations": [{"from": "human", "value": 5}]}, {}, "expected text in the message's value, found int"),
    ({"u": ["q"], "a": "x"}, {"role_mapping": {"user": "u", "assistant": "a"}}, "expected text in the column u, found list"),
    ({"u": "q", "a": b"x"}, {"role_mapping": {"user": "u", "assistant": "a"}}, "expected text in the column a, found bytes"),
    ({"u": "q", "a": "x"}, {"role_mapping": {"user": "u", "narrator": "a"}}, "role_mapping: unknown role narrator: expected a role among"),
    (messages({"role": "assistant", "content": "a", "tool_calls": {"id": 1}}), {}, "expected a list of calls in tool_calls, found dict"),
    (messages({"role": "system", "content": "other"}, system="s"), {}, "expected one system text, found one in the column system and another in messages"),
    (messages(system=5), {}, "expected text in the column system, found int"),
    ({"instruction": "i", "output": "o", "history": ["q1", "a1"]}, {}, "expected pairs of a question's and an answer's text in the column history"),
    ({"instruction": "i", "output": "o", "history": [["q1", None]]}, {}, "expected pairs of a question's and an answer's text in the column history"),
])
def test_what_is_no_text_is_said_with_the_sample(row, mapping, error):
    where = "^data.sources: " + ("" if "unknown role" in error else "x, sample 3: ")
    with pytest.raises(UserError, match=where + re.escape(error)):
        read(row, mapping)
