"""Rows from a hub id, a file or the sample data; whatever their layout, conversations come out."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_helpers import hub
from qlora_helpers.config import SAMPLE_DATA, Config
from qlora_helpers.errors import UserError
from qlora_helpers.runs import ROOT

Message = dict[str, str]
# Replies hold ### headings of their own, so only the two markers split a conversation.
MARKER = re.compile(r"### (Human|Assistant):")
LAYOUTS = {
    "guanaco": {"text"},
    "messages": {"messages"},
    "instruction": {"instruction", "output"},
    "prompt-completion": {"prompt", "completion"},
}


@dataclass(frozen=True)
class Row:
    """One conversation: user and assistant in turn, ending with the assistant. Its id is a hash of its words."""

    messages: tuple[Message, ...]
    origin: str

    @property
    def id(self) -> str:
        """First 16 hex digits of the sha256 of the turns."""
        turns = json.dumps([sorted(m.items()) for m in self.messages], ensure_ascii=False)
        return hashlib.sha256(turns.encode()).hexdigest()[:16]

    @property
    def prompt(self) -> str:
        """The first question with its input, as compared between rows: case and spacing do not count."""
        first = self.messages[0]
        return " ".join(f"{first['content']} {first.get('input', '')}".casefold().split())


@dataclass(frozen=True)
class Loaded:
    """What a source gave: rows in order, the rejected ones with their reason, and the layout that was recognised."""

    rows: list[Row]
    rejected: list[dict[str, str]]
    layout: str


def load(config: Config) -> Loaded:
    """Read the config's data set. Raises `UserError` for a source that cannot be read as rows."""
    if config.dataset is None:
        raise UserError(
            f"dataset: the preset {config.preset_name} has none of its own. Mend: pass dataset=FILE or a hub id."
        )
    if config.dataset == SAMPLE_DATA:
        path = sample_data()
    elif _is_path(config.dataset):
        path = Path(config.dataset).expanduser()
    else:
        return _parse(_from_hub(config.dataset, config.dataset_revision), config.dataset)
    return _parse(_from_file(path), str(path))


def sample_data() -> Path:
    """The project's own conversations: in the checkout, else in the installed package."""
    checkout = ROOT / "data" / "conversations.jsonl"
    return checkout if checkout.exists() else Path(__file__).parent / "_data" / "conversations.jsonl"


def parse_guanaco(text: str) -> list[Message]:
    """Turns of one openassistant-guanaco row. Raises `ValueError` with the reason if it is not one."""
    parts = MARKER.split(text)
    if parts[0].strip() or len(parts) < 3:
        raise ValueError("does not start with '### Human:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[r], "content": c.strip()} for r, c in zip(parts[1::2], parts[2::2], strict=True)]


def _is_path(dataset: str) -> bool:
    path = Path(dataset).expanduser()
    return path.exists() or path.suffix in (".jsonl", ".json") or dataset.count("/") != 1


def _from_hub(name: str, revision: str) -> Iterator[tuple[str, Any]]:
    import datasets

    if not hub.reachable():
        datasets.config.HF_HUB_OFFLINE = True  # the cache, or an error at once
    try:
        rows = datasets.load_dataset(name, revision=revision, split="train")
    except Exception as error:  # datasets raises many kinds: no network, no such id, no such revision, gated
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"dataset: '{name}' at {revision} cannot be had from the hub ({why}). "
            "Mend: check the name and the connection, or pass dataset=FILE."
        ) from None
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _from_file(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise UserError(f"dataset: there is no file {path}. Mend: check the path.")
    if path.suffix not in (".jsonl", ".json"):
        raise UserError(f"dataset: {path} is neither .jsonl nor .json. Mend: convert it to one of these.")
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"dataset: {path} is not UTF-8 on line {line}. Mend: save it as UTF-8.") from None
    if not content.strip():
        raise UserError(f"dataset: {path} is empty. Mend: give a file with one JSON object a line.")
    if path.suffix == ".json":
        rows = _json(content, path, 1)
        if not isinstance(rows, list):
            raise UserError(f"dataset: {path} holds no list of rows. Mend: make it [{{…}}, {{…}}].")
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
        return
    for number, text in enumerate(content.split("\n"), 1):
        if text.strip():
            yield f"line {number}", _json(text, path, number)


def _json(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        why = getattr(error, "msg", "nested too deeply")
        raise UserError(f"dataset: {path} is no valid JSON on line {line} ({why}). Mend: repair the line.") from None


def _parse(records: Iterator[tuple[str, Any]], source: str) -> Loaded:
    rows: list[Row] = []
    rejected: list[dict[str, str]] = []
    layout = None
    for origin, record in records:
        layout = layout or _recognise(record, source)
        try:
            rows.append(Row(tuple(_turns(record, layout)), origin))
        except ValueError as error:
            rejected.append({"origin": origin, "reason": str(error)})
    if layout is None:
        raise UserError(f"dataset: {source} has no rows. Mend: give a file with one JSON object a line.")
    return Loaded(rows, rejected, layout)


def _recognise(record: Any, source: str) -> str:
    columns = set(record) if isinstance(record, dict) else set()
    for layout, needed in LAYOUTS.items():
        if needed <= columns:
            return layout
    known = "; ".join(" + ".join(sorted(needed)) for needed in LAYOUTS.values())
    has = ", ".join(sorted(map(str, columns))) or "none"
    raise UserError(f"dataset: {source} lacks the needed columns (has: {has}). Mend: name them one of: {known}.")


def _turns(record: Any, layout: str) -> list[Message]:
    """The row's messages, checked. Raises `ValueError` with the reason for dropping it."""
    missing = LAYOUTS[layout] - (set(record) if isinstance(record, dict) else set())
    if missing:
        raise ValueError(f"no column {', '.join(sorted(missing))}")
    if layout == "guanaco":
        turns = parse_guanaco(_text(record["text"]))
    elif layout == "messages":
        turns = _check_messages(record["messages"])
    else:
        question, answer = ("prompt", "completion") if layout == "prompt-completion" else ("instruction", "output")
        turns = [{"role": "user", "content": _text(record[question]).strip()}]
        if layout == "instruction" and record.get("input"):
            turns[0]["input"] = _text(record["input"]).strip()
        turns.append({"role": "assistant", "content": _text(record[answer]).strip()})
    return _check_turns(turns)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{type(value).__name__} where text should be")
    if any("\ud800" <= char <= "\udfff" for char in value):  # half of a pair: no encoder takes it
        raise ValueError("broken encoding")
    return value


def _check_messages(messages: Any) -> list[Message]:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError("messages is no list of turns")
    turns = [{"role": _text(m.get("role")), "content": _text(m.get("content")).strip()} for m in messages]
    return [turn for turn in turns if turn["role"] != "system"]


def _check_turns(turns: list[Message]) -> list[Message]:
    if turns and turns[-1]["role"] == "user":  # OASST trees end on unanswered questions now and then
        turns = turns[:-1]
    if not turns:
        raise ValueError("no answer")
    if [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError("turns do not alternate between user and assistant")
    if not all(turn["content"] for turn in turns):
        raise ValueError("an empty turn")
    return turns
