"""Differences in held-out loss between models that were measured on the same rows, with 95% intervals."""

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qlora_helpers import plots
from qlora_helpers.errors import UserError
from qlora_helpers.evaluation import intervals
from qlora_helpers.evaluation.intervals import Estimate, Interval
from qlora_helpers.evaluation.row_losses import RowLoss
from qlora_helpers.quoting import markdown

SAME, UNSURE = "the same", "not distinguishable"


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: the row losses of each training seed, on the same rows. An untrained base model has a
    single entry.

    `labels` name what the seeds of an arm differ in: their draw of training rows, or, if all share one draw, the seed.
    By default they are numbered. Seeds of one label depend on each other, so their mean counts as one. Arms with the
    same labels are compared label by label.
    """

    name: str
    seeds: list[list[RowLoss]]
    trained: bool = True
    labels: tuple[Hashable, ...] = ()

    @property
    def pairing(self) -> tuple[Hashable, ...]:
        """The different labels, in an order that does not depend on that of the seeds."""
        return tuple(sorted(set(self.labels), key=repr)) or tuple(range(len(self.seeds)))

    def sums(self) -> np.ndarray:
        """Losses of the rows, each the mean of the seeds of a label: shape (labels, rows)."""
        sums = np.array([[row.loss_sum for row in seed] for seed in self.seeds])
        labels = self.labels or self.pairing
        return np.array([sums[[own == label for own in labels]].mean(axis=0) for label in self.pairing])


@dataclass(frozen=True)
class Difference:
    """Loss of `b` minus loss of `a`, per scored token (nats) or per byte (bits), with its 95% interval.

    Below zero, `b` is better. `rows` and `tokens` are what it was measured on, `clusters` the number of independent
    groups of rows. `seeds` is the smaller number of training seeds of the two; an untrained model does not count.
    `family` is the number of verdicts whose intervals hold at once with 95% confidence. `detectable` is the smallest
    effect that has an 80% chance to be detected. Effects within `margin` do not matter in practice.
    """

    a: str
    b: str
    value: float
    low: float
    high: float
    rows: int
    seeds: int
    unit: str = "token"
    tokens: int = 0
    clusters: int = 0
    family: int = 1
    detectable: float = 0.0
    margin: float | None = None

    @property
    def verdict(self) -> str:
        """better, worse, the same (inside the margin) or not distinguishable: read from the interval alone."""
        if self.margin and -self.margin < self.low and self.high < self.margin:
            return SAME
        if self.high < 0:
            return "better"
        return "worse" if self.low > 0 else UNSURE

    @property
    def bounds(self) -> str:
        """The value in nats, or in bits per byte, with its interval."""
        low, high = ("no end" if math.isinf(end) else f"{end:+.4f}" for end in (self.low, self.high))
        unit = "nats" if self.unit == "token" else "bits per byte"
        return f"{self.value:+.4f} {unit}, 95% interval {low} to {high}"

    @property
    def limit(self) -> str:
        """What could have been detected, or nothing if the verdict is clear."""
        if self.verdict != UNSURE or not self.detectable:
            return ""
        if math.isinf(self.detectable):
            return "no effect would be detected with so few rows"
        return f"an effect of {self.detectable:.4f} would be detected in 80% of such comparisons"

    @property
    def claim(self) -> str:
        """The verdict in words, without its size."""
        joint = {UNSURE: "from", SAME: f"within ±{self.margin} as"}.get(self.verdict, "than")
        return f"{_quoted(self.b)} is {self.verdict} {joint} {_quoted(self.a)}"

    def __str__(self) -> str:
        size = f"; {math.expm1(self.value):+z.1%} perplexity" if self.unit == "token" else ""
        limit = f"; {self.limit}" if self.limit else ""
        return f"{self.claim} ({self.bounds}{size}{limit})"

    def to_dict(self) -> dict[str, Any]:
        """Plain values; a number that is not finite is null."""
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in vars(self).items()}
        return plain | {"verdict": self.verdict, "text": str(self)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Difference":
        """The difference that `to_dict` wrote."""
        known: dict[str, Any] = {field.name: plain[field.name] for field in fields(cls) if field.name in plain}
        ends = {"low": -math.inf, "high": math.inf, "detectable": math.inf}
        return cls(**known | {name: end for name, end in ends.items() if known.get(name, 0) is None})


def difference(a: Arm, b: Arm, unit: str = "token", margin: float | None = None) -> Difference:
    """The difference between two arms, which forms a family of its own: see `family`."""
    (((one,)),) = family([[(a, b)]], unit, margin)
    return one


def family(
    pairs: Sequence[Sequence[tuple[Arm, Arm]]], unit: str = "token", margin: float | None = None
) -> list[list[Difference]]:
    """Differences whose intervals all hold at once with 95% confidence. The pairs of a list are of the same rows.

    Each is the mean over seeds, per `unit` ("token" or "byte"), rows weighted by their number of units. The interval
    covers the choice of held-out rows, or of the groups they belong to, which are resampled with the losses of both
    models, and, where an arm has several seeds, the choice of seeds and of the training rows that are drawn by them.
    With a single seed it holds for these two adapters only.

    Raises `UserError` if two arms of a list were not measured on the same rows.
    """
    made = [[contrast([a, b], [-1, 1], unit) for a, b in group] for group in pairs]
    joint = intervals.simultaneous([[one.estimate for one in group] for group in made])
    size = sum(map(len, pairs))
    return [
        [
            Difference(
                a.name, b.name, interval.value, interval.low, interval.high, one.rows, fewest_seeds([a, b]), unit,
                one.tokens, len(one.estimate.above), size, interval.detectable, margin,
            )
            for (a, b), one, interval in zip(group, contrasts, found, strict=True)
        ]
        for group, contrasts, found in zip(pairs, made, joint, strict=True)
    ]  # fmt: skip


def fewest_seeds(arms: Iterable[Arm]) -> int:
    """The smallest number of training seeds of any trained arm."""
    return min((len(arm.pairing) for arm in arms if arm.trained), default=1)


@dataclass(frozen=True)
class Contrast:
    """A weighted sum of losses, and the numbers of rows and tokens that count in it."""

    estimate: Estimate
    rows: int
    tokens: int

    @property
    def interval(self) -> Interval:
        """Its 95% interval, not simultaneous with any other."""
        ((interval,),) = intervals.simultaneous([[self.estimate]])
        return interval


def contrast(arms: Sequence[Arm], factors: Sequence[float], unit: str = "token") -> Contrast:
    """Sum of the arms' losses times `factors`.

    Factors of -1 and 1 give a difference, those of a least-squares line its slope. Rows are resampled with all their
    losses, since every arm was measured on the same rows. A row counts with the tokens of the last arm, also if other
    templates of other arms split its answers into other tokens, as long as the answers are whole. Raises `UserError`
    if the arms were not measured on the same rows.
    """
    reference = arms[-1].seeds[0]
    weights = np.array([row.tokens if unit == "token" else row.bytes for row in reference], dtype=float)
    for arm in arms:
        for losses in arm.seeds:
            weights *= _comparable(losses, reference, unit, (arm.name, arms[-1].name))
    counted = weights > 0
    if not counted.any():
        raise UserError("comparison: no held-out row is whole in both runs. Fix: a larger max_length.")
    clusters = _clusters([row for row, counts in zip(reference, counted, strict=True) if counts])
    scale = np.asarray(factors, dtype=float) / (1.0 if unit == "token" else math.log(2))
    sums = [arm.sums()[:, counted] * factor for arm, factor in zip(arms, scale, strict=True)]
    means = np.array([part.mean(axis=0) for part in sums])
    gap = means.sum(axis=0)
    gap[np.abs(gap) < 1e-12 * np.abs(means).sum(axis=0)] = 0  # equal losses may differ by rounding
    seeds: dict[tuple[Hashable, ...], np.ndarray] = {}
    for arm, part in zip(arms, sums, strict=True):
        if len(part) > 1:
            seeds[arm.pairing] = seeds.get(arm.pairing, 0) + _summed(part, clusters)
    tokens = sum(row.tokens for row, counts in zip(reference, counted, strict=True) if counts)
    estimate = Estimate(_summed(gap, clusters), _summed(weights[counted], clusters), seeds)
    return Contrast(estimate, int(counted.sum()), tokens)


def _comparable(losses: list[RowLoss], reference: list[RowLoss], unit: str, names: tuple[str, str]) -> np.ndarray:
    """Which rows can be compared. Raises `UserError` if the rows differ, or per token, if another part of a row counts.

    A row is the same text if its tokens agree, or if its answers are whole on both sides.
    """
    ids = [row.id for row in losses] == [row.id for row in reference]
    if ids:
        whole = [x.bytes == y.bytes > 0 for x, y in zip(losses, reference, strict=True)]
        equal = [x.tokens == y.tokens for x, y in zip(losses, reference, strict=True)]
        if unit == "byte":  # a row that one of them truncated is another text
            return np.array(whole)
        if all(one or other for one, other in zip(whole, equal, strict=True)):
            return np.ones(len(losses))
    raise UserError(
        f"comparison: {names[0]} and {names[1]} were measured on different held-out rows. Fix: run both "
        "with the same data set, data_seed, n_heldout, template and max_length."
    )


def _clusters(rows: list[RowLoss]) -> np.ndarray:
    """Number of the cluster of each row. A row without a group is a cluster of its own."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(row.group or (row.id,), len(numbers)) for row in rows])


def _summed(values: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Sum the last axis, which is over rows, within each cluster."""
    sums = np.zeros((*values.shape[:-1], clusters.max() + 1))
    np.add.at(sums.T, clusters, values.T)
    return sums


def _quoted(name: str) -> str:
    """A name in a sentence: in quotation marks if it holds a comma, such as that of a base model in 16 bits."""
    return f"“{markdown(name)}”" if "," in name else markdown(name)


@plots.styled
def figure(differences: Sequence[Difference]) -> Figure:
    """Each difference with its 95% interval and verdict. Left of zero is better.

    They are grouped by the model that is judged, or by its rival if each model has one.
    """
    by_model = len({d.b for d in differences}) < len(differences)
    groups: dict[str, list[Difference]] = {}
    for d in differences:
        groups.setdefault(d.b if by_model else f"vs {d.a}", []).append(d)
    figure, (axes,) = plots.new_figure(_title(differences), 1.8 + 0.45 * (len(differences) + len(groups)))
    bounds = [end for d in differences for end in (d.low, d.value, d.high) if math.isfinite(end)]
    left, right = min([0.0, *bounds]), max([0.0, *bounds])
    reach = (right - left) or 1.0
    left, right = min(left - 0.05 * reach, -0.35 * reach), max(right + 0.05 * reach, 0.35 * reach)
    colors = {"better": plots.BLUE, "worse": plots.VERMILION}
    places = itertools.count()
    style: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center"}
    for name, group in groups.items():
        axes.text(0, next(places), name, fontweight="bold", **style)
        for d, row in zip(group, places, strict=False):
            color = colors.get(d.verdict, plots.GRAY)
            axes.hlines(row + 0.25, max(d.low, left), min(d.high, right), color=color, linewidth=3)
            axes.plot(d.value, row + 0.25, marker="|", markersize=12, markeredgewidth=2, color=color)
            words = f"{f'vs {d.a}' if by_model else d.b}: {d.verdict}"
            axes.text(0, row - 0.2, words, color=color, **style)
    axes.axvline(0, color="#BBBBBB", linewidth=1.5, zorder=0)  # so light that names can be read across it
    for x, side in ((left / 2, "← better"), (right / 2, "worse →")):
        axes.text(x, 1.02, side, transform=axes.get_xaxis_transform(), ha="center", va="bottom")
    axes.set(xlim=(left, right), ylim=(len(differences) + len(groups) - 0.5, -0.5))
    unit = "bits per byte" if any(d.unit == "byte" for d in differences) else "nats per token"
    axes.set_xlabel(f"difference in held-out loss, 95% interval\n({unit})")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set(ylabel="models compared", yticks=[])
    axes.spines["left"].set_visible(False)
    return figure


def _title(differences: Sequence[Difference]) -> str:
    counts = Counter(d.verdict for d in differences)
    verdicts = [f"{counts[verdict]} {verdict}" for verdict in ("better", SAME, UNSURE, "worse") if counts[verdict]]
    return f"{'Comparisons' if len(differences) > 1 else 'The comparison'}:\n{', '.join(verdicts)}"
