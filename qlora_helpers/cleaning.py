"""What is dropped and why, and the split: held-out rows first, then training rows, in an order made of words alone."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

from qlora_helpers import sources, templates
from qlora_helpers.config import Config
from qlora_helpers.errors import UserError
from qlora_helpers.sources import Row
from qlora_helpers.templates import Example


@dataclass(frozen=True)
class Data:
    """Rows ready for training, rows that are never trained on, and what was dropped with its reason."""

    train: list[Example]
    heldout: list[Example]
    dropped: list[dict[str, str]]
    layout: str
    rows_read: int
    source_fingerprint: str

    @property
    def heldout_fingerprint(self) -> str:
        """Runs may be compared only if this is equal."""
        return fingerprint(example.row.id for example in self.heldout)

    def counts(self) -> dict[str, int]:
        """Rows in each place; read = dropped + unused + held-out + train."""
        used = len(self.train) + len(self.heldout)
        return {
            "rows read": self.rows_read,
            **{f"dropped: {reason}": n for reason, n in sorted(Counter(d["reason"] for d in self.dropped).items())},
            "usable, not asked for": self.rows_read - len(self.dropped) - used,
            "held-out": len(self.heldout),
            "train": len(self.train),
            "train, cut at the token limit": sum(example.cut > 0 for example in self.train),
        }

    def to_manifest(self) -> dict[str, Any]:
        """The part of the run's manifest that says which rows it saw."""
        return {
            "source_fingerprint": self.source_fingerprint,
            "heldout_fingerprint": self.heldout_fingerprint,
            "layout": self.layout,
            "counts": self.counts(),
            "train_ids": [example.row.id for example in self.train],
            "heldout_ids": [example.row.id for example in self.heldout],
        }


def fingerprint(ids: Any) -> str:
    """Hash of a set of row ids: their order does not matter."""
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()[:16]


def prepare(config: Config, tokenizer: Any) -> Data:
    """Load, clean, order, encode and split the config's data set.

    Raises `UserError` if too few usable rows are left. A row is usable if it has at least one trained token.
    """
    loaded = sources.load(config)
    rows, dropped = _one_per_prompt(loaded.rows, config.data_seed)
    dropped = [*loaded.rejected, *dropped]
    usable = []
    for example in templates.encode(rows, config, tokenizer):
        if example.cut and config.over_length == "drop":
            dropped.append(_drop(example.row, f"over {config.max_length} tokens"))
        elif not example.trained:
            dropped.append(_drop(example.row, f"no trained token within {config.max_length} tokens"))
        else:
            usable.append(example)
    rows_read = len(loaded.rows) + len(loaded.rejected)
    _check_enough(config, len(usable), rows_read, len(dropped))
    heldout, rest = usable[: config.n_heldout], usable[config.n_heldout :]
    data = Data(
        rest[: config.n_samples], heldout, dropped, loaded.layout, rows_read, fingerprint(r.id for r in loaded.rows)
    )
    check_no_leak(data)
    return data


def _one_per_prompt(rows: list[Row], data_seed: int) -> tuple[list[Row], list[dict[str, str]]]:
    """Order rows by a hash of seed and prompt, and keep one row of each prompt: the same words in any file order.

    Two answers to one question would otherwise lie on both sides of the split.
    """
    keyed = sorted(rows, key=lambda row: (_digest(f"{data_seed}\n{row.prompt}"), row.id))
    kept: dict[str, Row] = {}
    dropped = []
    for row in keyed:
        first = kept.setdefault(row.prompt, row)
        if first is not row:
            dropped.append(_drop(row, "same row twice" if first.id == row.id else "same prompt as another row"))
    return list(kept.values()), dropped


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _drop(row: Row, reason: str) -> dict[str, str]:
    return {"origin": row.origin, "reason": reason, "prompt": row.messages[0]["content"]}


def _check_enough(config: Config, usable: int, read: int, dropped: int) -> None:
    left = usable - config.n_heldout
    if left < (config.n_samples or 1):
        raise UserError(
            f"n_samples: {config.n_samples or 1} asked for, but {max(left, 0)} usable rows are left to train on "
            f"({read} read, {dropped} dropped, {config.n_heldout} held out). Mend: n_samples={max(left, 1)} or fewer, "
            "a smaller n_heldout, or more data."
        )


def check_no_leak(data: Data) -> None:
    """Raise `UserError` if a held-out prompt is trained on: a held-out loss would then prove nothing."""
    trained = {example.row.prompt for example in data.train}
    both = [example.row for example in data.heldout if example.row.prompt in trained]
    if both:
        raise UserError(
            f"held-out set: {len(both)} of its rows are also trained on (first: {both[0].origin}). "
            "Mend: remove them from the data set."
        )
