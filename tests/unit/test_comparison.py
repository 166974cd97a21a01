"""Verdicts that follow from intervals, and a report that its data cannot break."""

import random
import warnings

import pytest

from qlora_helpers import UserError, comparison
from qlora_helpers.comparison import Difference
from qlora_helpers.evaluation import RowLoss


def losses(per_token, tokens=(20, 30, 50, 10, 40, 25)):
    return [RowLoss(str(i), loss * n, n) for i, (loss, n) in enumerate(zip(per_token, tokens, strict=False))]


BASE = losses([2.0, 2.5, 1.8, 2.2, 2.4, 2.1])


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.2, -0.1, "better"),
        (0.1, 0.2, "worse"),
        (-0.1, 0.1, "not distinguishable"),
        (-0.1, 0.0, "not distinguishable"),
        (0.0, 0.1, "not distinguishable"),
        (0.0, 0.0, "not distinguishable"),
    ],
)
def test_the_verdict_follows_from_the_interval(low, high, verdict):
    found = Difference("base", "exp1", (low + high) / 2, low, high)
    assert found.verdict == verdict
    assert f"exp1 is {verdict} " in str(found)


@pytest.mark.parametrize(
    ("shifts", "verdict"),
    [
        ([-0.3, -0.2, -0.4, -0.3, -0.2, -0.3], "better"),
        ([0.3, 0.2, 0.4, 0.3, 0.2, 0.3], "worse"),
        ([-0.3, 0.2, -0.1, 0.3, -0.2, 0.1], "not distinguishable"),
    ],
)
def test_differences(shifts, verdict):
    other = losses([a.loss_sum / a.tokens + shift for a, shift in zip(BASE, shifts, strict=True)])
    found = comparison.difference("base", BASE, "exp1", other)
    assert found.verdict == verdict
    assert found.low <= found.value <= found.high
    tokens = [row.tokens for row in BASE]
    assert found.value == pytest.approx(sum(s * n for s, n in zip(shifts, tokens, strict=True)) / sum(tokens))
    back = comparison.difference("exp1", other, "base", BASE)
    assert back.value == pytest.approx(-found.value)
    assert comparison.difference("base", BASE, "exp1", other) == found  # the same interval each time


def test_identical_losses_are_not_distinguishable():
    found = comparison.difference("a", BASE, "b", list(BASE))
    assert (found.value, found.low, found.high) == (0, 0, 0)
    assert found.verdict == "not distinguishable"


def test_the_same_gain_on_every_token_is_a_gain():
    """Every resample gives the same difference: the interval is that one value, not no number."""
    other = [RowLoss(row.id, row.loss_sum - 0.5 * row.tokens, row.tokens) for row in BASE]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = comparison.difference("a", BASE, "b", other)
    assert found.verdict == "better"


def test_one_row_says_nothing_about_others():
    found = comparison.difference("a", BASE[:1], "b", losses([1.0]))
    assert found.verdict == "not distinguishable"


@pytest.mark.parametrize("rows", [2, 3, 5, 100])
def test_intervals_contain_their_value(rows):
    draw = random.Random(rows)
    tokens = [draw.randint(1, 200) for _ in range(rows)]
    a = losses([draw.gauss(2, 0.5) for _ in range(rows)], tokens)
    b = losses([draw.gauss(2, 0.5) for _ in range(rows)], tokens)
    found = comparison.difference("a", a, "b", b)
    assert found.low <= found.value <= found.high


@pytest.mark.parametrize(
    "other", [BASE[:-1], BASE[::-1], [RowLoss("x", 1, 20), *BASE[1:]], [RowLoss("0", 40, 21), *BASE[1:]]]
)
def test_other_rows_are_refused(other):
    with pytest.raises(UserError, match="different held-out rows"):
        comparison.difference("a", BASE, "b", other)


NASTY = "```python\nprint('<script>alert(1)</script>')\n```\n# Heading\n| a | b |"


def result(answer="fine", prompt="Why?"):
    """What `compare` gives, made by hand."""
    line = {"heldout_loss": 2.0, "answers_that_stop": "1 of 4"}
    figures = {"train_rows": 32, "steps": 8, "train_loss": 1.5, "seconds": 30.0}
    figures |= {"tokens_per_second": 1234.5, "peak_memory_gib": 1.25}
    return {
        "heldout_rows": 6,
        "heldout_tokens": 175,
        "heldout_fingerprint": "abc",
        "device": {"name": "a CPU", "dtype": "bfloat16", "reason": "no GPU"},
        "versions": {"torch": "2"},
        "table": [{"name": "base", **line, **dict.fromkeys(figures)}, {"name": "exp1", **line, **figures}],
        "differences": [{"text": "exp1 is better than base"}],
        "answers": [{"prompt": prompt, "base": "", "exp1": answer}],
    }


def test_the_table_has_a_line_a_run():
    lines = comparison.table_markdown(result()).splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {10}
    assert lines[2].startswith("| base | – |")
    assert "1,234" in lines[3] or "1,235" in lines[3]


def test_report_holds_table_verdicts_figures_and_answers():
    report = comparison.report_markdown(result(), ["figures/loss_curves.png"])
    assert comparison.table_markdown(result()) in report
    assert "- exp1 is better than base." in report
    assert "![loss curves](figures/loss_curves.png)" in report
    assert "- *exp1*: `fine`" in report
    assert "- *base*: (empty)" in report


def outside_code(report):
    """The report without what stands between backticks, where Markdown and HTML have no effect."""
    return "".join(report.split("`")[::2])


def test_an_answer_stays_on_one_line_and_without_effect():
    plain = comparison.report_markdown(result(), [])
    report = comparison.report_markdown(result(answer=NASTY), [])
    assert report.count("\n") == plain.count("\n")
    assert "<script>" in report
    assert "<script>" not in outside_code(report)


def test_so_does_a_prompt():
    report = comparison.report_markdown(result(prompt=NASTY), [])
    assert report.count("\n") == comparison.report_markdown(result(), []).count("\n")
    assert "<script>" not in outside_code(report)
