"""95% intervals over held-out rows (studentized bootstrap), over training seeds (Student's t), and over both."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval, and its standard error with the degrees of freedom where they are known."""

    value: float
    low: float
    high: float
    error: float = 0.0
    freedom: int = 0

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


def ratio(numerators: Sequence[float] | np.ndarray, denominators: Sequence[float] | np.ndarray) -> Interval:
    """Ratio of two sums over rows, such as loss per token, with rows drawn with replacement.

    Studentized bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, eq. 12.22), symmetric, since
    its coverage then errs by 1/n² rather than 1/n (Hall, "The Bootstrap and Edgeworth Expansion", 1992, section 3.6);
    the standard error of a ratio from Cochran, "Sampling Techniques", 1977, eq. 6.13. A percentile interval of 64 rows
    covers less than it claims; `benchmarks/calibration.py` measures this one. 10,000 resamples, fixed seed.
    """
    above, below = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    n = len(above)
    (value,), (error,) = _ratio_and_error(np.ones((1, n)), above, below)
    if n < 2:  # one row says nothing about other rows
        return Interval(float(value), -np.inf, np.inf, np.inf, 0)
    if np.ptp(above / below) < 1e-12:  # all resamples are equal, and there is no error to divide by
        return Interval(float(value), float(value), float(value), 0.0, n - 1)
    values, errors = _ratio_and_error(_resamples(n), above, below)
    with np.errstate(divide="ignore", invalid="ignore"):  # with few rows, a resample may consist of a single one
        studentized = np.nan_to_num((values - value) / errors, posinf=np.inf, neginf=-np.inf)
    reach = np.quantile(np.abs(studentized), CONFIDENCE, method="inverted_cdf") * error
    return Interval(float(value), float(value - reach), float(value + reach), float(error), n - 1)


@lru_cache(maxsize=4)
def _resamples(n: int) -> np.ndarray:
    """How often each of n rows is drawn in each resample: shape (RESAMPLES, n)."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(float)


def _ratio_and_error(drawn: np.ndarray, above: np.ndarray, below: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ratio of sums and its standard error for each resample. `drawn` holds counts of shape (resamples, rows)."""
    n = drawn.shape[1]
    sums = drawn @ np.stack([above, below, above**2, above * below, below**2], axis=1)
    value = sums[:, 0] / sums[:, 1]
    squares = sums[:, 2] - 2 * value * sums[:, 3] + value**2 * sums[:, 4]
    return value, np.sqrt(np.maximum(squares, 0) * n / max(n - 1, 1)) / sums[:, 1]


def share(count: int, of: int) -> Interval:
    """Share of rows with Wilson's interval (1927), which is valid near 0 and 1 too."""
    from scipy.stats import binomtest

    low, high = binomtest(count, of).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(count / of, float(low), float(high))


def seed_error(per_seed: Sequence[float] | np.ndarray) -> tuple[float, int]:
    """Standard error of a mean over training seeds and its degrees of freedom; (0, 0) for a single seed."""
    n = len(per_seed)
    return (float(np.std(per_seed, ddof=1) / np.sqrt(n)), n - 1) if n > 1 else (0.0, 0)


def widen(rows: Interval, *seeds: tuple[float, int]) -> Interval:
    """Widen an interval over rows by the independent uncertainty of training seeds, as `seed_error` gives it.

    The variances add; Student's t has the degrees of freedom of Welch ("The generalization of Student's problem when
    several different population variances are involved", 1947, eq. 28).
    """
    from scipy.stats import t

    parts = [(error, freedom) for error, freedom in seeds if error > 0]
    if not parts or not np.isfinite(rows.error):
        return rows
    every = [(rows.error, rows.freedom), *parts]
    variance = sum(error**2 for error, _ in every)
    freedom = variance**2 / sum(error**4 / degrees for error, degrees in every)
    upper = (1 + CONFIDENCE) / 2
    reach = float(t.ppf(upper, freedom) * np.sqrt(variance))
    if rows.error > 0:  # what the bootstrap found Student's t to be short of, over rows, holds here too
        reach *= (rows.high - rows.value) / float(t.ppf(upper, rows.freedom) * rows.error)
    return Interval(rows.value, rows.value - reach, rows.value + reach)
