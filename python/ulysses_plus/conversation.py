"""Reads one row of a data set as a conversation: its turns in their true order.

A turn is (role, text), or (role, text, {key: value}) where its message has other keys (name, tool_call_id, tool_calls,
reasoning_content, ...): they reach the chat template as they are. A null, an empty list and an empty mapping count as no key.
"""

import json

from ulysses_plus.chat import CALLS
from ulysses_plus.errors import UserError

DEFAULT_ROLES = {"user": "user", "assistant": "assistant"}
CONTENT_KEYS = ("content", "text", "message", "value")
# Names that chat collections use for the same four roles.
ROLES = {
    "system": "system", "developer": "developer", "tool": "tool", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant", "observation": "tool",
}
# Columns of sets with one question and one answer a row: prompt and completion, Alpaca. `input` adds to the question, `system` precedes it;
# Alpaca's `history`, pairs of a question and an answer, stands between the two, and its answers are answers like others.
COLUMN_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("instruction", "response"))
# Well-known sets: the columns or list items that hold each role's text.
KNOWN_ROLES = {
    "nvidia/AceMath-Instruct-Training-Data": {"user": "messages.role.user", "assistant": "messages.role.assistant"},
    "HuggingFaceH4/ultrachat_200k": {"user": "messages.role.user", "assistant": "messages.role.assistant"},
    "Open-Orca/OpenOrca": {"system": "system_prompt", "user": "question", "assistant": "response"},
    "THUDM/LongAlign-10k": {"user": "messages.role.user", "assistant": "messages.role.assistant"},
    "Yukang/LongAlpaca-12k": {"user": "instruction", "assistant": "output"},
    "Open-Orca/SlimOrca": {
        "system": "conversations.from.system", "user": "conversations.from.human", "assistant": "conversations.from.gpt",
    },
    "meta-math/MetaMathQA": {"user": "query", "assistant": "response"},
    "ise-uiuc/Magicoder-OSS-Instruct-75K": {"user": "problem", "assistant": "solution"},
    "lmsys/lmsys-chat-1m": {"user": "conversation.role.user", "assistant": "conversation.role.assistant"},
}


def make_reader(mapping, columns, name, where):
    """Returns f(row, sample) -> turns for a source.

    mapping   the source's mapping: role_mapping and content_key decide; else known sets, then the columns `messages`
              or `conversations`, then a pair of COLUMN_PAIRS, then the columns `user` and `assistant`. A column `system`
              is the first turn of `messages` and `conversations` that have none of their own
    columns   the column names found
    Raises UserError here for a mapping that the columns do not bear, and in f for a sample that does not fit; both
    name the source, f also the sample.
    """
    kind = mapping.get("type") or "huggingface_instruct"
    if kind not in ("huggingface_instruct", "huggingface", "huggingface_causal"):
        raise UserError(f"{where}: type {kind}: expected huggingface_instruct for chats")
    roles = mapping.get("role_mapping")
    if not roles or roles == DEFAULT_ROLES:
        roles = KNOWN_ROLES.get(name)
    content_key = mapping.get("content_key")
    if roles is None:
        column = next((c for c in ("messages", "conversations", "conversation") if c in columns), None)
        if column is not None:
            return lambda row, sample: _from_list(row, column, content_key, f"{where}: {name}, sample {sample}")
        if pair := next((wanted for wanted in COLUMN_PAIRS if set(wanted) <= set(columns) and not {"user", "assistant"} <= set(columns)), None):
            asked, answered = pair
            return lambda row, sample: _from_pair(row, asked, answered, content_key, f"{where}: {name}, sample {sample}")
        roles = DEFAULT_ROLES
    steps = _steps(roles, columns, name, where)
    return lambda row, sample: _from_mapping(row, steps, content_key, f"{where}: {name}, sample {sample}")


def tools_of(row, at):
    """The functions that a row's column `tools` describes: a list of dicts or the JSON text of one; None without."""
    return _list_of_mappings(row.get("tools"), "a list of descriptions in the column tools", "in the column tools", at)


def _list_of_mappings(value, expected, place, at):
    """Returns the list without nulls; None for nothing."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UserError(f"{at}: expected JSON {place}, found {error}: correct the sample") from error
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UserError(f"{at}: expected {expected}, found {type(value).__name__}: correct the sample")
    return _without_nulls(value)


def _without_nulls(value):
    """Columns of a table give every description the keys of all."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _steps(roles, columns, name, where):
    """Groups a role mapping by column, in its own order: [(column, None, role)] for a column of texts,
    [(column, field, {value: role})] for a column of lists."""
    steps = []
    for role, path in roles.items():
        if role not in ROLES.values():
            raise UserError(f"{where}: role_mapping: unknown role {role}: expected a role among system, user, assistant and tool")
        parts = str(path).split(".")
        if len(parts) not in (1, 3) and str(path) not in columns:
            raise UserError(f"{where}: role_mapping: {role}: expected 'column' or 'column.field.value', found {path}")
        column = str(path) if str(path) in columns else parts[0]
        if column not in columns:
            raise UserError(
                f"{where}: {name}: expected the column {column} for the role {role}, found the columns "
                f"{', '.join(columns) or 'none'}: set role_mapping in the source"
            )
        if column == str(path):
            steps.append((column, None, role))
            continue
        found = next((s for s in steps if s[0] == column and s[1] == parts[1]), None)
        if found is None:
            found = (column, parts[1], {})
            steps.append(found)
        found[2][parts[2]] = role
    return steps


def _from_mapping(row, steps, content_key, at):
    turns = []
    for column, field, role in steps:
        if column not in row:
            raise UserError(f"{at}: expected the column {column}, found {', '.join(row)}: correct the sample")
        value = row[column]
        if field is None:
            _check_text(role, value, column, at)
            turns.append((role, value or ""))
            continue
        for item in _items(value, column, at):
            if str(item.get(field)) in role:
                turns.append(_turn(role[str(item.get(field))], item, content_key, at, field))
    return _kept(turns, at)


def _from_pair(row, asked, answered, content_key, at):
    """One question and one answer; either may be a list of messages, as in conversational prompt/completion sets."""
    turns = []
    for column, role in (("system", "system"), (asked, "user"), (answered, "assistant")):
        value = row.get(column)
        if column not in row and column != "system":
            raise UserError(f"{at}: expected the column {column}, found {', '.join(row)}: correct the sample")
        if isinstance(value, list):
            turns += _turns(value, column, content_key, at)
            continue
        _check_text(role, value, column, at)
        more = row.get("input") if column == "instruction" else None
        _check_text("user", more, "input", at)
        if column == "instruction":
            turns += _history(row.get("history"), at)
        turns.append((role, "\n\n".join(part for part in (value, more) if part)))
    return _kept(turns, at)


def _history(value, at):
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in value):
        raise UserError(f"{at}: expected pairs of a question's and an answer's text in the column history, found others: correct the sample")
    return [turn for asked, answered in value for turn in (("user", asked), ("assistant", answered))]


def _check_text(role, value, column, at):
    """Raises UserError for a column's value that is no text; null is nothing said, but no answer."""
    if role == "assistant" and value is None:
        raise UserError(f'{at}: expected the answer in the column {column}, found null: an empty answer is "", else remove the sample')
    if value is not None and not isinstance(value, str):
        raise UserError(f"{at}: expected text in the column {column}, found {type(value).__name__}: correct the sample")


def _from_list(row, column, content_key, at):
    if column not in row:
        raise UserError(f"{at}: expected the column {column}, found {', '.join(row)}: correct the sample")
    turns, system = _turns(row[column], column, content_key, at), row.get("system")
    _check_text("system", system, "system", at)
    if system and system.strip():
        own = [turn[1] for turn in turns if turn[0] == "system" and turn[1].strip()]
        if own and own[0] != system:
            raise UserError(f"{at}: expected one system text, found one in the column system and another in {column}: remove one, or set role_mapping in the source")
        turns = turns if own else [("system", system), *turns]
    return _kept(turns, at)


def _turns(value, column, content_key, at):
    turns = []
    for item in _items(value, column, at):
        given = item.get("role", item.get("from"))
        role = ROLES.get(str(given).lower())
        if role is None:
            raise UserError(
                f"{at}: expected a role among system, user, assistant and tool, found "
                f"{'none' if given is None else given}: set role_mapping in the source"
            )
        turns.append(_turn(role, item, content_key, at))
    return turns


def _items(value, column, at):
    if value is None:
        return []
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        value = [dict(zip(value, items)) for items in zip(*value.values())]
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, dict) for item in value):
        raise UserError(f"{at}: expected a list of messages in {column}, found {type(value).__name__}: correct the sample")
    return value


def _turn(role, item, content_key, at, role_key="role"):
    """One message as a turn."""
    if len(item) == 2 and role_key in item and isinstance(item.get("content"), str) and content_key is None:
        return role, item["content"]
    known = {role_key, "role", "from", content_key, *CONTENT_KEYS}
    more = {key: _without_nulls(value) for key, value in item.items() if key not in known and value is not None and not (isinstance(value, (list, dict)) and not value)}
    if "tool_calls" in more:
        more["tool_calls"] = _list_of_mappings(more["tool_calls"], "a list of calls in tool_calls", "in tool_calls", at)
        if not more["tool_calls"]:
            del more["tool_calls"]
    calls = role == "assistant" and any(key in more for key in CALLS)
    content = _content(role, item, content_key, calls, at)
    return (role, content, more) if more else (role, content)


def _content(role, item, content_key, calls, at):
    """The text of one message; texts given in parts ({"type": "text", "text": ...}) are joined. Null is nothing said, but no answer unless
    the message has calls."""
    keys = CONTENT_KEYS if content_key is None else (content_key,)
    present = [key for key in keys if key in item]
    if not present and calls:
        return ""
    if not present and content_key is not None:
        raise UserError(f"{at}: content_key {content_key}: expected one of the message's keys, found {', '.join(item)}")
    if not present:
        raise UserError(f"{at}: expected a message's text in one of {', '.join(keys)}, found the keys {', '.join(item)}: set content_key in the source")
    key = next((key for key in present if item[key] is not None), present[0])
    value = item[key]
    if value is None and (calls or role != "assistant"):
        return ""
    if value is None:
        raise UserError(f'{at}: expected the assistant\'s text in {key}, found null: an empty answer is "", else remove the sample')
    if isinstance(value, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
            raise UserError(f"{at}: expected a message made of text, found parts of another kind: text is all that is trained")
        return "".join(part["text"] for part in value)
    if isinstance(value, dict):
        raise UserError(f"{at}: expected a message made of text, found a mapping of {', '.join(value)}: set content_key or correct the sample")
    if not isinstance(value, str):
        raise UserError(f"{at}: expected text in the message's {key}, found {type(value).__name__}: correct the sample")
    return value


def _kept(turns, at):
    """Drops system turns without text; an empty conversation is an error. An empty answer is one: what ends it is learnt."""
    if not any(text.strip() or (more and any(key in more[0] for key in CALLS)) for _, text, *more in turns):
        raise UserError(f"{at}: expected a conversation, found no message with text: remove the sample or set role_mapping")
    return [turn for turn in turns if turn[0] != "system" or turn[1].strip()]
