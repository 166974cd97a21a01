"""Read what a record's cells hold: the turns of a question and its answer, and the tests of an answer's code."""

from collections import Counter
from typing import Any

from qlora_helpers.data import conversation
from qlora_helpers.data.conversation import Message


def tests(value: Any) -> str:
    """Return tests that are a text, or the lines of a list of texts. Anything else is not code, and ignored."""
    lines = value if isinstance(value, list) else [value]
    if not all(isinstance(line, str) for line in lines):
        return ""
    code = "\n".join(lines).strip()
    return "" if code.casefold() in conversation.NO_INPUT or conversation.BROKEN.search(code) else code


def turns(cells: dict[str, Any], layout: str, changes: Counter[str]) -> list[Message]:
    """Return the turns that the cells hold, by their use. `changes` counts what is not taken over.

    Raises `ValueError` with the reason if they hold none.
    """
    if "messages" in cells:
        return conversation.read(cells["messages"], changes)
    if "instances" in cells:
        cells |= _first_instance(cells["instances"])
    if layout == "prompt-completion" and isinstance(cells["question"], str) and isinstance(cells["answer"], str):
        return _completion(cells)
    question, answer = cells["question"], cells["answer"]
    if _is_turns(question):
        asked = conversation.read(question, changes)
    else:
        asked = [_question(conversation.text(question).strip(), cells)]
    if not _is_turns(answer):
        return [*asked, {"role": "assistant", "content": conversation.answer_text(answer)}]
    answered = conversation.read(answer, changes)
    # In preference data sets, answers can be whole conversations.
    return answered if any(turn["role"] == "user" for turn in answered) else [*asked, *answered]


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def _question(content: str, cells: dict[str, Any]) -> Message:
    more = conversation.optional(cells.get("input"))
    return {"role": "user", "content": content} | ({"input": more} if more else {})


def _completion(cells: dict[str, Any]) -> list[Message]:
    """Return a prompt and its completion without changing the joined text, except for blanks at the end.

    Blank lines that begin the completion are moved to the prompt.
    """
    prompt, completion = conversation.text(cells["question"]), conversation.text(cells["answer"])
    answer = conversation.answer_text(completion)
    blank = completion[: len(completion.rstrip()) - len(answer)]
    return [_question(prompt + blank, cells), {"role": "assistant", "content": answer}]


def _first_instance(instances: Any) -> dict[str, Any]:
    if not isinstance(instances, list) or not instances or not isinstance(instances[0], dict):
        raise ValueError("instances is no list of inputs and outputs")
    return {"input": instances[0].get("input"), "answer": instances[0].get("output")}
