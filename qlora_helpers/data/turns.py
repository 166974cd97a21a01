"""Parts of a turn: thought and words, calls and their arguments, question and input."""

import json
from collections.abc import Callable
from typing import Any

from qlora_helpers.data.conversation import Message


def split_thought(text: str) -> tuple[str, str]:
    """Split a generated text at the marks `<think>` and `</think>` into the thought and the words after it."""
    head, closed, rest = text.partition("</think>")
    if closed:
        return head.removeprefix("<think>").strip(), rest.strip()
    if text.startswith("<think>"):
        return text.removeprefix("<think>").strip(), ""
    return "", text


def arguments(turns: list[Message], change: Callable[[Any], Any]) -> list[Message]:
    """Return the turns with the arguments of their tool calls as an object (`json.loads`) or as text (`json.dumps`)."""
    wanted = str if change is json.loads else dict
    changed = []
    for turn in turns:
        calls = []
        for call in turn.get("tool_calls") or []:
            function = call.get("function", {})
            given = function.get("arguments")
            try:
                arguments = change(given) if isinstance(given, wanted) else given
            except ValueError:  # text that is not JSON
                arguments = given
            calls.append(call | {"function": function | {"arguments": arguments}})
        changed.append(turn | {"tool_calls": calls} if calls else turn)
    return changed


def called(turn: Message) -> list[str]:
    """Return the names of the functions that a turn calls."""
    return [str(call.get("function", call).get("name")) for call in turn.get("tool_calls") or []]


def with_input(turn: Message) -> Message:
    """Return a turn whose input, if it has one, follows its content."""
    given = {key: value for key, value in turn.items() if key != "input"}
    return given | {"content": f"{turn['content']}\n\n{turn['input']}"} if turn.get("input") else given
