"""Intervals against formulas, and how often they hold the truth."""

import numpy as np
import pytest
from scipy import stats

from qlora_helpers.evaluation import intervals
from qlora_helpers.evaluation.intervals import Estimate


def test_the_ratio_and_its_error():
    """Two rows: 1 of 2 and 5 of 4. Residuals from 6/6 are -1 and 1, so the error is sqrt(2/1 x 2) / 6."""
    result = intervals.ratio([1, 5], [2, 4])
    assert result.value == 1
    assert result.error == pytest.approx(2 / 6)


def test_normal_rows_give_students_interval():
    """Where Student's t is right, the bootstrap finds it."""
    rows = np.random.default_rng(0).normal(size=200)
    result = intervals.ratio(rows, np.ones(200))
    student = stats.t.interval(0.95, 199, rows.mean(), rows.std(ddof=1) / np.sqrt(200))
    assert (result.low, result.high) == pytest.approx(student, abs=0.05 * (student[1] - student[0]))


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """A short form of benchmarks/calibration.py, with rows of unequal length and heavy tails."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        tokens = rng.integers(5, 256, 64)
        result = intervals.ratio(tokens * rng.standard_t(5, 64), tokens)
        held += result.low <= 0 <= result.high
    assert 0.92 <= held / 400 <= 0.98


def test_seeds_widen_by_student():
    """Rows that all shift alike leave the spread of three seeds alone: Student's t with two degrees of freedom."""
    base = np.full(50, 2.0)
    seeds = np.array([[shift] * 50 for shift in (-0.2, 0.0, 0.2)])
    estimate = Estimate(base + seeds.mean(axis=0), np.ones(50), {(0, 1, 2): base + seeds})
    ((result,),) = intervals.simultaneous([[estimate]])
    assert result.high - result.value == pytest.approx(stats.t.ppf(0.975, 2) * 0.2 / 3**0.5)


def test_a_share_of_none_is_not_surely_none():
    result = intervals.share(0, 20)
    assert (result.value, result.low) == (0, pytest.approx(0))
    assert result.high == pytest.approx(0.1611, abs=1e-3)  # Wilson: z²/(n + z²)
