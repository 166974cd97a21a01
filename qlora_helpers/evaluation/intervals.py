"""95% intervals over held-out rows (studentized bootstrap) and training seeds (Student's t), one or many at a time."""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95
POWER = 0.8  # of the smallest effect that a comparison is expected to detect
FEW_ROWS = 20  # with fewer rows, the rows-by-seeds variance is too uncertain to be subtracted
_KEPT = 4_000_000  # resampled rows that are kept for the next interval; 32 MB
_BLOCK = 500_000  # resampled rows in memory at a time otherwise
_AT_ONCE = 64  # estimates that are resampled at a time; 80 MB

Labels = tuple[Hashable, ...]


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval, its standard error, and the smallest effect that has an 80% chance to be detected.

    The standard error and the detectable effect are 0 where they are not known.
    """

    value: float
    low: float
    high: float
    error: float = 0.0
    detectable: float = 0.0

    def to_dict(self) -> dict[str, float | None]:
        """Value, ends and detectable effect; a number that is not finite is null."""
        numbers = {"value": self.value, "low": self.low, "high": self.high, "detectable": self.detectable}
        return {name: number if math.isfinite(number) else None for name, number in numbers.items()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, float | None]) -> "Interval":
        """The interval that `to_dict` wrote; the standard error is not in it, nor older versions' detectable effect."""
        absent = {"value": math.nan, "low": -math.inf, "high": math.inf, "detectable": math.inf}
        known: dict[str, Any] = {"detectable": 0.0, **plain}
        return cls(**{name: absent[name] if known[name] is None else known[name] for name in absent})

    def within(self, low: float, high: float) -> "Interval":
        """Clip to the range of the quantity, which a symmetric interval of few rows may leave."""
        return replace(self, low=max(low, self.low), high=min(high, self.high))


@dataclass(frozen=True)
class Estimate:
    """A ratio of two sums over rows, such as loss per token, and what its interval depends on.

    `above` and `below` hold the numerator and the denominator of each row, or of each cluster of rows. `seeds` holds
    the part of the numerators that varies with training seeds, of shape (seeds, rows), under the labels of the seeds.
    Models with the same labels are paired by them; those with other labels are independent.
    """

    above: np.ndarray
    below: np.ndarray
    seeds: Mapping[Labels, np.ndarray] = field(default_factory=dict)

    @cached_property
    def value(self) -> float:
        """The ratio."""
        return float(self.above.sum() / self.below.sum())

    @cached_property
    def residuals(self) -> np.ndarray:
        """Deviation of each row from the ratio, in units of the ratio: shape (rows,)."""
        return (self.above - self.value * self.below) / self.below.sum()

    @property
    def seed_errors(self) -> list[tuple[float, int]]:
        """For each set of labels: standard error of the ratio over the choice of seeds, and the number of seeds."""
        return [(float(np.linalg.norm(part)), len(part)) for part in self.seed_residuals.values()]

    @property
    def seed_residuals(self) -> dict[Labels, np.ndarray]:
        """For each set of labels: deviation of each seed from the mean; their squares sum to the squared error."""
        means = {labels: sums.sum(axis=1) / self.below.sum() for labels, sums in self.seeds.items()}
        return {labels: (m - m.mean()) / math.sqrt(len(m) * (len(m) - 1)) for labels, m in means.items()}

    @cached_property
    def row_error(self) -> float:
        """Standard error of the ratio over the choice of rows, less what `seed_errors` contain already.

        The error over rows alone is that of a ratio estimator (Cochran, "Sampling Techniques", 1977, chapter 6). Noise
        of each row with each seed adds to the spread of the rows and to that of the seeds, so its variance, the
        residual mean square of a two-way layout, is subtracted once (Cameron, Gelbach and Miller, "Robust inference
        with multiway clustering", 2011). It comes off the rows: they are many, so the rest is well known, whereas the
        spread of three seeds is often below it by chance. With `FEW_ROWS`, it is counted twice, which is safe.
        """
        n = len(self.above)
        if n < 2:
            return math.inf
        variance = float((self.residuals**2).sum()) * n / (n - 1)
        return math.sqrt(max(variance - (sum(self.crossed_variances) if n >= FEW_ROWS else 0), 0))

    @property
    def crossed_variances(self) -> list[float]:
        """For each set of labels: variance of the ratio from the noise of each row with each seed."""
        n, total = len(self.above), self.below.sum()
        variances = []
        for sums in self.seeds.values():
            means = sums.sum(axis=1) / total
            crossed = (sums - sums.mean(axis=0)) / total - np.outer(means - means.mean(), self.below / total)
            variances.append(float((crossed**2).sum()) / len(sums) / (len(sums) - 1) * n / max(n - 1, 1))
        return variances


def ratio(numerators: Sequence[float] | np.ndarray, denominators: Sequence[float] | np.ndarray) -> Interval:
    """Interval of a ratio of two sums over rows, with rows drawn with replacement. See `simultaneous`."""
    return alone(Estimate(np.asarray(numerators, float), np.asarray(denominators, float)))[0]


def alone(estimate: Estimate) -> tuple[Interval, np.ndarray]:
    """Interval of an estimate without seeds, and its studentized deviations over rows. See `simultaneous`."""
    (over_rows,) = studentized([estimate], 0)
    deviations = _deviations(estimate, over_rows, np.random.default_rng(RESAMPLES))
    reaches = _Balanced()
    reaches.add(deviations)
    (reach,) = reaches.bounds()
    return _interval(estimate, reach, _power(deviations)), over_rows


def simultaneous(families: Sequence[Sequence[Estimate]]) -> list[list[Interval]]:
    """Intervals that all hold at once with 95% confidence. The estimates of a list are of the same rows, in one order.

    The deviation of an estimate from the truth is simulated as the sum of two independent parts:

    - Over rows, its error times a studentized bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap",
      1993, section 12.5). Estimates of the same rows share their resamples.
    - Over seeds, its error times Student's t. The sum of such parts is Behrens and Fisher's solution for two unknown
      variances. It stays valid with three seeds, where Welch's t does not: see docs/statistics.md. Estimates are taken
      as independent here, since three seeds cannot show how they are correlated; that can only widen the intervals.

    The interval is symmetric (Hall, "The Bootstrap and Edgeworth Expansion", 1992, section 3.6). For several estimates,
    each gets the same chance to miss, the largest with which all hold at once (Beran, "Balanced simultaneous confidence
    sets", 1988): like max-t, but an estimate with few seeds or heavy tails does not widen the others. Fixed random
    seeds.
    """
    if not any(families):
        return [[] for _ in families]
    rng = np.random.default_rng(RESAMPLES)
    reaches = _Balanced()
    powers = []
    for number, family in enumerate(families):
        for start in range(0, len(family), _AT_ONCE):
            part = family[start : start + _AT_ONCE]
            for estimate, over_rows in zip(part, studentized(part, number), strict=True):
                deviations = _deviations(estimate, over_rows, rng)
                reaches.add(deviations)
                powers.append(_power(deviations))
    ends = zip(reaches.bounds(), powers, strict=True)
    return [[_interval(estimate, *next(ends)) for estimate in family] for family in families]


def _power(deviations: np.ndarray) -> float:
    """Deviation that 80% of the estimates do not fall short by."""
    return float(np.quantile(deviations, 2 * POWER - 1, method="inverted_cdf"))


def _interval(estimate: Estimate, reach: float, power: float) -> Interval:
    value, error = estimate.value, math.hypot(estimate.row_error, *(error for error, _ in estimate.seed_errors))
    return Interval(value, float(value - reach), float(value + reach), error, float(reach + power))


def _deviations(estimate: Estimate, over_rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Absolute simulated deviations of an estimate: shape (RESAMPLES,)."""
    deviations = estimate.row_error * over_rows if estimate.row_error else np.zeros(RESAMPLES)
    for error, count in estimate.seed_errors:
        signs = rng.choice([-1.0, 1.0], RESAMPLES)
        deviations = deviations + error * signs * rng.permutation(_student(count - 1))
    return np.abs(deviations)


@lru_cache
def _student(freedom: int) -> np.ndarray:
    """Absolute values of Student's t at evenly spaced probabilities, so that their quantiles have no sampling error."""
    from scipy.stats import t

    return np.asarray(t.isf((np.arange(RESAMPLES) + 0.5) / RESAMPLES / 2, freedom))


class _Balanced:
    """A bound for each vector of deviations that is exceeded equally often; in 5% of the resamples, any is exceeded."""

    def __init__(self) -> None:
        self._exceeded = round((1 - CONFIDENCE) * RESAMPLES)  # resamples in which any bound is exceeded
        self._rarest = np.full(RESAMPLES, RESAMPLES)  # of each resample: how many deviate as much, in the rarest case
        self._largest: list[np.ndarray] = []

    def add(self, deviations: np.ndarray) -> None:
        """Add the deviations of an estimate, of which only the largest are kept."""
        kept = self._exceeded + 1
        least = np.partition(deviations, -kept)[-kept]
        (where,) = np.nonzero(~(deviations < least))  # all others are exceeded more often than is allowed
        ordered = np.sort(deviations[where])
        rarity = len(ordered) - np.searchsorted(ordered, deviations[where])
        self._rarest[where] = np.minimum(self._rarest[where], rarity)
        self._largest.append(ordered[-kept:])

    def bounds(self) -> list[float]:
        """Return the bound of each estimate, in order."""
        allowed = np.sort(self._rarest)[self._exceeded]
        # With more allowed, all deviations from the first that is kept up to the bound are equal.
        return [largest[-min(allowed, len(largest))] for largest in self._largest]


def studentized(family: Sequence[Estimate], seed: int) -> np.ndarray:
    """Studentized deviation of every estimate in every resample of their rows: shape (estimates, RESAMPLES)."""
    deviations = np.zeros((len(family), RESAMPLES))
    n = len(family[0].above) if family else 0
    if n < 2:  # one row says nothing about other rows
        return np.full_like(deviations, np.inf)
    # If rows do not vary, all resamples are equal, and there is no error to divide by.
    varies = np.array([np.ptp(one.residuals) * n > 1e-12 * abs(one.value) for one in family])
    above = np.array([one.residuals for one in family])[varies]
    below = np.array([one.below / one.below.sum() for one in family])[varies]
    columns = np.concatenate([above, below, above**2, above * below, below**2]).T
    start = 0
    for drawn in _resamples(n, seed):
        deviations[varies, start : start + len(drawn)] = _studentize(drawn @ columns, n)
        start += len(drawn)
    return deviations


def _studentize(sums: np.ndarray, n: int) -> np.ndarray:
    """Studentized deviations: shape (estimates, resamples). `sums` over the rows drawn: (resamples, 5 x estimates)."""
    above, below, *squares = sums.T.reshape(5, -1, len(sums))
    with np.errstate(divide="ignore", invalid="ignore"):  # with few rows, a resample may consist of a single one
        deviation = above / below
        variance = squares[0] - 2 * deviation * squares[1] + deviation**2 * squares[2]
        error = np.sqrt(np.maximum(variance, 0) * n / (n - 1)) / below
        return np.nan_to_num(deviation / error, posinf=np.inf, neginf=-np.inf)


def _resamples(n: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of n rows is drawn in each resample, in blocks of shape (resamples, rows)."""
    if n * RESAMPLES <= _KEPT:
        yield _all_resamples(n, seed)
        return
    rng = np.random.default_rng(seed)
    for start in range(0, RESAMPLES, block := max(_BLOCK // n, 1)):
        yield _counts(rng, n, min(block, RESAMPLES - start))


@lru_cache(maxsize=2)
def _all_resamples(n: int, seed: int) -> np.ndarray:
    return _counts(np.random.default_rng(seed), n, RESAMPLES)


def _counts(rng: np.random.Generator, n: int, resamples: int) -> np.ndarray:
    drawn = rng.integers(0, n, (resamples, n)) + n * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=n * resamples).reshape(resamples, n).astype(float)


@lru_cache(maxsize=1024)  # models of a comparison share the number of answers
def share(count: int, of: int) -> Interval:
    """Share of rows with Wilson's interval (1927), which is valid near 0 and 1 too."""
    from scipy.stats import binomtest

    low, high = binomtest(count, of).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(count / of, float(low), float(high))
