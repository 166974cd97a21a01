"""Convert records to conversations: recognize what their columns hold and give all rows the same structure."""

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from typing import Any

from qlora_helpers.data import cells, conversation
from qlora_helpers.data.conversation import Message
from qlora_helpers.errors import UserError, nearest

# Replies can contain ### headings, so conversations are split only at these two markers.
MARKER = re.compile(r"### (Human|Assistant):")
# Markers that only a template should write: unusual in a row; in a generated answer, an invented turn.
TURN_MARKER = re.compile(
    r"### ?(Human|Assistant|Instruction|Input|Response)\b|<\|(user|im_start|start_header_id)|\[INST\]"
)
TEST, VALIDATION = "test", "validation"  # splits with a meaning

# Names of columns by what they hold, the preferred ones first. Upper and lower case are the same.
MESSAGES = ("messages", "conversations", "conversation")
QUESTIONS = ("instruction", "question", "prompt", "query", "problem", "input")
ANSWERS = ("output", "completion", "answer", "response", "chosen", "solution")
FURTHER = {
    "input": ("input", "context"),
    "system": ("system", "system_prompt"),
    "tools": ("tools",),
    "tests": ("tests", "test"),
    "label": ("label",),
}
USES = ("question", "answer", "input", "system", "messages", "tools", "tests")  # what the setting `columns` can name
PAIRS = {  # name: columns of the question and the answer; pairs that are usual come before other combinations
    "instruction": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "question-answer": ("question", "answer"),
} | {f"{question}-{answer}": (question, answer) for question, answer in product(QUESTIONS, ANSWERS)}
SCHEMAS: dict[str, dict[str, str]] = {  # name: column of each use
    **{name: {"messages": name} for name in MESSAGES},
    **{name: {"question": question, "answer": answer} for name, (question, answer) in PAIRS.items()},
    "self-instruct": {"question": "instruction", "instances": "instances"},
    "chosen": {"messages": "chosen"},
    "guanaco": {"text": "text"},
}
SINGLE_ROUND = (["user", "assistant"], ["system", "user", "assistant"])
Given = tuple[tuple[str, str], ...]  # columns that the user named: (use, column)


@dataclass(frozen=True, slots=True)
class Row:
    """A conversation that begins with a question, after an optional system turn, and ends with an answer.

    `origin` is the row's position in its source, such as `line 3`. `layout` is the schema it was read from. `split` is
    `test` or `validation` if the source says so. Rows of one `group`, such as a document, depend on each other. `tests`
    is code that an answer's code has to pass. `id` is the first 16 hex digits of the sha256 of its turns, so rows with
    equal text have equal ids.
    """

    messages: tuple[Message, ...]
    origin: str
    layout: str = "messages"
    split: str = ""
    group: str = ""
    tests: str = ""
    id: str = field(init=False)

    def __post_init__(self) -> None:
        turns = json.dumps([sorted(m.items()) for m in self.messages], ensure_ascii=False, default=str)
        object.__setattr__(self, "id", hashlib.sha256(turns.encode()).hexdigest()[:16])

    @property
    def question(self) -> Message:
        """The first question."""
        return next(turn for turn in self.messages if turn["role"] == "user")

    @property
    def prompt(self) -> str:
        """The first question and its input, casefolded and with single spaces, for comparing rows."""
        return " ".join(f"{self.question['content']} {self.question.get('input', '')}".casefold().split())

    @property
    def answer(self) -> str:
        """The last answer of the conversation."""
        return _with_calls(self.messages[-1])

    @property
    def opening(self) -> tuple[str, str]:
        """The first question and the answer to it, with its tool calls."""
        question, answer = self.rounds[0]
        return question["content"], _with_calls(answer)

    @property
    def text(self) -> str:
        """All turns joined by newlines, for comparing whole rows."""
        return "\n".join(f"{_with_calls(m)} {m.get('input', '')}" for m in self.messages)

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

        Rows with one question and one answer keep the columns of these, and guanaco rows keep theirs. All others are
        written as `messages`. The group and the tests are columns of their own.
        """
        further = {"group": self.group, "tests": self.tests}
        return self._turns_record() | {name: text for name, text in further.items() if text}

    def _turns_record(self) -> dict[str, Any]:
        roles = [turn["role"] for turn in self.messages]
        plain = all(turn.keys() <= {"role", "content", "input"} for turn in self.messages)
        if self.layout == "guanaco" and plain and not {"system", "tool"} & set(roles):
            names = {"user": "### Human:", "assistant": "### Assistant:"}
            return {"text": "".join(f"{names[m['role']]} {m['content']}" for m in self.messages)}
        if self.layout not in PAIRS or not plain or roles not in SINGLE_ROUND:
            return _messages_record(self.messages)
        *system, first, last = self.messages
        question, answer = PAIRS[self.layout]
        given = {"system": system[0]["content"]} if system else {}
        if "input" in first or self.layout == "instruction":
            given |= {"context" if question == "input" else "input": first.get("input", "")}
        return {question: first["content"], **given, answer: last["content"]}


def _with_calls(turn: Message) -> str:
    calls = turn.get("tool_calls")
    return f"{turn['content']} {json.dumps(calls, ensure_ascii=False, default=str)}" if calls else turn["content"]


def _messages_record(messages: tuple[Message, ...]) -> dict[str, Any]:
    tools = messages[0].get("tools")
    turns = [{key: value for key, value in turn.items() if key != "tools"} for turn in messages]
    return {"messages": turns, "tools": tools} if tools else {"messages": turns}


def parse_columns(setting: str | None) -> Given:
    """Return the columns named in the setting `columns`, such as `question=Title,answer=Body`.

    Raises `UserError` if it has another form or names an unknown use.
    """
    pairs = [part.partition("=") for part in setting.split(",")] if setting else []
    for use, _, column in pairs:
        if use.strip() not in USES:
            raise UserError(f"columns: {use.strip()!r} is not what a column can be.{nearest(use.strip(), USES)}")
        if not column.strip():
            raise UserError(f"columns: no column is named for {use.strip()}. Fix: columns=question=NAME,answer=NAME.")
    return tuple((use.strip(), column.strip()) for use, _, column in pairs)


def recognize(records: list[Any], source: str, given: Given = ()) -> str:
    """Return the most common schema among the first records. `given` are columns that the user named.

    Raises `UserError` if no record has a known schema, a named column, or a question and an answer in its text.
    """
    tables = [tuple(record) for record in records if isinstance(record, dict)]
    has = ", ".join(sorted(map(str, tables[0]))) if tables else ""
    for _, column in given:
        if not any(fold(column) in map(fold, names) for names in tables):
            raise UserError(
                f"columns: {source} has no column {column!r} (has: {has or 'none'}). Fix: name one of these."
            )
    counts = Counter(name for name in (_schema_of(names, given) for names in tables) if name)
    if not counts:
        raise UserError(
            f"dataset: {source} lacks the required columns (has: {has or 'none'}). Fix: name them as in "
            "columns=question=NAME,answer=NAME, or rename them: messages; or a question "
            f"({', '.join(QUESTIONS)}) and an answer ({', '.join(ANSWERS)})."
        )
    layout = counts.most_common(1)[0][0]
    texts = [record[name] for record in records if isinstance(record, dict) for name in record if fold(name) == "text"]
    if layout == "guanaco" and not any(isinstance(text, str) and MARKER.search(text) for text in texts):
        raise UserError(
            f"dataset: {source} has a column of plain text, in which no question and answer are marked. Fix: write "
            "them into two columns, question and answer, or mark them with '### Human:' and '### Assistant:'."
        )
    return layout


def names_of(records: list[Any]) -> tuple[str, ...]:
    """Return the names of the records' columns, in order."""
    tables = [record for record in records if isinstance(record, dict)]
    return tuple(dict.fromkeys(name for record in tables for name in record if _is_named(name)))


def describe_columns(records: list[Any], layout: str, given: Given = (), group_by: str | None = None) -> str:
    """Return what each column of the records is taken for, and the names of those that are not used."""
    tables = [record for record in records if isinstance(record, dict)]
    names = names_of(records)
    used = columns_of(names, layout, given)
    unread = {"label": lambda value: _label(value) is None, "tests": lambda value: not cells.tests(value)}
    for use, says_nothing in unread.items():
        if use in used and all(says_nothing(record.get(used[use])) for record in tables):
            del used[use]
    if group := next((name for name in names if group_by and fold(name) == fold(group_by)), None):
        used["group"] = group
    listed = ", ".join(f"{column} = {'conversation' if use == 'text' else use}" for use, column in used.items())
    unused = [name for name in names if name not in used.values()]
    return f"{listed}; not used: {', '.join(unused)}" if unused else listed


def _is_named(name: Any) -> bool:
    """Return whether a column has a name of its own, unlike the index that pandas writes."""
    return isinstance(name, str) and bool(name.strip()) and not name.startswith(("Unnamed: ", "__index_level_"))


def fold(name: Any) -> str:
    """Return a column's name for comparison: upper and lower case are the same."""
    return str(name).strip().casefold()


def _schema_of(names: tuple[Any, ...], given: Given) -> str | None:
    """Return the first schema whose columns are there. A column that the user named replaces others for its use."""
    present = set(map(fold, names))
    uses = {use for use, column in given if fold(column) in present}
    present -= {fold(column) for _, column in given}
    if uses & {"question", "answer"}:
        present -= {*MESSAGES, "chosen", "text"}
    present -= set(QUESTIONS) - {"input"} if "question" in uses else set()
    present -= set(ANSWERS) if "answer" in uses else set()
    return next((name for name, needed in SCHEMAS.items() if {*needed.values()} <= present | uses), None)


def columns_of(names: tuple[Any, ...], layout: str, given: Given = ()) -> dict[str, Any]:
    """Return the column of each use in a schema, among those with `names`. Uses without a column are left out."""
    return dict(_columns_of(names, layout, given))


@lru_cache(maxsize=1024)
def _columns_of(names: tuple[Any, ...], layout: str, given: Given) -> dict[str, Any]:
    here = {fold(name): name for name in reversed(names)}
    named = {use: here[fold(column)] for use, column in given if fold(column) in here}
    found = {use: named.get(use, here.get(column)) for use, column in SCHEMAS[layout].items()}
    for use, choices in FURTHER.items():
        if use == "input" and "answer" not in found:
            continue
        taken = {*found.values(), *named.values()}
        free = (here[name] for name in choices if name in here and here[name] not in taken)
        found[use] = named.get(use, next(free, None))
    return {use: column for use, column in found.items() if column is not None}


def to_row(record: Any, layout: str, origin: str, altered: Counter[str], given: Given = ()) -> Row:
    """Convert a record with the schema `layout` to a row. `given` are columns that the user named.

    Rows from which something is left out, joined or not learned are counted in `altered`, by kind of change.

    Raises `ValueError` with the reason if the record must be dropped.
    """
    columns = columns_of(tuple(record), layout, given) if isinstance(record, dict) else {}
    missing = [dict(given).get(use, column) for use, column in SCHEMAS[layout].items() if use not in columns]
    if missing:
        raise ValueError(f"no column {', '.join(sorted(missing))}")
    if None in record:
        raise ValueError("more cells than columns")
    held = {use: record[column] for use, column in columns.items()}
    if _label(held.get("label")) is False:
        raise ValueError("label is false: the answer is not to be learned")
    changes: Counter[str] = Counter()
    turns = parse_guanaco(conversation.text(held["text"])) if "text" in held else cells.turns(held, layout, changes)
    if turns and turns[0]["role"] != "system" and (system := conversation.optional(held.get("system"))):
        turns = [{"role": "system", "content": system}, *turns]
    turns = conversation.arrange(turns, changes)
    if tools := conversation.tools(held.get("tools")):
        turns = [turns[0] | {"tools": tools}, *turns[1:]]
    row = Row(tuple(turns), origin, layout, tests=cells.tests(held.get("tests")))
    if changes:
        altered.update(+changes)
    return row


def _label(value: Any) -> bool | None:
    """Return whether an answer is desirable, as preference data sets mark it. Numbers are classes and say nothing."""
    return conversation.flag(value) if isinstance(value, bool) or str(value).lower() in ("true", "false") else None


def parse_guanaco(text: str) -> list[Message]:
    """Split the text of an openassistant-guanaco row into turns. Raises `ValueError` if it has another format."""
    parts = MARKER.split(text)
    if parts[0].strip() or len(parts) < 3:
        raise ValueError("does not start with '### Human:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[r], "content": c.strip()} for r, c in zip(parts[1::2], parts[2::2], strict=True)]
