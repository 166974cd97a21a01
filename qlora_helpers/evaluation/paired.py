"""Two models on the same answers: the paired difference of a metric with its 95% interval, and Holm's correction."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qlora_helpers.errors import UserError
from qlora_helpers.evaluation import intervals
from qlora_helpers.evaluation.intervals import RESAMPLES, Estimate, Interval

ALPHA = 1 - intervals.CONFIDENCE
Answers = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class MetricDifference:
    """Metric of model `b` minus that of model `a`, `value`, with its 95% interval from `low` to `high`.

    `a` and `b` are the metric of each model over the same `answers`, which form `clusters` independent groups. `p` is
    the p-value of no difference. `remains` says whether the difference is distinguishable from zero after Holm's
    correction over the `family` of differences that it was computed with, at 5%. `detectable` is the smallest
    difference that then has an 80% chance to remain, about; 0 where it is not known.
    """

    metric: str
    a: float
    b: float
    value: float
    low: float
    high: float
    p: float
    answers: int
    clusters: int
    family: int = 1
    remains: bool = False
    detectable: float = 0.0

    @property
    def limit(self) -> str:
        """What could have been detected, or nothing if the difference is clear."""
        if self.remains or not self.detectable:
            return ""
        if math.isinf(self.detectable):
            return "no difference would be detected with so few answers"
        return f"a difference of {self.detectable:.2g} would be detected in 80% of such comparisons"

    def __str__(self) -> str:
        low, high = ("no end" if math.isinf(end) else f"{end:+.3g}" for end in (self.low, self.high))
        over = f" after Holm's correction over {self.family} metrics" if self.family > 1 else ""
        verdict = "distinguishable" if self.remains else "not distinguishable"
        return (
            f"{self.metric}: {self.a:.3g} and {self.b:.3g}, difference {self.value:+.3g} "
            f"(95% interval {low} to {high}), {verdict}{over}{self.limit and f'; {self.limit}'}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values; a number that is not finite is null."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in vars(self).items()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "MetricDifference":
        """The difference that `to_dict` wrote."""
        ends = {"low": -math.inf, "high": math.inf, "detectable": math.inf}
        return cls(**{**plain, **{name: end for name, end in ends.items() if plain.get(name, 0) is None}})


def matched(a: Answers, b: Answers) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Pairs of answers to the same questions; if one model answered more of them, those that both answered.

    Raises `UserError` if the questions, their references or their tests differ.
    """
    pairs = list(zip(a, b, strict=False))
    for left, right in pairs:
        if any(left.get(key) != right.get(key) for key in ("prompt", "reference", "tests")):
            raise UserError(
                f"answers: the two models answered different questions (one has {left['prompt'][:60]!r}, the other "
                f"{right['prompt'][:60]!r}). Fix: run both with the same data set, data_seed and n_heldout."
            )
    return pairs


def ratio(
    metric: str,
    a: Sequence[float],
    b: Sequence[float],
    groups: Sequence[str],
    per: Sequence[float] | None = None,
    most: float = math.inf,
) -> MetricDifference:
    """Difference of two sums over answers, each divided by the sum of `per`; of two means without `per`.

    `a` and `b` hold the values of the same answers. Answers of one group, unless that is empty, are drawn together.
    The interval is that of `intervals.ratio`, clipped to ±`most`. The p-value is the share of its resamples that
    deviate at least as much, so it is at most 5% where the interval excludes zero.
    """
    x, y, below = (np.asarray(values, dtype=float) for values in (a, b, [1.0] * len(a) if per is None else per))
    numbers: dict[str, int] = {}
    clusters = np.array([numbers.setdefault(group or f"answer {i}", len(numbers)) for i, group in enumerate(groups)])
    above, weights = (np.bincount(clusters, values) for values in (y - x, below))
    estimate = Estimate(above, weights)
    interval, deviations = intervals.alone(estimate)
    a_mean, b_mean = x.sum() / below.sum(), y.sum() / below.sum()
    p = _p_value(estimate, deviations)
    return _made(metric, a_mean, b_mean, interval.within(-most, most), p, len(x), len(numbers))


def share(metric: str, a: Sequence[bool], b: Sequence[bool], groups: Sequence[str]) -> MetricDifference:
    """Difference of two shares of the same answers.

    Newcombe, "Improved confidence intervals for the difference between binomial proportions based on paired data",
    1998, method 10. The p-value is McNemar's mid-p (Fagerland, Lydersen and Laake, "The McNemar test for binary
    matched-pairs data: mid-p and asymptotic are better than exact conditional", 2013). Both need independent answers:
    answers in groups are compared like means, see `ratio`.
    """
    named = [group for group in groups if group]
    if len(set(named)) < len(named):
        return ratio(metric, a, b, groups, most=1)
    pairs = list(zip(map(bool, a), map(bool, b), strict=True))
    both, only_a, only_b, none = (
        pairs.count(kind) for kind in ((True, True), (True, False), (False, True), (False, False))
    )
    interval, p = newcombe(both, only_a, only_b, none), _mid_p(only_a, only_b)
    return _made(metric, (both + only_a) / len(pairs), (both + only_b) / len(pairs), interval, p, len(pairs))


def newcombe(both: int, only_a: int, only_b: int, none: int) -> Interval:
    """Share of `b` minus share of `a`, from the four counts of pairs: Newcombe's method 10, see `share`."""
    n = both + only_a + only_b + none
    a, b = intervals.share(both + only_a, n), intervals.share(both + only_b, n)
    product = both * none - only_a * only_b
    corrected = max(product - n / 2, 0.0) if product > 0 else float(product)
    margins = (both + only_a) * (only_b + none) * (both + only_b) * (only_a + none)
    phi = corrected / math.sqrt(margins) if margins else 0.0

    def reach(up: float, down: float) -> float:
        return math.sqrt(max(up**2 - 2 * phi * up * down + down**2, 0.0))

    value = (only_b - only_a) / n
    low = value - reach(b.value - b.low, a.high - a.value)
    return Interval(value, low, value + reach(b.high - b.value, a.value - a.low))


def holm(differences: Sequence[MetricDifference]) -> list[MetricDifference]:
    """The differences as one family: which of them remain after Holm's correction at 5%.

    Holm, "A simple sequentially rejective multiple test procedure", 1979: the chance that any difference that is zero
    remains is at most 5%. A difference whose own interval contains zero never remains. What is detectable follows from
    the width of the interval and the normal quantiles of 80% power and of the strictest level, 5% / family.
    """
    from scipy.stats import norm

    size = len(differences)
    per_width = (norm.isf(ALPHA / 2 / max(size, 1)) + norm.ppf(intervals.POWER)) / norm.isf(ALPHA / 2) / 2
    order = sorted(range(size), key=lambda i: differences[i].p)
    rejected = set()
    for place, i in enumerate(order):
        if differences[i].p > ALPHA / (size - place):
            break
        rejected.add(i)
    return [
        replace(
            one,
            family=size,
            remains=i in rejected and not one.low <= 0 <= one.high,
            detectable=float(per_width * (one.high - one.low)),
        )
        for i, one in enumerate(differences)
    ]


def _made(
    metric: str, a: float, b: float, interval: Interval, p: float, answers: int, clusters: int | None = None
) -> MetricDifference:
    value, low, high = interval.value, interval.low, interval.high
    return MetricDifference(metric, float(a), float(b), value, low, high, p, answers, clusters or answers)


def _p_value(estimate: Estimate, deviations: np.ndarray) -> float:
    """Share of resamples, by their studentized `deviations`, that deviate at least as much as the estimate from 0."""
    n, error = len(estimate.above), estimate.row_error
    if not estimate.value or n < 2:
        return 1.0
    if error <= 1e-12 * abs(estimate.value):  # equal differences everywhere: a sign test
        return 2.0 ** (1 - n)
    return float((1 + (np.abs(deviations) >= abs(estimate.value) / error).sum()) / (1 + RESAMPLES))


def _mid_p(only_a: int, only_b: int) -> float:
    from scipy.stats import binom

    discordant, fewer = only_a + only_b, min(only_a, only_b)
    return float(2 * binom.cdf(fewer, discordant, 0.5) - binom.pmf(fewer, discordant, 0.5)) if discordant else 1.0
