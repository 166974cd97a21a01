"""Paired differences: the published numbers, the claimed coverage, and what Holm's correction leaves."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_helpers import UserError
from qlora_helpers.evaluation import paired
from qlora_helpers.evaluation.intervals import share
from qlora_helpers.evaluation.paired import MetricDifference, holm, matched, newcombe, ratio

COUNTS = st.tuples(*[st.integers(0, 60)] * 4).filter(any)


def made(p, low=0.1):
    return MetricDifference("x", 0.0, 0.2, 0.2, low, 0.3, p, 50, 50)


def test_the_interval_of_paired_shares_is_newcombes():
    """His table II, method 10, for 36, 12, 2 and 0 pairs."""
    result = newcombe(36, 2, 12, 0)
    assert (result.value, result.low, result.high) == pytest.approx((0.2, 0.0569, 0.3404), abs=5e-5)


def test_a_correlation_within_the_continuity_correction_counts_as_none():
    """1 × 12 − 1 × 7 is below 21 / 2, so that the shares are compared as independent ones, by Newcombe's method 10."""
    result, a, b = newcombe(1, 1, 7, 12), share(2, 21), share(8, 21)
    reach = math.hypot(b.value - b.low, a.high - a.value), math.hypot(b.high - b.value, a.value - a.low)
    assert (result.value - result.low, result.high - result.value) == pytest.approx(reach)


@given(COUNTS)
def test_newcombes_interval_contains_its_value_and_turns_around_with_the_models(counts):
    both, only_a, only_b, none = counts
    result, other = newcombe(both, only_a, only_b, none), newcombe(both, only_b, only_a, none)
    assert -1 - 1e-12 <= result.low <= result.value <= result.high <= 1 + 1e-12
    assert (other.low, other.high) == pytest.approx((-result.high, -result.low))


def test_pairing_shortens_the_interval_of_shares_that_go_together():
    a, b = share(50, 100), share(60, 100)
    alone = math.hypot(b.value - b.low, a.high - a.value) + math.hypot(b.high - b.value, a.value - a.low)
    result = newcombe(48, 2, 12, 38)
    assert result.high - result.low < 0.7 * alone


def test_the_interval_of_paired_shares_covers_the_true_difference():
    """In 2,000 samples of 60 pairs: 95% within what so many samples can tell."""
    samples = np.random.default_rng(0).multinomial(60, [0.5, 0.05, 0.2, 0.25], size=2000).tolist()
    ends = [newcombe(*counts) for counts in set(map(tuple, samples))]
    inside = {counts: end.low <= 0.15 <= end.high for counts, end in zip(set(map(tuple, samples)), ends, strict=True)}
    assert 0.935 <= np.mean([inside[tuple(counts)] for counts in samples]) <= 0.975


def test_mcnemars_mid_p_counts_what_was_observed_by_half():
    """Of 1 and 7 discordant pairs: 2 × (1 + 8) / 2⁸ exactly, less the probability 8 / 2⁸ of the pairs observed."""
    assert paired._mid_p(1, 7) == pytest.approx(10 / 256)
    assert paired._mid_p(7, 1) == paired._mid_p(1, 7)
    assert paired._mid_p(0, 0) == 1


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemars_mid_p_is_a_probability(a, b):
    assert 0 <= paired._mid_p(a, b) <= 1 + 1e-12


def test_a_mean_is_compared_answer_by_answer():
    """Two models that differ by little on answers that differ by much."""
    level = np.linspace(0, 0.9, 40)
    step = 0.05 + 0.01 * np.sin(np.arange(40))
    result = ratio("ROUGE-L", level, level + step, [""] * 40)
    assert result.value == pytest.approx(step.mean())
    assert 0.04 < result.low < result.high < 0.06
    assert result.p < 0.001


def test_the_interval_and_the_p_value_agree_about_zero():
    rng = np.random.default_rng(1)
    for shift in (0.0, 0.1, 0.2, 0.25, 0.3, 0.5):
        result = ratio("x", np.zeros(30), rng.normal(shift, 0.6, 30), [""] * 30)
        assert (result.p <= 0.05) == (not result.low <= 0 <= result.high), shift


def test_answers_of_one_document_count_as_one():
    a, b = np.zeros(40), np.repeat(np.random.default_rng(0).normal(0.3, 1, 8), 5)
    alone, together = (ratio("x", a, b, groups) for groups in ([""] * 40, [str(i // 5) for i in range(40)]))
    assert (alone.clusters, together.clusters) == (40, 8)
    assert together.value == pytest.approx(alone.value)
    assert together.high - together.low > 1.5 * (alone.high - alone.low)
    shares = [paired.share("x", a > 1, b > 0, groups) for groups in ([""] * 40, [str(i // 5) for i in range(40)])]
    assert [one.clusters for one in shares] == [40, 8]


def test_two_equal_differences_are_no_evidence():
    assert ratio("x", [0, 0], [1, 1], ["", ""]).p == 0.5
    assert not holm([ratio("x", [0, 0], [1, 1], ["", ""])])[0].remains
    assert ratio("x", [0], [1], [""]).p == 1


def test_holm_compares_the_smallest_p_value_with_a_share_of_the_level():
    """Level 5% over four: 0.0125, 0.0167, 0.025, 0.05, until one is above."""
    kept = holm([made(0.016), made(0.04), made(0.012), made(0.03)])
    assert [one.remains for one in kept] == [True, False, True, False]
    assert {one.family for one in kept} == {4}
    assert holm([made(0.04)])[0].remains
    assert not holm([made(0.04, low=-0.1)])[0].remains
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_keeps_no_more_than_without_correction_and_no_fewer_than_bonferroni(ps):
    kept = holm([made(p) for p in ps])
    for p, one in zip(ps, kept, strict=True):
        assert not one.remains or p <= paired.ALPHA
        assert one.remains or p > paired.ALPHA / len(ps)


def test_a_difference_survives_being_written():
    for one in (ratio("x", [0, 1, 1], [1, 1, 0], [""] * 3), ratio("x", [0], [1], [""])):
        assert MetricDifference.from_dict(one.to_dict()) == one
    assert ratio("x", [0], [1], [""]).to_dict()["high"] is None
    assert "no end" in str(ratio("x", [0], [1], [""]))
    (alone,) = holm([ratio("x", [0], [1], [""])])
    assert alone.to_dict()["detectable"] is None
    assert MetricDifference.from_dict(alone.to_dict()) == alone
    assert str(alone).endswith("no difference would be detected with so few answers")
    older = {key: value for key, value in made(0.04).to_dict().items() if key != "detectable"}
    assert MetricDifference.from_dict(older).limit == ""


def test_the_detectable_difference_remains_four_times_in_five():
    """Alone, and as the only true one of seven. With half of the interval's width, 51 and 12 of 100 would remain."""
    rng = np.random.default_rng(0)

    def corrected(family, effect, times):
        zero = [made(1.0, low=-0.1)] * (family - 1)
        drawn = [ratio("x", np.zeros(60), rng.normal(effect, 0.6, 60), [""] * 60) for _ in range(times)]
        return [holm([one, *zero])[0] for one in drawn]

    for family in (1, 7):
        effect = np.mean([one.detectable for one in corrected(family, 0.0, 20)])
        assert 70 <= sum(one.remains for one in corrected(family, effect, 100)) <= 90


def test_the_detectable_share_remains_four_times_in_five():
    rng = np.random.default_rng(0)

    def measured(p):
        answers = rng.random((2, 200)) < np.array([[0.3], [p]])
        return holm([paired.share("x", *answers, [""] * 200)])[0]

    effect = np.mean([measured(0.3).detectable for _ in range(100)])
    assert 70 <= sum(measured(0.3 + effect).remains for _ in range(100)) <= 90


def test_other_questions_are_refused_and_fewer_answers_are_not():
    rows = [{"prompt": str(i), "reference": "r"} for i in range(3)]
    assert len(matched(rows, rows[:2])) == 2
    with pytest.raises(UserError, match=r"different questions.*Fix:"):
        matched(rows, rows[1:])
    with pytest.raises(UserError, match=r"different questions.*Fix:"):
        matched(rows, [row | {"reference": "s"} for row in rows])
    with pytest.raises(UserError, match=r"different questions.*Fix:"):
        matched(rows, [row | {"tests": "assert f(2) == 4"} for row in rows])
