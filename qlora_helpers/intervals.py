"""95% intervals: over held-out rows by a studentised bootstrap, over training seeds by Student's t, and both."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


def ratio(numerators: Sequence[float] | np.ndarray, denominators: Sequence[float] | np.ndarray) -> Interval:
    """The ratio of two sums over rows, rows drawn with replacement: a mean per token, where the second are tokens.

    Studentised bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, eq. 12.22; the standard
    error of a ratio from Cochran, "Sampling Techniques", 1977, eq. 6.13): a percentile interval of 64 rows covers less
    than it says. `benchmarks/calibration.py` measures this one. 10,000 resamples, fixed seed.
    """
    above, below = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    n = len(above)
    value, error = _ratio_and_error(np.ones((1, n)), above, below)
    if n < 2:  # one row says nothing about other rows
        return Interval(float(value[0]), -np.inf, np.inf)
    if np.ptp(above / below) < 1e-12:  # every resample gives the same: there is no error to divide by
        return Interval(float(value[0]), float(value[0]), float(value[0]))
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)  # how often each row is drawn
    values, errors = _ratio_and_error(drawn, above, below)
    with np.errstate(divide="ignore", invalid="ignore"):  # few rows: a resample may hold a single one
        studentised = np.nan_to_num((values - value) / errors, posinf=np.inf, neginf=-np.inf)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(studentised, [1 - tail, tail], method="inverted_cdf")
    return Interval(float(value[0]), float(value[0] - low * error[0]), float(value[0] - high * error[0]))


def _ratio_and_error(drawn: np.ndarray, above: np.ndarray, below: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ratio of sums and its standard error, for each line of `drawn`: (resamples, rows) counts."""
    n = drawn.shape[1]
    total = drawn @ below
    value = (drawn @ above) / total
    squares = drawn @ above**2 - 2 * value * (drawn @ (above * below)) + value**2 * (drawn @ below**2)
    return value, np.sqrt(np.maximum(squares, 0) * n / max(n - 1, 1)) / total


def share(count: int, of: int) -> Interval:
    """A share of rows with Wilson's interval (1927), which holds for shares near 0 and 1 too."""
    from scipy.stats import binomtest

    low, high = binomtest(count, of).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(count / of, float(low), float(high))


def seed_reach(per_seed: Sequence[float]) -> float:
    """Half width of the 95% interval of a mean over training seeds; 0 for one seed, which says nothing of others."""
    from scipy import stats

    n = len(per_seed)
    if n < 2:
        return 0.0
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(per_seed, ddof=1) / np.sqrt(n))


def widen(rows: Interval, *reaches: float) -> Interval:
    """An interval over rows with independent further uncertainty: the distances add in squares.

    Zou and Donner, "Construction of confidence limits about effect measures", Statistics in Medicine 27 (2008), eq. 7.
    """
    more = sum(reach**2 for reach in reaches)
    low = rows.value - np.sqrt((rows.value - rows.low) ** 2 + more)
    high = rows.value + np.sqrt((rows.high - rows.value) ** 2 + more)
    return Interval(rows.value, float(low), float(high))
