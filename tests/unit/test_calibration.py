"""Short forms of benchmarks/calibration.py, each of which fails if a term of the intervals is dropped."""

import importlib.util

import numpy as np
import pytest

from qlora_helpers.evaluation import intervals
from qlora_helpers.evaluation.differences import contrast, difference, family
from qlora_helpers.files import ROOT

spec = importlib.util.spec_from_file_location("calibration", ROOT / "benchmarks" / "calibration.py")
calibration = importlib.util.module_from_spec(spec)
spec.loader.exec_module(calibration)


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    """A fifth of the resamples: thousands of intervals in seconds."""
    monkeypatch.setattr(intervals, "RESAMPLES", 2000)
    for cached in (intervals._all_resamples, intervals._student):
        cached.cache_clear()
    yield
    for cached in (intervals._all_resamples, intervals._student):
        cached.cache_clear()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def differs(change):
    return change.low > 0 or change.high < 0


def test_a_recipe_is_not_called_different_from_itself_on_other_draws(rng):
    """Without the seeds' variance, 194 of the 200 pairs differ; with a normal distribution for Student's, 27."""
    pairs = [calibration.same_recipe_pair(rng, 3) for _ in range(200)]
    assert sum(differs(difference(a, b)) for a, b in pairs) <= 16


def test_the_base_model_is_not_called_different_from_its_equal(rng):
    """Without the seeds' variance, 28 of the 200 pairs differ."""
    drawn = [calibration.draw_rows(rng, 100, equal=True) for _ in range(200)]
    pairs = [calibration.recipes(rng, rows, ("base", "100-rows"), ("draws", 3)) for rows in drawn]
    assert sum(differs(difference(a, b)) for a, b in pairs) <= 16


def test_the_verdicts_of_a_report_are_right_together(rng):
    """With intervals that each hold alone, 21 of the 100 reports have a wrong verdict."""
    reports = [calibration.report_pairs(rng, calibration.ONE) for _ in range(100)]
    assert sum(any(map(differs, family([pairs])[0])) for pairs in reports) <= 9


def test_rows_of_a_group_count_as_one(rng):
    """If groups are ignored, 41 of the 100 pairs differ."""
    pairs = [calibration.grouped_pair(rng, 30) for _ in range(100)]
    assert sum(differs(difference(a, b)) for a, b in pairs) <= 10


def test_recipes_on_the_same_draws_are_told_apart(rng):
    """If the runs of the two recipes are not paired by their draws, 29 of the 50 pairs are told apart."""
    drawn = [calibration.draw_rows(rng, 100, equal=True) for _ in range(50)]
    pairs = [
        calibration.recipes(rng, rows, ("100-rows-250-steps", "200-rows"), ("draws", 10), -0.012) for rows in drawn
    ]
    assert sum(difference(a, b).verdict == "better" for a, b in pairs) >= 45


@pytest.mark.parametrize("design", [("one run", 1), ("draws", 10)])
def test_the_detectable_effect_is_detected_four_times_in_five(rng, design):
    """An effect as large as the half-width of the interval is detected 57 and 53 times in 100."""

    def measured(effect):
        rows = calibration.draw_rows(rng, 100, equal=True)
        return contrast(calibration.recipes(rng, rows, ("base", "100-rows"), design, effect), [-1, 1]).interval

    effect = np.mean([measured(0).detectable for _ in range(50)])
    assert 70 <= sum(measured(-effect).high < 0 for _ in range(100)) <= 90


def test_seeds_of_one_draw_count_as_one(rng):
    """Six runs on three draws say as much as the three means; as six runs of their own, they seem to say more."""
    rows = calibration.draw_rows(rng, 100)
    draws = [draw for draw in rows.draws(rng, ("draws", 3)) for _ in range(2)]
    runs = rows.runs(rng, ("seeds", 6), draws)
    base = rows.arm("base")
    six = difference(base, rows.arm("100-rows", runs, (0, 0, 1, 1, 2, 2)))
    three = difference(base, rows.arm("100-rows", [(a + b) / 2 for a, b in zip(runs[::2], runs[1::2], strict=True)]))
    assert (six.seeds, six.value, six.low) == (3, pytest.approx(three.value), pytest.approx(three.low))
    other_order = rows.arm("100-rows", runs[::-1], (2, 2, 1, 1, 0, 0))
    assert contrast([base, other_order], [-1, 1]).interval.low == pytest.approx(six.low)


def test_noise_of_a_row_with_a_run_is_counted_once(rng):
    """Variance 1 of a row and 9 of a row with one of ten runs. Counted twice or not at all, it is 47% off."""

    def variance():
        runs = rng.normal(size=200) + rng.normal(scale=3, size=(10, 200))
        made = intervals.Estimate(runs.mean(axis=0), np.ones(200), {tuple(range(10)): runs})
        return made.row_error**2 + sum(error**2 for error, _ in made.seed_errors)

    assert np.mean([variance() for _ in range(100)]) == pytest.approx((1 + 9 / 10) / 200, rel=0.15)


def test_the_page_shows_the_recorded_tables():
    assert calibration.page() == (ROOT / calibration.PAGE).read_text("utf-8")
