"""The line through the sizes against numbers worked out by hand, how often its interval holds the truth, its words."""

import numpy as np
import pytest

from qlora_helpers import UserError
from qlora_helpers.evaluation import learning_curve
from qlora_helpers.evaluation.differences import Arm, Difference
from qlora_helpers.evaluation.learning_curve import Curve
from qlora_helpers.evaluation.losses import RowLoss

TOKENS = (20, 30, 50, 10, 40, 25)


def arm(name, *seeds, tokens=TOKENS):
    """An arm from per-token losses, a list a seed; a number is the loss of every row."""
    spread = [np.broadcast_to(np.asarray(seed, dtype=float), len(tokens)) for seed in seeds]
    rows = [[RowLoss(str(i), x * n, n, 0) for i, (x, n) in enumerate(zip(s, tokens, strict=True))] for s in spread]
    return Arm(name, rows)


def drawn(losses, base=3.0):
    return Curve("curve", arm("base", base), {rows: arm(f"{rows} rows", loss) for rows, loss in losses.items()})


def test_three_sizes_by_hand():
    """Through 2, 4 and 8 rows the slope is half of last less first, and the bend last - 2 x middle + first."""
    result = drawn({2: 2.0, 4: 1.9, 8: 1.4})
    assert result.doubling.value == pytest.approx((1.4 - 2.0) / 2)
    assert result.bend.value == pytest.approx(1.4 - 2 * 1.9 + 2.0)
    mean = (2.0 + 1.9 + 1.4) / 3
    assert result.at(4).value == pytest.approx(mean - 3.0)
    assert result.at(8).value == pytest.approx(mean - 0.3 - 3.0)
    assert {rows: d.value for rows, d in result.points.items()} == pytest.approx({2: -1.0, 4: -1.1, 8: -1.6})


def test_rows_weigh_by_their_tokens():
    """Row 1 has 50 of 100 tokens, the others 30 and 20; it alone gains, 0.2 a doubling."""
    tokens = (50, 30, 20)
    sizes = {2: arm("2", [2.0, 2.0, 2.0], tokens=tokens), 4: arm("4", [1.8, 2.0, 2.0], tokens=tokens)}
    result = Curve("curve", arm("base", 3.0, tokens=tokens), sizes)
    assert result.doubling.value == pytest.approx(-0.1)
    assert result.bend is None
    assert result.doubling.rows == 3


def test_a_true_line_is_found_at_any_spacing():
    result = drawn({rows: 2.5 - 0.07 * np.log2(rows) for rows in (25, 50, 100, 283, 800)})
    assert result.doubling.value == pytest.approx(-0.07)
    assert result.bend.value == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_interval_holds_the_true_slope_as_often_as_it_says(seeds):
    """Rows of unequal length and difficulty; each seed of each size shifts all rows, and each row a little."""
    rng, truth, held, trials = np.random.default_rng(seeds), -0.02, 0, 300
    tokens = rng.integers(5, 256, 64)
    for _ in range(trials):
        hard, own = rng.normal(2.2, 0.5, 64), rng.normal(0, 0.05, 64)
        arms = {}
        for rows in (25, 50, 100, 200):
            shifts = rng.normal(0, 0.04, seeds) if seeds > 1 else np.zeros(1)  # one seed speaks of itself alone
            level = hard + (truth + own) * np.log2(rows / 25)
            arms[rows] = arm("size", *(level + s + rng.normal(0, 0.03, 64) for s in shifts), tokens=tokens)
        result = Curve("curve", arm("base", hard, tokens=tokens), arms).doubling
        held += result.low <= truth <= result.high
        assert result.seeds == seeds
    assert 0.915 <= held / trials <= 0.985


def noisy(slope, bend=0.0):
    """Sizes 2, 4 and 8 whose rows differ in what they gain, by up to 0.02 a doubling, and in how that changes."""
    own = np.array([0.02, -0.02, 0.01, -0.01, 0.015, -0.015])
    return drawn({2**x: 2.0 + slope * x + bend * x**2 + own * x + own[::-1] * (x - 2) ** 2 / 5 for x in (1, 2, 3)})


@pytest.mark.parametrize(
    ("slope", "words"),
    [
        (-0.1, "lowers the held-out loss\n(-0.0"),
        (0.1, "raises the held-out loss\n(+0.1"),
        (0.0, "makes no distinguishable difference to the held-out loss\n("),
    ],
)
def test_what_doubling_buys_in_words(slope, words):
    result = noisy(slope)
    assert f"curve: each doubling of the rows {words}" in str(result)
    assert f"95% interval {result.doubling.low:+.4f} to {result.doubling.high:+.4f}" in str(result)
    share = result.doubling.value / 3.0
    assert f"{share:+.2%} of the base model's loss" in str(result)


@pytest.mark.parametrize(
    ("bend", "words"),
    [(0.03, "brings less than"), (-0.03, "brings more than"), (0.0, "may bring as much")],
)
def test_a_bend_is_told(bend, words):
    assert words in str(noisy(-0.2, bend)).splitlines()[2]


def test_runs_that_learned_nothing_show_nothing():
    """The factors of a parabola do not cancel to the last bit; what they leave is no finding."""
    result = drawn(dict.fromkeys((25, 50, 100, 283), 2.1), base=2.1)
    assert {result.doubling.verdict, result.bend.verdict} == {"not distinguishable"}
    assert result.at(70).value == 0


def test_other_heldout_rows_are_refused():
    sizes = {2: arm("2 rows", 2.0), 4: arm("4 rows", [1.9] * 5, tokens=TOKENS[:5])}
    with pytest.raises(UserError, match="were measured on different held-out rows"):
        _ = Curve("curve", arm("base", 3.0), sizes).doubling


def difference(name, value, reach):
    return Difference(learning_curve.BASE_SETTING, name, value, value - reach, value + reach, rows=6, seeds=1)


def test_the_largest_difference_that_is_one_mattered_most():
    small, large, unsure = difference("rank 8", -0.1, 0.05), difference("rank 2", 0.2, 0.1), difference("x", -0.9, 1)
    assert learning_curve.largest_effect([small, unsure, large]).startswith(
        "Largest effect: rank 2 is worse than the base set"
    )
    assert learning_curve.largest_effect([unsure]) == "None of the 1 settings is distinguishable from the base setting."
    assert learning_curve.largest_effect([]) == "No setting was changed."
