"""Differences in held-out loss between models that were measured on the same rows, with 95% intervals."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qlora_helpers import plots
from qlora_helpers.errors import UserError
from qlora_helpers.evaluation import intervals
from qlora_helpers.evaluation.intervals import Interval
from qlora_helpers.evaluation.losses import RowLoss


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: the row losses of each training seed, on the same rows. An untrained base model has a
    single entry.
    """

    name: str
    seeds: list[list[RowLoss]]
    trained: bool = True


@dataclass(frozen=True)
class Difference:
    """Loss of `b` minus loss of `a`, per trained token (nats) or per byte (bits), with its 95% interval.

    Below zero, `b` is better. `seeds` is the smaller number of training seeds of the two; an untrained model does not
    count.
    """

    a: str
    b: str
    value: float
    low: float
    high: float
    rows: int
    seeds: int
    unit: str = "token"

    @property
    def verdict(self) -> str:
        """better, worse or not distinguishable: read from the interval alone."""
        if self.high < 0:
            return "better"
        return "worse" if self.low > 0 else "not distinguishable"

    def __str__(self) -> str:
        bounds = f"{self.value:+.4f}, 95% interval {self.low:+.4f} to {self.high:+.4f}"
        joint = "from" if self.verdict == "not distinguishable" else "than"
        return f"{self.b} is {self.verdict} {joint} {self.a} ({bounds})"

    def to_dict(self) -> dict[str, Any]:
        """Plain values; an infinite end of the interval is null."""
        plain = {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in asdict(self).items()}
        return plain | {"verdict": self.verdict, "text": str(self)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Difference":
        """The difference that `to_dict` wrote."""
        known: dict[str, Any] = {field.name: plain[field.name] for field in fields(cls) if field.name in plain}
        ends = {"low": -math.inf, "high": math.inf}
        return cls(**known | {name: end for name, end in ends.items() if known[name] is None})


def difference(a: Arm, b: Arm, unit: str = "token") -> Difference:
    """Mean difference over seeds, per `unit` ("token" or "byte"), rows weighted by their number of units.

    The interval covers the choice of held-out rows, which are resampled with the losses of both models, and, where an
    arm has several seeds, the choice of seeds. With a single seed it holds for these two adapters only. Raises
    `UserError` if the two were not measured on the same rows.
    """
    interval, rows = contrast([a, b], [-1, 1], unit)
    return Difference(a.name, b.name, interval.value, interval.low, interval.high, rows, fewest_seeds([a, b]), unit)


def fewest_seeds(arms: Iterable[Arm]) -> int:
    """The smallest number of training seeds of any trained arm."""
    return min((len(arm.seeds) for arm in arms if arm.trained), default=1)


def contrast(arms: Sequence[Arm], factors: Sequence[float], unit: str = "token") -> tuple[Interval, int]:
    """Sum of the arms' losses times `factors`, and the number of rows that count.

    Factors of -1 and 1 give a difference, those of a least-squares line its slope. Rows are resampled with all their
    losses, since every arm was measured on the same rows.
    """
    first = arms[0].seeds[0]
    for arm in arms:
        if any(_keys(losses, unit) != _keys(first, unit) for losses in arm.seeds):
            raise UserError(
                f"comparison: {arms[0].name} and {arm.name} were measured on different held-out rows. Fix: run both "
                "with the same data set, data_seed, n_heldout, template and max_length."
            )
    weights = np.array([row.tokens if unit == "token" else row.bytes for row in first], dtype=float)
    if unit == "byte":  # a row that one of them truncated is another text
        for arm in arms[1:]:
            weights *= [x.bytes == y.bytes for x, y in zip(first, arm.seeds[0], strict=True)]
    counted = weights > 0
    if not counted.any():
        raise UserError("comparison: no held-out row is whole in both runs. Fix: a larger max_length.")
    scale = np.asarray(factors, dtype=float) / (1.0 if unit == "token" else math.log(2))
    sums = [
        np.array([[row.loss_sum for row in seed] for seed in arm.seeds])[:, counted] * factor
        for arm, factor in zip(arms, scale, strict=True)
    ]
    means = np.array([arm.mean(axis=0) for arm in sums])
    gap = means.sum(axis=0)
    gap[np.abs(gap) < 1e-12 * np.abs(means).sum(axis=0)] = 0  # equal losses may differ by rounding
    over_rows = intervals.ratio(gap, weights[counted])
    by_seed = (intervals.seed_error(arm.sum(axis=1) / weights[counted].sum()) for arm in sums)
    return intervals.widen(over_rows, *by_seed), int(counted.sum())


def _keys(losses: list[RowLoss], unit: str) -> list[tuple[str, int]]:
    """What must agree: the rows and, per token, their numbers of tokens."""
    return [(row.id, row.tokens if unit == "token" else 0) for row in losses]


@plots.styled
def figure(differences: Sequence[Difference]) -> Figure:
    """Each difference with its 95% interval and verdict. Left of zero is better."""
    figure, (axes,) = plots.new_figure("Did the held-out loss change?", 1.8 + 0.6 * len(differences))
    bounds = [end for d in differences for end in (d.low, d.value, d.high) if math.isfinite(end)]
    left, right = min([0.0, *bounds]), max([0.0, *bounds])
    reach = (right - left) or 1.0
    left, right = min(left - 0.05 * reach, -0.35 * reach), max(right + 0.05 * reach, 0.35 * reach)
    colors = {"better": plots.BLUE, "worse": plots.VERMILION}
    for row, d in enumerate(differences):
        color = colors.get(d.verdict, plots.GRAY)
        axes.hlines(row, max(d.low, left), min(d.high, right), color=color, linewidth=3)
        axes.plot(d.value, row, marker="o", markersize=9, color=color)
        words = d.verdict.replace("not ", "not\n")
        axes.text(1.02, row, words, transform=axes.get_yaxis_transform(), va="center", color=color)
    axes.axvline(0, color="black", linewidth=1.5)
    for x, side in ((left / 2, "← better"), (right / 2, "worse →")):
        axes.text(x, 1.02, side, transform=axes.get_xaxis_transform(), ha="center", va="bottom")
    axes.set(xlim=(left, right), ylim=(len(differences) - 0.5, -0.5), ylabel="runs compared")
    unit = "bits per byte" if any(d.unit == "byte" for d in differences) else "nats per token"
    axes.set_xlabel(f"difference in held-out loss, 95% interval\n({unit})")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_yticks(range(len(differences)), [f"{d.b}\nvs {d.a}" for d in differences])
    return figure
