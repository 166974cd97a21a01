"""Read the turns of a conversation from the formats in use, and put them into one form and order."""

import json
import math
import re
from collections import Counter
from numbers import Number
from typing import Any

# `role` is system, user, assistant or tool; `content` is text. A question may have an `input`, an answer `tool_calls`.
# `learn: False` marks an answer that is not trained on. The first turn of a conversation may have `tools`, as JSON.
Message = dict[str, Any]
# Half of a surrogate pair, the replacement character of a failed decoding, NUL: signs of broken text.
BROKEN = re.compile("[\ud800-\udfff\ufffd\0]")
# Bell, backspace, escape and its one-byte form, which color, move and erase text in a terminal or a notebook.
STEERING = re.compile("[\a\b\x1b\x9b]")
UNREADABLE = re.compile(f"{BROKEN.pattern}|{STEERING.pattern}")
BLANK_LINES = re.compile(r"\A\s*\n")
NO_INPUT = {"", "nan", "none", "null", "<na>", "<noinput>"}  # how tables write that a cell is empty

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatbot", "chatgpt", "model", "ai", "function_call"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "ipython"), "tool"),
}
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value", "text")
# Whether an answer is learned, as the fine-tuning services and trainers write it; `masked` means the opposite.
MARKS = ("learn", "train", "training", "trainable", "train_on_turn", "loss", "loss_mask", "weight")
MASKED = "masked"
TAKEN = {  # further keys of each role
    "user": {"input"},
    "assistant": {"tool_calls", "function_call", *MARKS, MASKED},
    "tool": {"tool_call_id", "name"},
    "system": set(),
}
FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
ALTERNATING = re.compile("s?(ua(t+a)*)+")  # initials of the roles of a conversation

MERGED = "turns of one role joined"
HEADLESS = "first turns without a question left out"
UNANSWERED = "unanswered last turn left out"
UNLEARNED = "an answer marked as not to be learned"


def text(value: Any) -> str:
    """Return a text, number or boolean as text. Raises `ValueError` for other values and for broken text."""
    if is_missing(value):
        raise ValueError("null where text should be")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Number):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{type(value).__name__} where text should be")
    if UNREADABLE.search(value):
        raise ValueError("broken encoding" if BROKEN.search(value) else "codes that steer a terminal")
    return value


def is_missing(value: Any) -> bool:
    """Return whether a value is null or not a number, which is how tables write that a cell is empty."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def optional(value: Any) -> str:
    """Return the text of an optional cell, or the empty text if it holds nothing or a word for nothing."""
    content = "" if is_missing(value) else text(value).strip()
    return "" if content.casefold() in NO_INPUT else content


def answer_text(value: Any) -> str:
    """Return the text of an answer without blank lines before it and blanks after it. Its indentation is content."""
    return BLANK_LINES.sub("", text(value)).rstrip()


def flag(value: Any) -> bool | None:
    """Return the meaning of a mark such as `weight: 0` or `train: false`, or None if it is neither true nor false."""
    return FLAGS.get(str(value).strip().lower()) if isinstance(value, bool | Number | str) else None


def read(value: Any, changes: Counter[str]) -> list[Message]:
    """Return the turns of a list in OpenAI's form (`role`, `content`) or ShareGPT's (`from`, `value`).

    `changes` counts what is not taken over. Raises `ValueError` with the reason if a turn cannot be read.
    """
    value = _from_json(value)
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise ValueError("no list of turns")
    return [_turn({key: part for key, part in turn.items() if part is not None}, changes) for turn in value]


def _turn(given: dict[str, Any], changes: Counter[str]) -> Message:
    role_key, content_key = (next((k for k in keys if k in given), keys[0]) for keys in (ROLE_KEYS, CONTENT_KEYS))
    if role_key not in given:
        raise ValueError(f"a turn without 'role' or 'from' (has: {', '.join(given) or 'nothing'}); rename its keys")
    name = text(given[role_key]).strip().lower()
    if name not in ROLES:
        raise ValueError(f"role {name[:40]!r} is not known; rename it to user, assistant, system or tool")
    role = ROLES[name]
    for key in given.keys() - {role_key, content_key} - TAKEN[role]:
        changes[f"key {key!r} of a turn not used"] = 1
    content = _parts(given.get(content_key))
    turn: Message = {"role": role}
    if role == "assistant":
        if name == "function_call":
            given, content = given | {"function_call": _from_json(content)}, ""
        turn |= _calls(given) | _mark(given)
    content = "" if content is None and ("tool_calls" in turn or role == "system") else content
    turn["content"] = answer_text(content) if role in ("assistant", "tool") else text(content).strip()
    if role == "user" and (more := optional(given.get("input"))):
        turn["input"] = more
    if role == "tool":
        turn |= {key: text(given[key]) for key in ("tool_call_id", "name") if key in given}
    return turn


def _parts(content: Any) -> Any:
    """Return the text of a list of parts, one line each; any other content unchanged."""
    if not isinstance(content, list):
        return content
    for part in content:
        if isinstance(part, dict) and not isinstance(part.get("text"), str):
            raise ValueError(f"a part of the type {str(part.get('type'))[:40]!r}, and only text is read")
    return "\n".join(text(part["text"] if isinstance(part, dict) else part) for part in content)


def _calls(given: dict[str, Any]) -> Message:
    """Return the tool calls of an answer in OpenAI's form, with arguments as objects, as chat templates take them."""
    calls = given.get("tool_calls") or []
    if "function_call" in given:
        calls = [{"type": "function", "function": given["function_call"]}]
    if not isinstance(calls, list) or not all(map(_is_call, calls)):
        raise ValueError("tool calls without the name of a function")
    parsed = [
        {**call, "function": {**call["function"], "arguments": _from_json(call["function"].get("arguments", {}))}}
        for call in calls
    ]
    text(json.dumps(parsed, ensure_ascii=False, default=str))  # raises for broken text
    return {"tool_calls": parsed} if parsed else {}


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _mark(given: dict[str, Any]) -> Message:
    marks = {key: flag(given[key]) for key in (*MARKS, MASKED) if key in given}
    for key, learned in marks.items():
        if learned is None:
            raise ValueError(f"{key} is {str(given[key])[:40]!r}, neither true nor false")
    masked = marks.pop(MASKED, False)
    return {} if all(marks.values()) and not masked else {"learn": False}


def _from_json(value: Any) -> Any:
    """Return the list or object that a text holds as JSON, as in a cell of a CSV file; any other value unchanged."""
    if not isinstance(value, str) or not value.strip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def tools(value: Any) -> str | None:
    """Return a list of tools as JSON, or None if there are none. Raises `ValueError` if it is no list of objects."""
    listed = _from_json(value)
    if is_missing(listed) or (isinstance(listed, str) and not optional(listed)):
        return None
    if not isinstance(listed, list) or not all(isinstance(tool, dict) for tool in listed):
        raise ValueError("tools is no list of functions")
    return text(json.dumps(listed, ensure_ascii=False, default=str)) if listed else None


def arrange(turns: list[Message], changes: Counter[str]) -> list[Message]:
    """Return turns that begin with a question, after an optional system turn, alternate, and end with an answer.

    `changes` counts what is joined, left out or not learned. Raises `ValueError` if no such conversation is in them.
    """
    merged = _merge([turn for turn in turns if turn["role"] != "system" or turn["content"]], changes)
    system = merged[:1] if merged and merged[0]["role"] == "system" else []
    asked = next((n for n, turn in enumerate(merged) if turn["role"] == "user"), len(merged))
    last = max((n for n, turn in enumerate(merged) if turn["role"] == "assistant"), default=-1)
    if last < 0:
        raise ValueError("no answer")
    if last < asked:
        raise ValueError("no question before an answer")
    if asked > len(system):
        changes[HEADLESS] += 1
    if last + 1 < len(merged):
        changes[UNANSWERED] += 1
    kept = [*system, *merged[asked : last + 1]]
    if not ALTERNATING.fullmatch("".join(turn["role"][0] for turn in kept)):
        raise ValueError("turns do not alternate between user and assistant")
    if not all(turn["content"].strip() or turn["role"] == "tool" or "tool_calls" in turn for turn in kept):
        raise ValueError("an empty turn")
    learned = [turn.get("learn", True) for turn in kept if turn["role"] == "assistant"]
    if not any(learned):
        raise ValueError("every answer is marked as not to be learned")
    if not all(learned):
        changes[UNLEARNED] += 1
    return kept


def _merge(turns: list[Message], changes: Counter[str]) -> list[Message]:
    """Join questions, or system turns, that follow each other, with a blank line between them."""
    merged: list[Message] = []
    for turn in turns:
        before = merged[-1] if merged else {"role": None}
        if turn["role"] != before["role"] or turn["role"] not in ("user", "system"):
            merged.append(turn)
            continue
        contents = [before["content"], before.get("input", ""), turn["content"]]
        merged[-1] = {**turn, "content": "\n\n".join(filter(None, contents))}
        changes[MERGED] = 1
    return merged
