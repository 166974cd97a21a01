"""Clean and split a data set: drop unusable rows with a reason, then select held-out rows, then training rows.

The order of the rows depends only on their text and the data seed, not on their order in the file.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from qlora_helpers.config import Config
from qlora_helpers.data import prompts, rendering, sources
from qlora_helpers.data.leaks import HeldOut, parts
from qlora_helpers.data.near_duplicates import Index, same_text
from qlora_helpers.data.prompts import Example
from qlora_helpers.data.schema import Row
from qlora_helpers.data.sources import Loaded
from qlora_helpers.errors import UserError

NEAR_ROW = "nearly the same as another row"


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """A usable row, its length in tokens before truncation, and its number of trained tokens after truncation."""

    row: Row
    tokens: int
    trained: int


@dataclass(frozen=True, slots=True)
class NearDuplicate:
    """A dropped row, the kept row it resembles, their similarity from 0 to 1, and the reason for dropping it."""

    dropped: Row
    kept: Row
    similarity: float
    reason: str


@dataclass
class Cleaned:
    """A data set after cleaning and splitting. Rows read = training + held-out + dropped rows.

    `examples` holds encoded rows by row id, so that `select` does not tokenize them again: the held-out rows and the
    first `n_samples` training rows. An encoded row takes about 145 bytes per token, too much to keep every row of a
    large data set. `encoding` holds the settings and the tokenizer they were encoded with.
    """

    loaded: Loaded
    train: list[TokenizedRow] = field(default_factory=list)
    heldout: list[TokenizedRow] = field(default_factory=list)
    dropped: list[dict[str, Any]] = field(default_factory=list)
    near_duplicates: list[NearDuplicate] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # tokens of each tokenized row, dropped or not
    examples: dict[str, Example] = field(default_factory=dict)
    encoding: tuple[Any, ...] = ()

    @property
    def rows_read(self) -> int:
        """Number of rows in the source, including unreadable ones."""
        return len(self.loaded.rows) + len(self.loaded.rejected)

    @property
    def source_fingerprint(self) -> str:
        """Hash of the rows read, independent of their order."""
        return fingerprint(row.id for row in self.loaded.rows)

    def drop(self, row: Row, reason: str) -> None:
        """Record a dropped row with its reason."""
        self.dropped.append({"reason": reason, "origin": row.origin, "row": row.to_record()})


@dataclass(frozen=True)
class Data:
    """Encoded training rows, encoded held-out rows, which are never trained on, and the cleaned data set.

    `rehearsal` contains rows of a second data set, mixed in to reduce forgetting. They are not included in `counts`.
    """

    train: list[Example]
    heldout: list[Example]
    cleaned: Cleaned
    rehearsal: list[Example] = field(default_factory=list)
    rehearsal_source: str | None = None

    @property
    def trained_on(self) -> list[Example]:
        """All rows that a run trains on, including rehearsal rows."""
        return [*self.train, *self.rehearsal]

    @property
    def dropped(self) -> list[dict[str, Any]]:
        """Dropped rows, each with its reason."""
        return self.cleaned.dropped

    @property
    def source_fingerprint(self) -> str:
        """Hash of the rows read and of the rehearsal rows, if any, independent of their order."""
        own = self.cleaned.source_fingerprint
        return fingerprint([own, *(e.row.id for e in self.rehearsal)]) if self.rehearsal else own

    @property
    def heldout_fingerprint(self) -> str:
        """Hash of the held-out rows. Runs can be compared only if it is equal."""
        return fingerprint(example.row.id for example in self.heldout)

    def counts(self) -> dict[str, int]:
        """Count rows by what happened to them. Rows read = dropped + not asked for + held-out + train."""
        return {
            "rows read": self.cleaned.rows_read,
            **{f"dropped: {reason}": n for reason, n in sorted(Counter(d["reason"] for d in self.dropped).items())},
            "usable, not asked for": len(self.cleaned.train) - len(self.train),
            "held-out": len(self.heldout),
            "train": len(self.train),
            "train, cut at the token limit": sum(example.cut > 0 for example in self.train),
        }

    def to_manifest(self) -> dict[str, Any]:
        """Return the part of a run's manifest that describes its data."""
        manifest = {
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
            manifest["rehearsal"] = {"source": self.rehearsal_source, "rows": len(ids), "ids": ids}
        return manifest


def identity(config: Config, data: Data) -> dict[str, str]:
    """Return the hashes that identify a run: of the settings that affect its result, and of the data it read."""
    return {"config": config.identity, "data": data.source_fingerprint}


def fingerprint(ids: Iterable[str]) -> str:
    """Return a hash of row ids, independent of their order: 16 hex digits."""
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()[:16]


def prepare(config: Config, tokenizer: Any) -> Data:
    """Load, clean, split and encode the configured data set.

    Raises `UserError` if the data set cannot be read, if too few usable rows are left, or if a training prompt is also
    held out. A usable row has at least one trained token.
    """
    return select(clean(config, tokenizer), config, tokenizer)


def select(cleaned: Cleaned, config: Config, tokenizer: Any) -> Data:
    """Select the first `n_samples` training rows and the held-out rows of a cleaned data set, encoded.

    `cleaned` may come from a config with another `n_samples`, because the split does not depend on it. Raises
    `UserError` if too few usable rows are left, or if a training prompt is also held out.
    """
    check_enough(cleaned, config.n_heldout, config.n_samples or 1)
    train = _examples(cleaned, cleaned.train[: config.n_samples], config, tokenizer)
    heldout = _examples(cleaned, cleaned.heldout, config, tokenizer)
    rehearsal, source = _rehearsal(config, tokenizer, cleaned.heldout, round(config.rehearsal * len(train)))
    data = Data(train, heldout, cleaned, rehearsal, source)
    check_no_leak(data)
    return data


def check_enough(cleaned: Cleaned, n_heldout: int, n_samples: int) -> None:
    """Raise `UserError` if fewer than `n_heldout` held-out rows or `n_samples` training rows are left."""
    left, held = len(cleaned.train), len(cleaned.heldout)
    if held < n_heldout or left < n_samples:
        raise UserError(
            f"n_samples: {n_samples} rows requested for training, but {left} usable rows are left "
            f"({cleaned.rows_read} read, {len(cleaned.dropped)} dropped, {held} of {n_heldout} held out). "
            f"Fix: n_samples={max(left, 1)} or less, a smaller n_heldout, or more data."
        )


def clean(config: Config, tokenizer: Any, n_heldout: int | Callable[[int], int] | None = None) -> Cleaned:
    """Load the configured data set, drop rows that should not be trained on, and split the rest.

    `n_heldout` is the number of held-out rows, by default `config.n_heldout`. It can be a function of the number of
    usable rows; then no encoded rows are kept. Raises `UserError` if the data set cannot be read.
    """
    cleaned = Cleaned(sources.load(config), encoding=_encoding(config, tokenizer))
    cleaned.dropped.extend(cleaned.loaded.rejected)
    rows = list(_readable(cleaned, config, rendering.control_marks(config, tokenizer)))
    rows.sort(key=lambda row: (_digest(f"{config.data_seed}\n{row.prompt}"), row.id))
    usable = _fitting(cleaned, _distinct(cleaned, rows, config), config, tokenizer)
    if callable(n_heldout):
        counted = [(item, None) for item, _ in usable]
        _split(cleaned, counted, config, n_heldout(len(counted)))
    else:
        _split(cleaned, usable, config, config.n_heldout if n_heldout is None else n_heldout)
    return cleaned


def _encoding(config: Config, tokenizer: Any) -> tuple[Any, ...]:
    """Return everything that `prompts.encode` depends on besides the row."""
    return config.template, config.system, config.train_on, config.max_length, tokenizer


def _readable(cleaned: Cleaned, config: Config, marks: re.Pattern[str]) -> Iterator[Row]:
    """Yield the rows that pass the checks of their text and contain no control markers.

    An answer equal to that of the previous row in the file is an error, such as an answer shifted by a line. If less
    than half of the answers are distinct, they are class labels, which may repeat.
    """
    rows = cleaned.loaded.rows
    are_labels = 2 * len({row.answer for row in rows}) < len(rows)
    seen: set[str] = set()
    previous = ""
    for row in rows:
        reason = _text_reason(row, config, None if are_labels else previous)
        previous = row.answer
        if reason is None and (mark := marks.search(row.text)):
            reason = f"a turn holds {mark.group()!r}, which only the template may write"
        if reason is None and row.id in seen:
            reason = "same row twice"
        if reason:
            cleaned.drop(row, reason)
            continue
        seen.add(row.id)
        yield row


def _text_reason(row: Row, config: Config, previous: str | None) -> str | None:
    if len(row.text.strip()) < config.min_chars:
        return f"too short: under {config.min_chars} characters"
    if len(row.text) > config.max_chars:
        return f"too long: over {config.max_chars} characters"
    if any(_same(q["content"], a["content"]) for q, a in zip(row.messages[::2], row.messages[1::2], strict=True)):
        return "answer equal to its prompt"
    return "answer equal to that of the row before" if row.answer == previous else None


def _same(a: str, b: str) -> bool:
    return a.casefold().split() == b.casefold().split()


def _fitting(
    cleaned: Cleaned, rows: Iterable[Row], config: Config, tokenizer: Any
) -> Iterator[tuple[TokenizedRow, Example]]:
    """Tokenize the rows and yield those with a trained token within the token limit."""
    for example in prompts.encode(rows, config, tokenizer):
        tokens = len(example.input_ids) + example.cut
        cleaned.lengths.append(tokens)
        if example.cut and config.over_length == "drop":
            cleaned.drop(example.row, f"over {config.max_length} tokens")
        elif example.problem:
            cleaned.drop(example.row, example.problem)
        elif not example.trained:
            cleaned.drop(example.row, f"no trained token within {config.max_length} tokens")
        else:
            yield TokenizedRow(example.row, tokens, example.trained), example


def _distinct(cleaned: Cleaned, rows: Iterable[Row], config: Config) -> Iterator[Row]:
    """Yield one row of each group of near duplicates: the first in the order of the split."""
    index = Index(config.near_duplicates, same_text)
    kept: list[Row] = []
    for row in rows:
        match = index.first_similar(parts(row))
        if match is None:
            kept.append(row)
            yield row
        else:
            cleaned.drop(row, NEAR_ROW)
            cleaned.near_duplicates.append(NearDuplicate(row, kept[match[0]], match[1], NEAR_ROW))


def _split(
    cleaned: Cleaned, usable: Iterable[tuple[TokenizedRow, Example | None]], config: Config, n_heldout: int
) -> None:
    """Hold out the first `n_heldout` rows, then use every row that is no leak (see `leaks`) for training.

    Held-out rows are also unlike each other, so that they are independent. `usable` may be an iterator, so that rows
    are tokenized while they are split and unused encodings are released.
    """
    held = HeldOut(cleaned.loaded.rows, config.near_duplicates)
    leaks: list[NearDuplicate] = []
    for item, example in usable:
        full = len(cleaned.heldout) == n_heldout
        leak = held.leak(item.row)
        if leak is not None:
            leaks.append(NearDuplicate(item.row, leak.heldout, leak.similarity, leak.reason))
            continue
        if example and not (full and config.n_samples and len(cleaned.train) >= config.n_samples):
            cleaned.examples[item.row.id] = example
        if not full:
            held.add(item.row)
        (cleaned.train if full else cleaned.heldout).append(item)
    for leaked in leaks:
        cleaned.drop(leaked.dropped, leaked.reason)
    cleaned.near_duplicates.extend(leaks)


def _rehearsal(
    config: Config, tokenizer: Any, heldout: list[TokenizedRow], wanted: int
) -> tuple[list[Example], str | None]:
    """Return `wanted` rows of the rehearsal data set, and its name.

    They are the first ones in the order of the data seed whose prompts are unlike every held-out prompt. Raises
    `UserError` if there are too few.
    """
    if not wanted:
        return [], None
    second = config.replace(dataset=config.rehearsal_dataset, n_samples=wanted, rehearsal=0.0, over_length="truncate")
    cleaned = clean(second, tokenizer, n_heldout=0)
    index = Index(config.near_duplicates)
    for item in heldout:
        index.first_similar(item.row.prompt)
    rows = [item for item in cleaned.train if index.first_similar(item.row.prompt, add=False) is None]
    if len(rows) < wanted:
        raise UserError(
            f"rehearsal: {wanted} rows requested, but {config.rehearsal_dataset} has {len(rows)} usable ones. "
            "Fix: a smaller rehearsal, or a larger rehearsal_dataset."
        )
    return _examples(cleaned, rows[:wanted], second, tokenizer), cleaned.loaded.name


def _examples(cleaned: Cleaned, items: list[TokenizedRow], config: Config, tokenizer: Any) -> list[Example]:
    """Return the encoded rows. Tokenizes only rows that `cleaned` does not already hold in this encoding."""
    known = cleaned.examples if cleaned.encoding == _encoding(config, tokenizer) else {}
    missing = [item.row for item in items if item.row.id not in known]
    known.update((example.row.id, example) for example in prompts.encode(missing, config, tokenizer))
    return [known[item.row.id] for item in items]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def check_no_leak(data: Data) -> None:
    """Raise `UserError` if a held-out prompt is also trained on, which would make the held-out loss meaningless."""
    trained = {example.row.prompt for example in data.trained_on}
    both = [example.row for example in data.heldout if example.row.prompt in trained]
    if both:
        raise UserError(
            f"held-out set: {len(both)} of its rows are also trained on (first: {both[0].origin}). "
            "Fix: remove them from the data set."
        )
