"""What is dropped and why, and the split: held-out rows first, then training rows, in an order made of words alone."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from qlora_helpers.config import Config
from qlora_helpers.data import prompts, sources
from qlora_helpers.data.near_duplicates import Index
from qlora_helpers.data.prompts import Example
from qlora_helpers.data.schema import Row
from qlora_helpers.data.sources import Loaded
from qlora_helpers.errors import UserError

NEAR_ROW, NEAR_PROMPT = "nearly the same as another row", "prompt nearly the same as a held-out one"


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """A usable row with its length in tokens before any cut, and how many of them are trained after it."""

    row: Row
    tokens: int
    trained: int


@dataclass(frozen=True, slots=True)
class NearDuplicate:
    """A row that was dropped, the one it resembles, their similarity, and what of them is similar."""

    dropped: Row
    kept: Row
    similarity: float
    reason: str


@dataclass
class Cleaned:
    """A source after cleaning and splitting: read = train + held-out + dropped, always."""

    loaded: Loaded
    train: list[TokenizedRow] = field(default_factory=list)
    heldout: list[TokenizedRow] = field(default_factory=list)
    dropped: list[dict[str, Any]] = field(default_factory=list)
    twins: list[NearDuplicate] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # tokens of every row that was tokenized, dropped later or not

    @property
    def rows_read(self) -> int:
        """Rows of the source, readable or not."""
        return len(self.loaded.rows) + len(self.loaded.rejected)

    @property
    def source_fingerprint(self) -> str:
        """Hash of what was read, in any order."""
        return fingerprint(row.id for row in self.loaded.rows)

    def drop(self, row: Row, reason: str) -> None:
        """Keep the row with its reason among the dropped ones."""
        self.dropped.append({"reason": reason, "origin": row.origin, "row": row.to_record()})


@dataclass(frozen=True)
class Data:
    """Rows ready for training, rows that are never trained on, and what was dropped with its reason.

    `rehearsal` are rows of a second source, mixed in against forgetting; they are no part of the data's own counts.
    """

    train: list[Example]
    heldout: list[Example]
    cleaned: Cleaned
    rehearsal: list[Example] = field(default_factory=list)
    rehearsal_source: str | None = None

    @property
    def trained_on(self) -> list[Example]:
        """Everything a run trains on."""
        return [*self.train, *self.rehearsal]

    @property
    def dropped(self) -> list[dict[str, Any]]:
        """Rows that are not used, each with its reason."""
        return self.cleaned.dropped

    @property
    def source_fingerprint(self) -> str:
        """Hash of what was read, in any order; with what was mixed in, if anything was."""
        own = self.cleaned.source_fingerprint
        return fingerprint([own, *(e.row.id for e in self.rehearsal)]) if self.rehearsal else own

    @property
    def heldout_fingerprint(self) -> str:
        """Runs may be compared only if this is equal."""
        return fingerprint(example.row.id for example in self.heldout)

    def counts(self) -> dict[str, int]:
        """Rows in each place; read = dropped + unused + held-out + train."""
        return {
            "rows read": self.cleaned.rows_read,
            **{f"dropped: {reason}": n for reason, n in sorted(Counter(d["reason"] for d in self.dropped).items())},
            "usable, not asked for": len(self.cleaned.train) - len(self.train),
            "held-out": len(self.heldout),
            "train": len(self.train),
            "train, cut at the token limit": sum(example.cut > 0 for example in self.train),
        }

    def to_manifest(self) -> dict[str, Any]:
        """The part of the run's manifest that says which rows it saw."""
        own = {
            "source": self.cleaned.loaded.name,
            "source_fingerprint": self.source_fingerprint,
            "heldout_fingerprint": self.heldout_fingerprint,
            "layout": self.cleaned.loaded.layout,
            "counts": self.counts(),
            "train_ids": [example.row.id for example in self.train],
            "heldout_ids": [example.row.id for example in self.heldout],
        }
        if self.rehearsal:
            ids = [example.row.id for example in self.rehearsal]
            own["rehearsal"] = {"source": self.rehearsal_source, "rows": len(ids), "ids": ids}
        return own


def identity(config: Config, data: Data) -> dict[str, str]:
    """What makes two runs the same run: the config's deciding values, and the words it was trained and measured on."""
    return {"config": config.identity, "data": data.source_fingerprint}


def fingerprint(ids: Iterable[str]) -> str:
    """Hash of a set of row ids: their order does not matter."""
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()[:16]


def prepare(config: Config, tokenizer: Any) -> Data:
    """Load, clean, split and encode the config's data set.

    Raises `UserError` if too few usable rows are left. A row is usable if it has at least one trained token.
    """
    return select(clean(config, tokenizer), config, tokenizer)


def select(cleaned: Cleaned, config: Config, tokenizer: Any) -> Data:
    """The config's part of a source that is cleaned already: cleaning does not depend on `n_samples`."""
    check_enough(cleaned, config.n_heldout, config.n_samples or 1)
    train = _encode(cleaned.train[: config.n_samples], config, tokenizer)
    heldout = _encode(cleaned.heldout, config, tokenizer)
    rehearsal, source = _rehearsal(config, tokenizer, cleaned.heldout, round(config.rehearsal * len(train)))
    data = Data(train, heldout, cleaned, rehearsal, source)
    check_no_leak(data)
    return data


def check_enough(cleaned: Cleaned, n_heldout: int, n_samples: int) -> None:
    """Raise `UserError` if fewer rows are left than are asked for."""
    left, held = len(cleaned.train), len(cleaned.heldout)
    if held < n_heldout or left < n_samples:
        raise UserError(
            f"n_samples: {n_samples} asked for, but {left} usable rows are left to train on ("
            f"{cleaned.rows_read} read, {len(cleaned.dropped)} dropped, {held} of {n_heldout} held out). "
            f"Fix: n_samples={max(left, 1)} or fewer, a smaller n_heldout, or more data."
        )


def clean(config: Config, tokenizer: Any, n_heldout: Callable[[int], int] | None = None) -> Cleaned:
    """Load the config's data set, drop what should not be trained on, and split the rest.

    `n_heldout` may choose the number of held-out rows from the number of usable ones; else it is the config's.
    """
    cleaned = Cleaned(sources.load(config))
    cleaned.dropped.extend(cleaned.loaded.rejected)
    rows = list(_readable(cleaned, config, prompts.control_marks(config, tokenizer)))
    rows.sort(key=lambda row: (_digest(f"{config.data_seed}\n{row.prompt}"), row.id))
    usable = list(_fitting(cleaned, _distinct(cleaned, rows, config), config, tokenizer))
    _split(cleaned, usable, config, n_heldout(len(usable)) if n_heldout else config.n_heldout)
    return cleaned


def _readable(cleaned: Cleaned, config: Config, marks: re.Pattern[str]) -> Iterator[Row]:
    """Rows whose words make sense on their own, and stay inside their turns. The row before is looked at in the order
    of the file: an answer that slipped a line is a fault of that order. Where answers are few, as labels are, they
    repeat by intent.
    """
    rows = cleaned.loaded.rows
    labels = 2 * len({row.answer for row in rows}) < len(rows)
    seen: set[str] = set()
    before = ""
    for row in rows:
        reason = _text_reason(row, config, None if labels else before)
        before = row.answer
        if reason is None and marks.search(row.text):
            reason = "a turn holds a mark that only the template may write"
        if reason is None and row.id in seen:
            reason = "same row twice"
        if reason:
            cleaned.drop(row, reason)
            continue
        seen.add(row.id)
        yield row


def _text_reason(row: Row, config: Config, before: str | None) -> str | None:
    if len(row.text.strip()) < config.min_chars:
        return f"too short: under {config.min_chars} characters"
    if len(row.text) > config.max_chars:
        return f"too long: over {config.max_chars} characters"
    if any(_same(q["content"], a["content"]) for q, a in zip(row.messages[::2], row.messages[1::2], strict=True)):
        return "answer equal to its prompt"
    return "answer equal to that of the row before" if row.answer == before else None


def _same(a: str, b: str) -> bool:
    return a.casefold().split() == b.casefold().split()


def _fitting(cleaned: Cleaned, rows: Iterable[Row], config: Config, tokenizer: Any) -> Iterator[TokenizedRow]:
    """Rows that have something to teach within the token limit."""
    for example in prompts.encode(rows, config, tokenizer):
        tokens = len(example.input_ids) + example.cut
        cleaned.lengths.append(tokens)
        if example.cut and config.over_length == "drop":
            cleaned.drop(example.row, f"over {config.max_length} tokens")
        elif example.straddling:
            cleaned.drop(example.row, "an answer shares a token with its question")
        elif not example.trained:
            cleaned.drop(example.row, f"no trained token within {config.max_length} tokens")
        else:
            yield TokenizedRow(example.row, tokens, example.trained)


def _distinct(cleaned: Cleaned, rows: Iterable[Row], config: Config) -> Iterator[Row]:
    """One row of each group that is nearly the same: the first in the order of the split."""
    index = Index(config.near_duplicates)
    kept: list[Row] = []
    for row in rows:
        twin = index.first_like(row.text)
        if twin is None:
            kept.append(row)
            yield row
        else:
            cleaned.drop(row, NEAR_ROW)
            cleaned.twins.append(NearDuplicate(row, kept[twin[0]], twin[1], NEAR_ROW))


def _split(cleaned: Cleaned, usable: list[TokenizedRow], config: Config, n_heldout: int) -> None:
    """Held-out rows first; then every row whose prompt is not nearly that of a held-out one is for training.

    A held-out prompt is also unlike every other, so that held-out rows are independent of each other.
    """
    index = Index(config.near_duplicates)
    for item in usable:
        full = len(cleaned.heldout) == n_heldout
        twin = index.first_like(item.row.prompt, add=not full)
        if twin is not None:
            cleaned.drop(item.row, NEAR_PROMPT)
            cleaned.twins.append(NearDuplicate(item.row, cleaned.heldout[twin[0]].row, twin[1], NEAR_PROMPT))
        else:
            (cleaned.train if full else cleaned.heldout).append(item)


def _rehearsal(
    config: Config, tokenizer: Any, heldout: list[TokenizedRow], wanted: int
) -> tuple[list[Example], str | None]:
    """The first `wanted` rows of the second source, in the order of the data seed, unlike every held-out prompt."""
    if not wanted:
        return [], None
    second = config.replace(dataset=config.rehearsal_dataset, rehearsal=0.0, over_length="truncate")
    cleaned = clean(second, tokenizer, n_heldout=lambda usable: 0)
    index = Index(config.near_duplicates)
    for item in heldout:
        index.first_like(item.row.prompt)
    rows = [item for item in cleaned.train if index.first_like(item.row.prompt, add=False) is None]
    if len(rows) < wanted:
        raise UserError(
            f"rehearsal: {wanted} rows asked for, but {config.rehearsal_dataset} has {len(rows)} usable ones. "
            "Fix: a smaller rehearsal, or a larger rehearsal_dataset."
        )
    return _encode(rows[:wanted], second, tokenizer), cleaned.loaded.name


def _encode(items: list[TokenizedRow], config: Config, tokenizer: Any) -> list[Example]:
    return list(prompts.encode([item.row for item in items], config, tokenizer))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def check_no_leak(data: Data) -> None:
    """Raise `UserError` if a held-out prompt is trained on: a held-out loss would then prove nothing."""
    trained = {example.row.prompt for example in data.trained_on}
    both = [example.row for example in data.heldout if example.row.prompt in trained]
    if both:
        raise UserError(
            f"held-out set: {len(both)} of its rows are also trained on (first: {both[0].origin}). "
            "Fix: remove them from the data set."
        )
