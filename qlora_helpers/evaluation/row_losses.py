"""Losses of held-out rows as runs store them, and the names of the models that they are of. Needs no torch."""

from dataclasses import asdict, dataclass
from typing import Any

from qlora_helpers import files
from qlora_helpers.errors import UserError
from qlora_helpers.runs import RunFolder

BASE = "base"
IN_16_BITS = f"{BASE}, 16 bits"
OWN_TEMPLATE = {name: f"{name}, own template" for name in (BASE, IN_16_BITS)}


@dataclass(frozen=True, slots=True)
class RowLoss:
    """Loss of one row, summed over its scored tokens in float32 (nats).

    `bytes` is the length of its answers in UTF-8; 0 for a truncated row, since tokenizers truncate at different places.
    Rows of one `group`, such as a document, depend on each other; a row without one is independent.
    """

    id: str
    loss_sum: float
    tokens: int
    bytes: int
    group: str = ""


def mean_loss(losses: list[RowLoss]) -> float:
    """Mean per scored token: long rows count more, as in training."""
    return sum(row.loss_sum for row in losses) / sum(row.tokens for row in losses)


def to_rows(losses: list[RowLoss]) -> list[dict[str, Any]]:
    """Plain values, as written to `heldout_losses.jsonl`."""
    return [asdict(loss) for loss in losses]


def read_losses(run: RunFolder, name: str = "heldout_losses.jsonl") -> list[RowLoss]:
    """Losses per row of a run or of a base model, as `to_rows` wrote them."""
    path = run / name
    if not path.exists():
        raise UserError(f"run folder: {run.path} has no {name}. Fix: run its notebook to the end.")
    return [RowLoss(**row) for row in files.read_jsonl(path)]
