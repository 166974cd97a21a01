"""95% intervals over held-out rows (studentized bootstrap) and training seeds (Student's t), one or many at a time."""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95
POWER = 0.8  # of the smallest effect that a comparison is expected to detect
_CELLS = 5_000_000  # resampled rows in memory at a time
_SIMULATED = 200_000  # draws of the multivariate t distribution

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
        """Value and ends; a number that is not finite is null."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {name: number if math.isfinite(number) else None for name, number in numbers.items()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, float | None]) -> "Interval":
        """The interval that `to_dict` wrote; the standard error is not in it."""
        absent = {"value": math.nan, "low": -math.inf, "high": math.inf}
        value, low, high = (absent[name] if (number := plain[name]) is None else number for name in absent)
        return cls(value, low, high)

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

    @property
    def value(self) -> float:
        """The ratio."""
        return float(self.above.sum() / self.below.sum())

    @property
    def residuals(self) -> np.ndarray:
        """Deviation of each row from the ratio, in units of the ratio; their squares sum to its variance.

        Cochran, "Sampling Techniques", 1977, eq. 6.13.
        """
        n = len(self.above)
        return (self.above - self.value * self.below) / self.below.sum() * math.sqrt(n / max(n - 1, 1))

    @property
    def row_variance(self) -> float:
        """Variance of the ratio over the choice of rows."""
        return float((self.residuals**2).sum())

    @property
    def seed_variances(self) -> list[tuple[float, float, int]]:
        """For each set of labels: variance over the choice of seeds, the part of it that rows have too, and seeds.

        The mean over seeds varies with the rows, the mean over rows varies with the seeds, and what varies with both is
        part of either variance. It is subtracted once, as in Cameron, Gelbach and Miller, "Robust inference with
        multiway clustering", 2011, eq. 2.11; its size is the mean square of the residuals of a two-way layout
        (Searle, Casella and McCulloch, "Variance Components", 1992, section 4.3).
        """
        total, n = self.below.sum(), len(self.below)
        parts = []
        for sums in self.seeds.values():
            count = len(sums)
            means = sums.sum(axis=1) / total
            crossed = sums - sums.mean(axis=0) - np.outer(means - means.mean(), self.below)
            shared = (crossed**2).sum() / total**2 / count**2 * count / (count - 1) * n / max(n - 1, 1)
            parts.append((float(means.var(ddof=1) / count), float(shared), count))
        return parts

    @property
    def seed_residuals(self) -> dict[Labels, np.ndarray]:
        """Deviation of each seed from the mean of its set; the squares of a set sum to its variance over seeds."""
        centered = {
            labels: (sums - sums.mean(axis=0)).sum(axis=1) / self.below.sum() for labels, sums in self.seeds.items()
        }
        return {labels: part / math.sqrt(len(part) * (len(part) - 1)) for labels, part in centered.items()}

    def error_and_freedom(self) -> tuple[float, float]:
        """Standard error, and its degrees of freedom by Satterthwaite's formula.

        Welch, "The generalization of Student's problem when several different population variances are involved",
        1947, eq. 28.
        """
        rows, n = self.row_variance, len(self.above)
        variance, spread = rows, rows**2 / max(n - 1, 1)
        for over_seeds, shared, count in self.seed_variances:
            if over_seeds > shared:
                variance += over_seeds - shared
                spread += over_seeds**2 / (count - 1) + shared**2 / ((count - 1) * max(n - 1, 1))
        return math.sqrt(variance), variance**2 / spread if spread else math.inf


def ratio(numerators: Sequence[float] | np.ndarray, denominators: Sequence[float] | np.ndarray) -> Interval:
    """Interval of a ratio of two sums over rows, with rows drawn with replacement. See `simultaneous`."""
    ((interval,),) = simultaneous([[Estimate(np.asarray(numerators, float), np.asarray(denominators, float))]])
    return interval


def simultaneous(families: Sequence[Sequence[Estimate]]) -> list[list[Interval]]:
    """Intervals that all hold at once with 95% confidence. The estimates of a list are of the same rows, in one order.

    Over rows: studentized bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, eq. 12.22),
    symmetric, since its coverage then errs by 1/n² rather than 1/n (Hall, "The Bootstrap and Edgeworth Expansion",
    1992, section 3.6). For several estimates, the largest studentized deviation of each resample counts (max-t;
    Westfall and Young, "Resampling-Based Multiple Testing", 1993, section 2.6). A percentile interval of 64 rows covers
    less than it claims; `benchmarks/calibration.py` measures this one. 10,000 resamples, fixed seed.

    Over rows and seeds: the variances add (see `Estimate.seed_variances`), and the largest deviation is that of a
    multivariate t distribution with the estimates' correlations and the smallest of their degrees of freedom (Hothorn,
    Bretz and Westfall, "Simultaneous inference in general parametric models", 2008, section 3.1), widened by what the
    bootstrap found Student's t to be short of over rows.
    """
    from scipy.stats import t

    largest: list[np.ndarray] = []
    quantiles: list[np.ndarray] = []
    for number, family in enumerate(families):
        deviations = _studentized(family, number)
        quantiles.append(np.quantile(deviations, CONFIDENCE, axis=1, method="inverted_cdf"))
        largest.append(deviations.max(axis=0, initial=0))
    joint = float(np.quantile(np.max(largest, axis=0), CONFIDENCE, method="inverted_cdf"))
    every = [estimate for family in families for estimate in family]
    seeded = any(estimate.seeds for estimate in every)
    critical = _multivariate_t(families) if seeded else 0.0
    results = []
    for family, own in zip(families, quantiles, strict=True):
        intervals = []
        for estimate, quantile in zip(family, own, strict=True):
            error, freedom = estimate.error_and_freedom()
            rows = len(estimate.above)
            if rows < 2:  # one row says nothing about other rows
                intervals.append(Interval(estimate.value, -np.inf, np.inf, np.inf, np.inf))
                continue
            if not seeded:
                reach = (joint if error else 0.0) * error
            else:
                short = max(1.0, quantile / float(t.ppf((1 + CONFIDENCE) / 2, rows - 1))) if quantile else 1.0
                reach = critical * short * error
            power = float(t.ppf(POWER, freedom)) * error if error else 0.0
            value = estimate.value
            intervals.append(Interval(value, value - reach, value + reach, error, reach + power))
        results.append(intervals)
    return results


def _studentized(family: Sequence[Estimate], seed: int) -> np.ndarray:
    """Absolute studentized deviation of every estimate in every resample: shape (estimates, resamples)."""
    n = len(family[0].above)
    varies = [bool(n > 1 and np.ptp(estimate.residuals) > 1e-12 * abs(estimate.value)) for estimate in family]
    deviations = np.zeros((len(family), RESAMPLES))
    start = 0
    for drawn in _resamples(n, seed):
        for k, estimate in enumerate(family):
            if varies[k]:  # else all resamples are equal, and there is no error to divide by
                deviations[k, start : start + len(drawn)] = _deviations(drawn, estimate)
        start += len(drawn)
    return deviations


def _deviations(drawn: np.ndarray, estimate: Estimate) -> np.ndarray:
    """Absolute studentized deviation in each resample. `drawn` holds counts of shape (resamples, rows)."""
    n, above, below = drawn.shape[1], estimate.above, estimate.below
    sums = drawn @ np.stack([above, below, above**2, above * below, below**2], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):  # with few rows, a resample may consist of a single one
        value = sums[:, 0] / sums[:, 1]
        squares = sums[:, 2] - 2 * value * sums[:, 3] + value**2 * sums[:, 4]
        error = np.sqrt(np.maximum(squares, 0) * n / (n - 1)) / sums[:, 1]
        return np.nan_to_num(np.abs(value - estimate.value) / error, posinf=np.inf)


def _resamples(n: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of n rows is drawn in each resample, in blocks of shape (resamples, rows)."""
    if n * RESAMPLES <= _CELLS:
        yield _all_resamples(n, seed)
        return
    rng = np.random.default_rng(seed)
    for start in range(0, RESAMPLES, block := max(_CELLS // n, 1)):
        yield rng.multinomial(n, np.full(n, 1 / n), size=min(block, RESAMPLES - start)).astype(float)


@lru_cache(maxsize=4)
def _all_resamples(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(float)


def _multivariate_t(families: Sequence[Sequence[Estimate]]) -> float:
    """Value that the largest of several t-distributed deviations exceeds in 5% of cases.

    Estimates of different rows are correlated through their seeds alone.
    """
    from scipy.stats import t

    every = [estimate for family in families for estimate in family]
    freedom = min(estimate.error_and_freedom()[1] for estimate in every)
    if len(every) == 1:
        return float(t.ppf((1 + CONFIDENCE) / 2, freedom))
    covariance = np.array([[_seed_covariance(a, b) for b in every] for a in every])
    start = 0
    for family in families:
        rows = np.array([estimate.residuals for estimate in family])
        here = slice(start, start := start + len(family))
        covariance[here, here] += rows @ rows.T
    errors = np.sqrt(np.maximum(covariance.diagonal(), np.finfo(float).tiny))
    values, vectors = np.linalg.eigh(covariance / np.outer(errors, errors))
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((_SIMULATED, len(every))) @ (vectors * np.sqrt(np.maximum(values, 0))).T
    scale = np.sqrt(rng.chisquare(freedom, _SIMULATED) / freedom) if math.isfinite(freedom) else 1.0
    return float(np.quantile(np.abs(normal).max(axis=1) / scale, CONFIDENCE))


def _seed_covariance(a: Estimate, b: Estimate) -> float:
    """Covariance of two ratios over the choice of the seeds that they share."""
    left, right = a.seed_residuals, b.seed_residuals
    return float(sum(left[labels] @ right[labels] for labels in left.keys() & right.keys()))


def share(count: int, of: int) -> Interval:
    """Share of rows with Wilson's interval (1927), which is valid near 0 and 1 too."""
    from scipy.stats import binomtest

    low, high = binomtest(count, of).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(count / of, float(low), float(high))
