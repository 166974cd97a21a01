"""Intervals against formulas, and how often they hold the truth."""

import tracemalloc
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from qlora_helpers.evaluation import intervals
from qlora_helpers.evaluation.intervals import Estimate, Interval


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
    assert result.high - result.value == pytest.approx(stats.t.ppf(0.975, 2) * 0.2 / 3**0.5, rel=1e-3)


def rows_by_seeds(rng, rows=500, seeds=3, by_row=0.0, by_seed=0.0):
    """Rows of one token, with noise of each row with each seed of standard deviation 1."""
    sums = by_row * rng.normal(size=rows) + by_seed * rng.normal(size=(seeds, 1)) + rng.normal(size=(seeds, rows))
    return Estimate(sums.mean(axis=0), np.ones(rows), {tuple(range(seeds)): sums})


def test_noise_of_rows_with_seeds_is_counted_once():
    """Here it is all there is, and the spread of the seeds has it."""
    estimate = rows_by_seeds(np.random.default_rng(0))
    over_rows = intervals.ratio(estimate.above, estimate.below).error
    assert over_rows == pytest.approx((1 / 3 / 500) ** 0.5, rel=0.1)
    assert estimate.row_error < 0.3 * over_rows
    varied = rows_by_seeds(np.random.default_rng(0), by_row=2)
    assert varied.row_error == pytest.approx(2 / 500**0.5, rel=0.1)


def test_the_variance_from_noise_of_rows_with_seeds_in_numbers():
    """Two rows and two seeds: residuals of 1/2 in four cells of a total of 2, so 4 x (1/4)² / (2 x 1) x 2/1."""
    estimate = Estimate(np.ones(2), np.ones(2), {(0, 1): np.eye(2)})
    assert estimate.crossed_variances == [pytest.approx(0.25)]


def test_few_rows_are_not_trusted_to_subtract_it():
    estimate = rows_by_seeds(np.random.default_rng(0), rows=intervals.FEW_ROWS - 1)
    assert estimate.row_error == pytest.approx(intervals.ratio(estimate.above, estimate.below).error)


@pytest.mark.parametrize("by_row", [0, 0.5, 3])
def test_three_seeds_and_many_rows_miss_at_most_as_often_as_they_say(by_row):
    rng, missed = np.random.default_rng(1), 0
    for _ in range(300):
        ((result,),) = intervals.simultaneous([[rows_by_seeds(rng, 100, by_row=by_row, by_seed=0.2)]])
        missed += not result.low <= 0 <= result.high
    assert missed <= 22  # 5% of 300, and two standard deviations


def test_one_more_verdict_widens_the_others():
    rng = np.random.default_rng(0)
    rows = [Estimate(rng.normal(size=100), np.ones(100)) for _ in range(11)]
    ((alone,),) = intervals.simultaneous([rows[:1]])
    ((first, *_),) = intervals.simultaneous([rows])
    sidak = stats.t.ppf((1 + 0.95 ** (1 / 11)) / 2, 99) / stats.t.ppf(0.975, 99)
    assert (first.high - first.low) / (alone.high - alone.low) == pytest.approx(sidak, rel=0.05)


def test_verdicts_that_are_one_verdict_are_not_widened():
    one = Estimate(np.random.default_rng(0).normal(size=100), np.ones(100))
    ((alone,),) = intervals.simultaneous([[one]])
    assert intervals.simultaneous([[one, one, one]]) == [[alone] * 3]


def test_other_rows_are_other_resamples():
    one = Estimate(np.random.default_rng(0).normal(size=100), np.ones(100))
    ((alone,),) = intervals.simultaneous([[one]])
    ((first,), (second,)) = intervals.simultaneous([[one], [one]])
    assert min(first.high, second.high) > alone.high + 0.05 * (alone.high - alone.value)


@pytest.mark.parametrize("rows", [1, 2])
def test_an_estimate_without_an_end_leaves_the_others_theirs(rows):
    """Half of the resamples of two rows are a single row, which has no error."""
    rng = np.random.default_rng(0)
    many = Estimate(rng.normal(size=100), np.ones(100))
    ((few,), (other,)) = intervals.simultaneous([[Estimate(rng.normal(size=rows), np.ones(rows))], [many]])
    ((alone,),) = intervals.simultaneous([[many]])
    assert (few.low, few.high, few.detectable) == (-np.inf, np.inf, np.inf)
    assert few.to_dict() == {"value": few.value, "low": None, "high": None, "detectable": None}
    for one in (few, Interval(0.2, 0.1, 0.3, detectable=0.15)):
        assert Interval.from_dict(one.to_dict()) == replace(one, error=0.0)
    assert Interval.from_dict({"value": 0.2, "low": 0.1, "high": 0.3}).detectable == 0  # of an older version
    assert other.high - other.low < 1.2 * (alone.high - alone.low)


def test_a_few_seeds_do_not_widen_a_verdict_that_has_none():
    rng = np.random.default_rng(0)
    sure = Estimate(rng.normal(size=100), np.ones(100))
    unsure = rows_by_seeds(rng, 100, by_seed=1)
    ((first, second),) = intervals.simultaneous([[sure, unsure]])
    assert (first.high - first.value) / first.error < 2.5
    assert (second.high - second.value) / second.error > 4.3


def test_rows_that_do_not_vary_are_sure_and_widen_nothing():
    varied = Estimate(np.random.default_rng(0).normal(size=50), np.ones(50))
    constant = Estimate(np.full(50, 0.1) * np.arange(1, 51), np.arange(1.0, 51))
    ((alone,),) = intervals.simultaneous([[varied]])
    ((first, second),) = intervals.simultaneous([[varied, constant]])
    assert first == alone
    assert (second.low, second.high) == (pytest.approx(0.1), pytest.approx(0.1))


def test_a_few_rows_that_vary_by_rounding_only_are_sure():
    interval = intervals.ratio([0.1, 0.2, 0.1 * 3], [1, 2, 3])
    assert interval.low == interval.high == pytest.approx(0.1)


def test_no_estimates_have_no_intervals():
    assert intervals.simultaneous([[], []]) == [[], []]


def test_an_empty_list_beside_another_changes_nothing():
    one = Estimate(np.arange(30.0), np.ones(30))
    assert intervals.simultaneous([[one], []])[0] == intervals.simultaneous([[one]])[0]


def test_many_rows_need_little_memory():
    """All resamples of 3,000 rows at once would be 240 MB."""
    rows = np.random.default_rng(0).normal(size=3000)
    tracemalloc.start()
    intervals.ratio(rows, np.ones(3000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def test_many_estimates_need_little_memory():
    """All resamples of 300 estimates at once would be 24 MB, and the sums they are made of five times as much."""
    rng = np.random.default_rng(0)
    family = [Estimate(rng.normal(size=100), np.ones(100)) for _ in range(300)]
    intervals.simultaneous([family[:1]])  # its resamples are kept
    tracemalloc.start()
    intervals.simultaneous([family])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


def test_estimates_that_are_resampled_apart_share_their_resamples(monkeypatch):
    rng = np.random.default_rng(0)
    families = [[Estimate(rng.normal(size=n), np.ones(n)) for _ in range(5)] for n in (60, 500)]
    together = intervals.simultaneous(families)
    monkeypatch.setattr(intervals, "_AT_ONCE", 2)
    for one, other in zip(chain(*together), chain(*intervals.simultaneous(families)), strict=True):
        assert (one.low, one.high) == pytest.approx((other.low, other.high), rel=1e-9)


@pytest.mark.parametrize("spread", [0, 1e-3, 1])
def test_the_bounds_are_those_of_all_deviations(spread):
    """Beran's definition, for deviations of which many are equal or infinite."""
    rng = np.random.default_rng(0)
    deviations = np.abs(rng.normal(size=(4, intervals.RESAMPLES)))
    deviations[1] = 0.5
    deviations[2] = np.round(deviations[2], 1)
    deviations[:, 5:] *= spread
    deviations[3, :400] = np.inf
    at_least = [stats.rankdata(-own, method="max") for own in deviations]  # how many of its own are as large
    rarest = np.min(at_least, axis=0).astype(int)
    allowed = np.sort(rarest)[round(0.05 * intervals.RESAMPLES)]
    balanced = intervals._Balanced()
    for own in deviations:
        balanced.add(own)
    assert balanced.bounds() == [np.sort(own)[-allowed] for own in deviations]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-1e3, 1e3), st.integers(1, 1000)), min_size=1, max_size=30),
    st.integers(0, 3),
)
def test_any_rows_and_seeds_have_an_interval_around_their_value(rows, seeds):
    above, below = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    shifts = np.linspace(0, 1, seeds)[:, None] * below
    estimate = Estimate(above, below, {(1, 2, 3): above + shifts} if seeds > 1 else {})
    ((result,),) = intervals.simultaneous([[estimate]])
    assert result.low <= result.value <= result.high
    assert not np.isnan(result.error)
    assert result.detectable >= 0


def test_a_share_of_none_is_not_surely_none():
    result = intervals.share(0, 20)
    assert (result.value, result.low) == (0, pytest.approx(0))
    assert result.high == pytest.approx(0.1611, abs=1e-3)  # Wilson: z²/(n + z²)
