"""Records of whatever layout to conversations: one row shape for everything that comes after, told apart by looking."""

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from qlora_helpers.errors import UserError

Message = dict[str, str]
# Replies hold ### headings of their own, so only the two markers split a conversation.
MARKER = re.compile(r"### (Human|Assistant):")
# What only a template should write: in a row it is odd, in an answer it is an invented turn.
TURN_MARKER = re.compile(
    r"### ?(Human|Assistant|Instruction|Input|Response)\b|<\|(user|im_start|start_header_id)|\[INST\]"
)
# Half of a surrogate pair, the mark of a failed decoding, NUL: no such text was meant.
BROKEN = re.compile("[\ud800-\udfff\ufffd\0]")
# Bell, backspace, escape and its one-byte form: they color, move and erase what a terminal or a notebook shows.
STEERING = re.compile("[\a\b\x1b\x9b]")
LAYOUTS = {
    "guanaco": {"text"},
    "messages": {"messages"},
    "instruction": {"instruction", "output"},
    "prompt-completion": {"prompt", "completion"},
    "question-answer": {"question", "answer"},
    "self-instruct": {"instruction", "instances"},
}
PAIRS = {
    "instruction": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "question-answer": ("question", "answer"),
}
SYSTEM, UNANSWERED = "system turn left out", "unanswered last turn left out"


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation: user and assistant in turn, ending with the assistant.

    `id` is the first 16 hex digits of the sha256 of its turns: equal words, equal id.
    """

    messages: tuple[Message, ...]
    origin: str
    layout: str = "messages"
    id: str = field(init=False)

    def __post_init__(self) -> None:
        turns = json.dumps([sorted(m.items()) for m in self.messages], ensure_ascii=False)
        object.__setattr__(self, "id", hashlib.sha256(turns.encode()).hexdigest()[:16])

    @property
    def prompt(self) -> str:
        """The first question with its input, as compared between rows: case and spacing do not count."""
        first = self.messages[0]
        return " ".join(f"{first['content']} {first.get('input', '')}".casefold().split())

    @property
    def answer(self) -> str:
        """The last answer."""
        return self.messages[-1]["content"]

    @property
    def text(self) -> str:
        """All turns, for comparing whole rows."""
        return "\n".join(f"{m['content']} {m.get('input', '')}" for m in self.messages)

    def to_record(self) -> dict[str, Any]:
        """The row in the layout it came in, so that what is written can be read again. Rows of one question and one
        answer keep their columns; everything else is `messages`.
        """
        if self.layout == "guanaco":
            names = {"user": "### Human:", "assistant": "### Assistant:"}
            return {"text": "".join(f"{names[m['role']]} {m['content']}" for m in self.messages)}
        if self.layout not in PAIRS:
            return {"messages": list(self.messages)}
        first, last = self.messages
        question, answer = PAIRS[self.layout]
        given = {"input": first.get("input", "")} if self.layout == "instruction" else {}
        return {question: first["content"], **given, answer: last["content"]}


def recognize(records: list[Any], source: str) -> str:
    """The layout that most of the first records have. Raises `UserError` if none has any, naming their columns."""
    found = Counter(layout for layout in map(_layout_of, records) if layout)
    if found:
        return found.most_common(1)[0][0]
    columns = set(records[0]) if records and isinstance(records[0], dict) else set()
    known = "; ".join(" + ".join(sorted(needed)) for needed in LAYOUTS.values())
    has = ", ".join(sorted(map(str, columns))) or "none"
    raise UserError(f"dataset: {source} lacks the needed columns (has: {has}). Fix: name them one of: {known}.")


def _layout_of(record: Any) -> str | None:
    columns = set(record) if isinstance(record, dict) else set()
    return next((layout for layout, needed in LAYOUTS.items() if needed <= columns), None)


def to_row(record: Any, layout: str, origin: str, altered: Counter[str]) -> Row:
    """One record as a row; what had to be left out of it is counted in `altered`.

    Raises `ValueError` with the reason for dropping it.
    """
    missing = LAYOUTS[layout] - (set(record) if isinstance(record, dict) else set())
    if missing:
        raise ValueError(f"no column {', '.join(sorted(missing))}")
    if layout == "guanaco":
        turns = parse_guanaco(_text(record["text"]))
    elif layout == "messages":
        turns = _messages(record["messages"], altered)
    elif layout == "self-instruct":
        turns = _first_instance(record)
    else:
        turns = _pair(record, *PAIRS[layout])
    return Row(tuple(_check_turns(turns, altered)), origin, layout)


def parse_guanaco(text: str) -> list[Message]:
    """Turns of one openassistant-guanaco row. Raises `ValueError` with the reason if it is not one."""
    parts = MARKER.split(text)
    if parts[0].strip() or len(parts) < 3:
        raise ValueError("does not start with '### Human:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[r], "content": c.strip()} for r, c in zip(parts[1::2], parts[2::2], strict=True)]


def _pair(record: Any, question: str, answer: str) -> list[Message]:
    turns = [{"role": "user", "content": _text(record[question]).strip()}]
    if record.get("input"):
        turns[0]["input"] = _text(record["input"]).strip()
    return [*turns, {"role": "assistant", "content": _text(record[answer]).strip()}]


def _first_instance(record: Any) -> list[Message]:
    instances = record["instances"]
    if not isinstance(instances, list) or not instances or not isinstance(instances[0], dict):
        raise ValueError("instances is no list of inputs and outputs")
    first = instances[0]
    return _pair({**first, "instruction": record["instruction"], "output": first.get("output")}, *PAIRS["instruction"])


def _messages(messages: Any, altered: Counter[str]) -> list[Message]:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError("messages is no list of turns")
    turns = []
    for message in messages:
        turn = {"role": _text(message.get("role")), "content": _text(message.get("content")).strip()}
        if message.get("input"):
            turn["input"] = _text(message["input"]).strip()
        turns.append(turn)
    kept = [turn for turn in turns if turn["role"] != "system"]
    altered[SYSTEM] += len(kept) < len(turns)
    return kept


def _text(value: Any) -> str:
    if value is None:
        raise ValueError("null where text should be")
    if not isinstance(value, str):
        raise ValueError(f"{type(value).__name__} where text should be")
    if BROKEN.search(value):
        raise ValueError("broken encoding")
    if STEERING.search(value):
        raise ValueError("codes that steer a terminal")
    return value


def _check_turns(turns: list[Message], altered: Counter[str]) -> list[Message]:
    if turns and turns[-1]["role"] == "user":  # OASST trees end on unanswered questions now and then
        turns = turns[:-1]
        altered[UNANSWERED] += bool(turns)
    if not turns:
        raise ValueError("no answer")
    if [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError("turns do not alternate between user and assistant")
    if not all(turn["content"] for turn in turns):
        raise ValueError("an empty turn")
    return turns
