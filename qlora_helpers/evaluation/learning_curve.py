"""Held-out loss against the number of training rows: the last doubling, what the next one may bring, and the knobs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from qlora_helpers import plots
from qlora_helpers.evaluation import comparison, differences
from qlora_helpers.evaluation.differences import UNSURE, Arm, Difference
from qlora_helpers.evaluation.intervals import Interval
from qlora_helpers.evaluation.power_law import PowerLaw, fit
from qlora_helpers.evaluation.row_losses import BASE, mean_loss, read_losses
from qlora_helpers.runs import RunFolder
from qlora_helpers.wording import counted

BASE_SETTING = "the base setting"
LAW_SIZES = 4  # a power law with a floor has three parameters
_PER_DOUBLING = {
    "better": "lowers the held-out loss",
    "worse": "raises the held-out loss",
    UNSURE: "makes no distinguishable difference to the held-out loss",
}


@dataclass(frozen=True)
class Curve:
    """Held-out losses after training on nested sets of rows, measured on the same rows as the base model.

    `rivals` are the losses of the other forms of the base model that were measured on all of these rows.
    """

    name: str
    base: Arm
    arms: dict[int, Arm]
    rivals: Mapping[str, float] = field(default_factory=dict)

    @property
    def base_loss(self) -> float:
        """Loss of the base model in nats per token."""
        return mean_loss(self.base.seeds[0])

    @property
    def sizes(self) -> list[int]:
        """Numbers of training rows, increasing."""
        return sorted(self.arms)

    @cached_property
    def points(self) -> dict[int, Difference]:
        """Difference of each size to the base model; the intervals hold at once."""
        (found,) = differences.family([[(self.base, self.arms[rows]) for rows in self.sizes]])
        return dict(zip(self.sizes, found, strict=True))

    @property
    def _halvings(self) -> list[int]:
        """The largest size, then the smaller size nearest to half of it, and so on down to the smallest."""
        chain = self.sizes[-1:]
        while smaller := [rows for rows in self.sizes if rows < chain[-1]]:
            chain.append(min(smaller, key=lambda rows: abs(math.log2(2 * rows / chain[-1]))))
        return chain

    @cached_property
    def doubling(self) -> Difference:
        """Change of the loss with the last doubling: from the size nearest to half of the largest, to the largest.

        If the sizes differ by another factor, it is scaled to one doubling. Below zero is better.
        """
        large, small = self._halvings[:2]
        per_doubling = 1 / math.log2(large / small)
        return self._judged([small, large], [-per_doubling, per_doubling])

    @cached_property
    def bend(self) -> Difference | None:
        """Change of the gain from the doubling before to the last one; above zero, it shrinks. None for two sizes."""
        if len(self._halvings) < 3:
            return None
        large, middle, small = self._halvings[:3]
        last, before = 1 / math.log2(large / middle), 1 / math.log2(middle / small)
        return self._judged([small, middle, large], [before, -before - last, last])

    @property
    def gains_grow(self) -> bool:
        """Whether the last doubling distinguishably brought more than the one before."""
        return self.bend is not None and self.bend.verdict == "better"

    @property
    def next_doubling(self) -> Interval | None:
        """What doubling the largest size can bring without any fitted curve: between the last doubling's gain and none.

        The lower end is that of the last doubling's interval, since gains shrink as the rows grow (Hestness et al.,
        arXiv 1712.00409, section 3). None where they grew, or where the last doubling raised the loss.
        """
        last = self.doubling
        return None if self.gains_grow or last.low >= 0 else Interval(min(last.value, 0.0), last.low, 0.0)

    @cached_property
    def law(self) -> PowerLaw | None:
        """Power law of the difference to the base model. None for fewer than four sizes, or where the gains grew."""
        if len(self.sizes) < LAW_SIZES or self.gains_grow:
            return None
        contrasts = [differences.contrast([self.base, self.arms[rows]], [-1, 1]) for rows in self.sizes]
        return fit(self.sizes, [made.estimate for made in contrasts], -self.base_loss)

    def _judged(self, sizes: list[int], factors: list[float]) -> Difference:
        arms = [self.arms[rows] for rows in sizes]
        made = differences.contrast(arms, factors)
        change = made.interval
        return Difference(
            counted(sizes[-2], "row"), counted(sizes[-1], "row"), change.value, change.low, change.high, made.rows,
            differences.fewest_seeds(arms), tokens=made.tokens, clusters=len(made.estimate.above),
            detectable=change.detectable,
        )  # fmt: skip

    def __str__(self) -> str:
        last = self.doubling
        return "\n".join(
            [
                f"{self.name}: from {last.a.partition(' ')[0]} to {last.b}, a doubling {_PER_DOUBLING[last.verdict]}",
                f"({last.bounds}; {last.value / self.base_loss:+.2%} of the base model's loss)",
                f"measured on {counted(last.rows, 'held-out row')} with {counted(last.tokens, 'token')}, "
                f"{counted(last.seeds, 'training seed')}",
                *([last.limit] if last.limit else []),
                *self._outlook(),
            ]
        )

    def _outlook(self) -> list[str]:
        if self.bend is not None and self.gains_grow:
            grown = "Each doubling brings more than the one before, so the last one does not limit the next"
            return [f"{grown} ({self.bend.bounds})"]
        if self.next_doubling is None:
            return ["The last doubling did not help, so nothing is said of the next one"]
        double = f"to {2 * self.sizes[-1]:,} rows"
        lines = [f"If gains shrink, the next doubling, {double}, brings between {self.next_doubling.low:+.4f} and 0"]
        if self.law:
            change = self.law.doubling
            lines.append(
                f"A power law with a floor through {len(self.sizes)} sizes expects {change.value:+.4f} "
                f"(95% band {change.low:+.4f} to {change.high:+.4f})"
            )
            if self.doubling.seeds == 1:
                lines.append("With one training seed, the band leaves out what another seed or draw would change")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a file."""
        return {
            "name": self.name,
            "base_loss": self.base_loss,
            "against_base": {str(rows): change.to_dict() for rows, change in self.points.items()},
            "doubling": self.doubling.to_dict(),
            "bend": self.bend.to_dict() if self.bend else None,
            "next_doubling": self.next_doubling.to_dict() if self.next_doubling else None,
            "law": self.law.to_dict() if self.law else None,
            "text": str(self),
        }


def build(name: str, trained: Mapping[str, list[RunFolder]]) -> Curve:
    """The curve through finished runs, a size per experiment. Raises `UserError` for different held-out rows."""
    first = next(iter(trained.values()))[0]
    base = read_losses(RunFolder(first.path.parent / first.read("manifest.json")["baseline"]))
    folders, _ = comparison.rivals_of([first])
    measured = {name: read_losses(runs[0]) for name, runs in folders.items() if name != BASE}
    rivals = {name: mean_loss(rows) for name, rows in measured.items() if len(rows) == len(base)}
    arms = {runs[0].read("metrics.json")["train_rows"]: comparison.arm(name, runs) for name, runs in trained.items()}
    return Curve(name, Arm(BASE, [base], trained=False), arms, rivals)


def compare_settings(trained: Mapping[str, list[RunFolder]]) -> list[Difference]:
    """Difference of each experiment to the first one, which has the base setting.

    The intervals hold at once, so that naming the best of several settings without effect is as rare as 5%.
    """
    return against_first([comparison.arm(name, runs) for name, runs in trained.items()])


def against_first(arms: list[Arm]) -> list[Difference]:
    """Difference of each arm to the first, with intervals that hold at once."""
    if len(arms) < 2:
        return []
    base = Arm(BASE_SETTING, arms[0].seeds, labels=arms[0].labels)
    (found,) = differences.family([[(base, arm) for arm in arms[1:]]])
    return found


def largest_effect(differences: list[Difference]) -> str:
    """The largest distinguishable difference, in words, or what could have been detected."""
    if not differences:
        return "No setting was changed: the lists of values are empty."
    together = f"Settings compared together: {len(differences)}."
    seen = [change for change in differences if change.verdict in ("better", "worse")]
    if seen:
        return f"{together} Largest effect: {max(seen, key=lambda change: abs(change.value))}"
    limit = max(change.detectable for change in differences)
    power = f"; an effect of {limit:.4f} would be detected in 80% of such comparisons" if 0 < limit < math.inf else ""
    return f"{together} None is distinguishable from {BASE_SETTING}{power}."


@plots.styled
def figure(curves: list[Curve]) -> Figure:
    """Held-out loss against rows of training, with the base model, and what doubling the largest size may bring.

    Bars are 95% intervals of the difference to the base model, which is what is paired, drawn below its loss; those of
    a curve hold at once. If another form of the base model is better than the one that was trained, the best is drawn.
    With four sizes, the fitted law and its band; with fewer, straight segments. The shaded wedge lies between the last
    doubling's gain and none.
    """
    figure, (axes,) = plots.new_figure("How much do more rows help?", 4.8)
    base = curves[0].base_loss
    axes.axhline(base, color="black", linestyle="--", linewidth=1.5, label="base model")
    if rivals := {name: loss for name, loss in curves[0].rivals.items() if loss < base}:
        best = min(rivals, key=rivals.__getitem__)
        axes.axhline(rivals[best], color=plots.VERMILION, linestyle=":", linewidth=2, label=f"best rival:\n{best}")
    for curve, color, mark in zip(curves, (plots.BLUE, plots.ORANGE), "os", strict=False):
        points = curve.points
        losses = [base + change.value for change in points.values()]
        reach = [change.high - change.value for change in points.values()]
        axes.errorbar(list(points), losses, reach, fmt=mark, color=color, markersize=7, capsize=5, label=curve.name)
        largest = curve.sizes[-1]
        if curve.law:
            along = np.geomspace(curve.sizes[0], 2 * largest, 40)
            line = [curve.law.at(rows) for rows in along]
            axes.plot(along, [base + change.value for change in line], color=color, linewidth=1.5)
            band = [[base + getattr(change, end) for change in line] for end in ("low", "high")]
            axes.fill_between(along, *band, color=color, alpha=0.2, linewidth=0)
        else:
            axes.plot(list(points), losses, color=color, linewidth=1.5)
            if curve.next_doubling:
                ends = [[losses[-1], losses[-1] + end] for end in (curve.next_doubling.low, 0.0)]
                axes.fill_between([largest, 2 * largest], *ends, color=color, alpha=0.2, linewidth=0)
    sizes = sorted({rows for curve in curves for rows in curve.arms})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{rows:,}" for rows in sizes])
    axes.grid(axis="y")
    axes.set_xlabel("rows to train on (log scale)\nbars: 95% interval of the gap\nto the base model")
    axes.set_ylabel("held-out loss (nats per token)")
    figure.legend(loc="outside lower center", ncols=2)
    return figure
