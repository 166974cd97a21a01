"""Held-out loss against the number of training rows: a line over its logarithm, and conclusions in words."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from qlora_helpers import plots
from qlora_helpers.evaluation import differences
from qlora_helpers.evaluation.comparison import BASE
from qlora_helpers.evaluation.differences import Arm, Difference
from qlora_helpers.evaluation.intervals import Interval
from qlora_helpers.evaluation.losses import mean_loss, read_losses
from qlora_helpers.runs import RunFolder

BASE_SETTING = "the base setting"
_PER_DOUBLING = {
    "better": "lowers the held-out loss",
    "worse": "raises the held-out loss",
    "not distinguishable": "makes no distinguishable difference to the held-out loss",
}
_BEND = {
    "better": "Each doubling brings more than the one before, so the line is only their mean",
    "worse": "Each doubling brings less than the one before, so the line is only their mean",
    "not distinguishable": "Each doubling may bring as much as the one before",
}


@dataclass(frozen=True)
class Curve:
    """Held-out losses after training on nested sets of rows, measured on the same rows as the base model.

    The line is loss = a - b x log2(rows), least squares. Losses of fine-tuned models fall with the rows as a power law
    above a floor (Hestness et al., arXiv 1712.00409, section 3; Zhang et al., arXiv 2402.17193, eq. 1), whose three
    parameters cannot be separated with a handful of sizes. Over few doublings the law is close to this line; `bend`
    tells when it is not.
    """

    name: str
    base: Arm
    arms: dict[int, Arm]

    @property
    def base_loss(self) -> float:
        """Loss of the base model in nats per token."""
        return mean_loss(self.base.seeds[0])

    @property
    def points(self) -> dict[int, Difference]:
        """Difference of each size to the base model."""
        return {rows: differences.difference(self.base, arm) for rows, arm in self.arms.items()}

    @property
    def doubling(self) -> Difference:
        """Change of the line's loss when the rows double; below zero is better."""
        return self._judged(_fit(self.arms, 1)[1])

    @property
    def bend(self) -> Difference | None:
        """Change of the gain from one doubling to the next, from a fitted parabola; above zero, the gain shrinks.

        None for two sizes, which a line always fits.
        """
        return self._judged(2 * _fit(self.arms, 2)[2]) if len(self.arms) > 2 else None

    def at(self, rows: float) -> Interval:
        """Value of the line at `rows`, minus the loss of the base model."""
        factors = [1, np.log2(rows)] @ _fit(self.arms, 1)
        return differences.contrast([*self.arms.values(), self.base], [*factors, -1]).interval

    def _judged(self, factors: np.ndarray) -> Difference:
        arms = list(self.arms.values())
        made = differences.contrast(arms, list(factors))
        change = made.interval
        return Difference(
            "n rows", "2 n rows", change.value, change.low, change.high, made.rows, differences.fewest_seeds(arms)
        )

    def __str__(self) -> str:
        """What a doubling of the rows brings, and whether a line describes it."""
        change = self.doubling
        lines = [
            f"{self.name}: each doubling of the rows {_PER_DOUBLING[change.verdict]}",
            f"({_bounds(change)}; {change.value / self.base_loss:+.2%} of the base model's loss)",
        ]
        if self.bend:
            lines += [_BEND[self.bend.verdict], f"({_bounds(self.bend)})"]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a file."""
        return {
            "name": self.name,
            "base_loss": self.base_loss,
            "against_base": {str(rows): change.to_dict() for rows, change in self.points.items()},
            "doubling": self.doubling.to_dict(),
            "bend": self.bend.to_dict() if self.bend else None,
            "text": str(self),
        }


def _fit(arms: Iterable[int], degree: int) -> np.ndarray:
    """Weights of the sizes' losses in each coefficient of a polynomial in log2(rows): shape (degree + 1, sizes)."""
    return np.linalg.pinv(np.vander(np.log2(list(arms)), degree + 1, increasing=True))


def _bounds(change: Difference) -> str:
    return f"{change.value:+.4f} nats per token, 95% interval {change.low:+.4f} to {change.high:+.4f}"


def build(name: str, trained: Mapping[str, list[RunFolder]]) -> Curve:
    """The curve through finished runs: each experiment is one size, with its seeds.

    Raises `UserError` if they were not measured on the same held-out rows.
    """
    first = next(iter(trained.values()))[0]
    base = RunFolder(first.path.parent / first.read("manifest.json")["baseline"])
    arms = {runs[0].read("metrics.json")["train_rows"]: _arm(name, runs) for name, runs in trained.items()}
    return Curve(name, Arm(BASE, [read_losses(base)], trained=False), arms)


def _arm(name: str, group: list[RunFolder]) -> Arm:
    return Arm(name, [read_losses(run) for run in group])


def compare_settings(trained: Mapping[str, list[RunFolder]]) -> list[Difference]:
    """Difference of each experiment to the first one, which has the base setting."""
    arms = [_arm(name, runs) for name, runs in trained.items()]
    bases = [Arm(BASE_SETTING, arm.seeds) for arm in arms[:1]]
    return [differences.difference(base, arm) for base in bases for arm in arms[1:]]


def largest_effect(differences: list[Difference]) -> str:
    """The largest distinguishable difference, in words."""
    if not differences:
        return "No setting was changed."
    seen = [change for change in differences if change.verdict != "not distinguishable"]
    if not seen:
        return f"None of the {len(differences)} settings is distinguishable from {BASE_SETTING}."
    return f"Largest effect: {max(seen, key=lambda change: abs(change.value))}"


@plots.styled
def figure(curves: list[Curve]) -> Figure:
    """Held-out loss against rows of training: points, lines and their bands, and the base model.

    Bars and bands are 95% intervals of the difference to the base model, which is what is paired, drawn below its loss.
    """
    figure, (axes,) = plots.new_figure("How much do more rows help?", 4.6)
    base = curves[0].base_loss
    axes.axhline(base, color="black", linestyle="--", linewidth=1.5, label="base model")
    for curve, color, mark in zip(curves, (plots.BLUE, plots.ORANGE), "os", strict=False):
        points = curve.points
        gaps = [change.value + base for change in points.values()]
        reach = [change.high - change.value for change in points.values()]
        axes.errorbar(list(points), gaps, reach, fmt=mark, color=color, markersize=7, capsize=5, label=curve.name)
        along = np.geomspace(min(points), max(points), 25)
        line = [curve.at(rows) for rows in along]
        axes.plot(along, [base + change.value for change in line], color=color, linewidth=1.5)
        band = [[base + getattr(change, end) for change in line] for end in ("low", "high")]
        axes.fill_between(along, *band, color=color, alpha=0.2, linewidth=0)
    sizes = sorted({rows for curve in curves for rows in curve.arms})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{rows:,}" for rows in sizes])
    axes.grid(axis="y")
    axes.set_xlabel("rows to train on (log scale)\nbars and bands: 95% interval of the gap to the base model")
    axes.set_ylabel("held-out loss (nats per token)")
    figure.legend(loc="outside lower center", ncols=3)
    return figure
