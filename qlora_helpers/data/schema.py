"""Convert records to conversations: recognize their schema and give all rows the same structure."""

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from qlora_helpers.errors import UserError

# `role` is system, user, assistant or tool; `content` is text. A question may have an `input`, an answer `tool_calls`.
# `learn: False` marks an answer that is not trained on. The first turn of a conversation may have `tools`, as JSON.
Message = dict[str, Any]
# Replies can contain ### headings, so conversations are split only at these two markers.
MARKER = re.compile(r"### (Human|Assistant):")
# Markers that only a template should write: unusual in a row; in a generated answer, an invented turn.
TURN_MARKER = re.compile(
    r"### ?(Human|Assistant|Instruction|Input|Response)\b|<\|(user|im_start|start_header_id)|\[INST\]"
)
# Half of a surrogate pair, the replacement character of a failed decoding, NUL: signs of broken text.
BROKEN = re.compile("[\ud800-\udfff\ufffd\0]")
# Bell, backspace, escape and its one-byte form, which color, move and erase text in a terminal or a notebook.
STEERING = re.compile("[\a\b\x1b\x9b]")
SCHEMAS = {  # name: required columns
    "guanaco": {"text"},
    "messages": {"messages"},
    "instruction": {"instruction", "output"},
    "prompt-completion": {"prompt", "completion"},
    "question-answer": {"question", "answer"},
    "self-instruct": {"instruction", "instances"},
}
PAIRS = {  # name: columns of the question and the answer
    "instruction": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "question-answer": ("question", "answer"),
}
SYSTEM, UNANSWERED = "system turn left out", "unanswered last turn left out"


@dataclass(frozen=True, slots=True)
class Row:
    """A conversation in which user and assistant alternate, ending with the assistant.

    `origin` is the row's position in its source, such as `line 3`. `layout` is the schema it was read from. `id` is
    the first 16 hex digits of the sha256 of its turns, so rows with equal text have equal ids.
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
        """The first question and its input, casefolded and with single spaces, for comparing rows."""
        first = self.messages[0]
        return " ".join(f"{first['content']} {first.get('input', '')}".casefold().split())

    @property
    def answer(self) -> str:
        """The last answer of the conversation."""
        return self.messages[-1]["content"]

    @property
    def text(self) -> str:
        """All turns joined by newlines, for comparing whole rows."""
        return "\n".join(f"{m['content']} {m.get('input', '')}" for m in self.messages)

    @property
    def answers(self) -> tuple[Message, ...]:
        """The assistant's turns that are learned."""
        return tuple(turn for turn in self.messages if turn["role"] == "assistant" and turn.get("learn", True))

    @property
    def rounds(self) -> tuple[tuple[Message, Message], ...]:
        """Each answer with the question before it."""
        pairs, question = [], None
        for turn in self.messages:
            if turn["role"] == "user":
                question = turn
            elif turn["role"] == "assistant" and question:
                pairs.append((question, turn))
        return tuple(pairs)

    def to_record(self) -> dict[str, Any]:
        """Return a record in the row's original schema, so that a written file can be read again.

        Rows in the guanaco schema or one of `PAIRS` keep their columns; all others are written as `messages`.
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
    """Return the most common schema among the first records.

    Raises `UserError` if no record has a known schema. The message lists the columns of the first record.
    """
    counts = Counter(name for name in map(_schema_of, records) if name)
    if counts:
        return counts.most_common(1)[0][0]
    columns = set(records[0]) if records and isinstance(records[0], dict) else set()
    known = "; ".join(" + ".join(sorted(needed)) for needed in SCHEMAS.values())
    has = ", ".join(sorted(map(str, columns))) or "none"
    raise UserError(f"dataset: {source} lacks the required columns (has: {has}). Fix: rename them to one of: {known}.")


def _schema_of(record: Any) -> str | None:
    columns = set(record) if isinstance(record, dict) else set()
    return next((name for name, needed in SCHEMAS.items() if needed <= columns), None)


def to_row(record: Any, layout: str, origin: str, altered: Counter[str]) -> Row:
    """Convert a record with the schema `layout` to a row.

    Rows from which a turn is left out are counted in `altered`, by kind of turn.

    Raises `ValueError` with the reason if the record must be dropped.
    """
    missing = SCHEMAS[layout] - (set(record) if isinstance(record, dict) else set())
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
    """Split the text of an openassistant-guanaco row into turns. Raises `ValueError` if it has another format."""
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
    if turns and turns[-1]["role"] == "user":  # some OASST trees end with an unanswered question
        turns = turns[:-1]
        altered[UNANSWERED] += bool(turns)
    if not turns:
        raise ValueError("no answer")
    if [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError("turns do not alternate between user and assistant")
    if not all(turn["content"] for turn in turns):
        raise ValueError("an empty turn")
    return turns
