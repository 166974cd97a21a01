"""A data set after cleaning: its usable and dropped rows, and those selected for a run."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from qlora_helpers.data.prompts import Example
from qlora_helpers.data.schema import VALIDATION, Row
from qlora_helpers.data.sources import Loaded
from qlora_helpers.wording import counted


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
    """A data set after cleaning and splitting. Rows read = training + held-out + selection + dropped rows.

    `train` and `heldout` are in the order of the split; a draw orders the training rows anew. `selection` are rows of
    the source's validation split, if a checkpoint is chosen on them.

    `examples` holds encoded rows by row id, so that `select` does not tokenize them again: the held-out rows and those
    that the config's own draw trains and chooses on. An encoded row takes about 145 bytes per token, too much to keep
    every row of a large data set. `encoding` holds the settings and the tokenizer they were encoded with.
    """

    loaded: Loaded
    max_length: int
    train: list[TokenizedRow] = field(default_factory=list)
    heldout: list[TokenizedRow] = field(default_factory=list)
    selection: list[TokenizedRow] = field(default_factory=list)
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
    `selection` are rows that the checkpoint is chosen on; none if nothing is chosen or too few are left. `draw` is the
    seed of the choice of training rows.
    """

    train: list[Example]
    heldout: list[Example]
    cleaned: Cleaned
    rehearsal: list[Example] = field(default_factory=list)
    rehearsal_source: str | None = None
    selection: list[Example] = field(default_factory=list)
    draw: int = 0

    @property
    def trained_on(self) -> list[Example]:
        """All rows that a run trains on, including rehearsal rows."""
        return [*self.train, *self.rehearsal]

    def selection_note(self, wanted: int) -> str:
        """Say what became of a validation split with fewer usable rows than `wanted`; empty if it has enough."""
        own, left = len(self.cleaned.selection), len(self.cleaned.train) - len(self.train)
        if own >= wanted or not any(row.split == VALIDATION for row in self.cleaned.loaded.rows):
            return ""
        few = f"The validation split has {counted(own, 'usable row')}, fewer than n_selection={wanted}"
        if self.selection:
            return f"{few}: filled up with {counted(wanted - own, 'training row')} from further on in the draw."
        smaller = f"n_selection={own} or a smaller n_samples" if own > 1 else "a smaller n_samples"
        return (
            f"{few}, and the draw leaves {counted(left, 'training row')}: it is not used, and the held-out rows "
            f"choose the checkpoint by cross-fitting. To choose on rows of their own, set {smaller}."
        )

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
        """Count rows by what happened to them. Rows read = dropped + not asked for + held-out + selection + train."""
        usable = len(self.cleaned.train) + len(self.cleaned.selection)
        return {
            "rows read": self.cleaned.rows_read,
            **{f"dropped: {reason}": n for reason, n in sorted(Counter(d["reason"] for d in self.dropped).items())},
            "usable, not asked for": usable - len(self.train) - len(self.selection),
            "held-out": len(self.heldout),
            **({"selection": len(self.selection)} if self.selection else {}),
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
            "draw": self.draw,
            "train_ids": [example.row.id for example in self.train],
            "heldout_ids": [example.row.id for example in self.heldout],
        }
        if self.selection:
            manifest["selection_ids"] = [example.row.id for example in self.selection]
        if self.rehearsal:
            ids = [example.row.id for example in self.rehearsal]
            manifest["rehearsal"] = {"source": self.rehearsal_source, "rows": len(ids), "ids": ids}
        return manifest


def fingerprint(ids: Iterable[str]) -> str:
    """Return a hash of row ids, independent of their order: 16 hex digits."""
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()[:16]
