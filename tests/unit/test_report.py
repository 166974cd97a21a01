"""The report: tables, verdicts and limits in words, and a page that its data cannot break."""

import math
from dataclasses import replace

import pytest

from qlora_helpers import files
from qlora_helpers.evaluation import answer_metrics, comparison, markup, report
from qlora_helpers.evaluation.answer_metrics import AnswerDifferences
from qlora_helpers.evaluation.comparison import Comparison, Summary
from qlora_helpers.evaluation.differences import Difference
from qlora_helpers.evaluation.intervals import Interval
from qlora_helpers.evaluation.paired import MetricDifference
from qlora_helpers.evaluation.verdict_table import verdict_table

NASTY = "```python\nprint('<script>alert(1)</script>')\n```\n# Heading\n| a | b | [x](javascript:alert(1))"


def result(answer="fine", prompt="Why?", seeds=(0,), gap=(0.1, 0.05, 0.2), rouge=(0.123, 0.1, 0.2)):
    """What `compare` returns, made by hand."""
    figures = {"train_rows": 32, "steps": 8, "epochs": 1, "train_loss": 1.5, "seconds": 30.0}
    figures |= {"tokens_per_second": 1234.5, "peak_memory_gib": 1.25}
    loss = {"heldout_loss": 2.0, "heldout_loss_by_seed": [2.0]}
    texts = [{"ROUGE-L": Interval(*rouge), "BLEU": Interval(12.34, -math.inf, 15)} for _ in range(2)]
    return Comparison(
        heldout_rows=6,
        heldout_tokens=175,
        heldout_fingerprint="abc",
        unit="token",
        device={"name": "a CPU", "dtype": "bfloat16", "reason": "no GPU"},
        versions={"torch": "2"},
        model={"name": "tiny", "revision": "main"},
        data="/somewhere/rows.jsonl",
        table=[
            Summary("base", "base", [], **loss, **dict.fromkeys(figures), text=texts[0]),
            Summary("exp1", "exp1", list(seeds), **loss, **figures, text=texts[1]),
        ],
        differences=[Difference("base", "exp1", -0.2, -0.3, -0.1, rows=6, seeds=len(seeds))],
        forgetting=[Difference("base", "exp1", *gap, rows=48, seeds=1)],
        answers=[{"prompt": prompt, "base": "", "exp1": answer}],
    )


def test_a_comparison_is_read_back_as_it_was_written(tmp_path):
    one = MetricDifference("length", 0.4, 0.5, 0.1, -math.inf, math.inf, 1.0, 1, 1, 2, False, math.inf)
    written = replace(
        result(gap=(0.1, -math.inf, math.inf)),
        answer_differences=[AnswerDifferences("base", "exp1", [one])],
        at_limit={"reference at the limit, 24 tokens": {"BLEU": Interval(45, -math.inf, 50, detectable=math.inf)}},
    )
    files.write_json(tmp_path / "comparison.json", written.to_dict())
    assert comparison.read(tmp_path) == written


def test_the_table_has_a_line_a_run():
    lines = report.table_markdown(result()).splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {9}
    assert lines[2].startswith("| base | – |")
    assert "1,234" in lines[3] or "1,235" in lines[3]
    assert "| 2 |" in report.table_markdown(result(seeds=(0, 1))).splitlines()[3]


def test_text_metrics_have_intervals():
    assert "| exp1 | 0.12 (0.10 to 0.20) | 12.3 (– to 15.0) |" in report.text_table_markdown(result())
    unbounded = result(rouge=(0.123, -math.inf, math.inf))
    assert "| exp1 | 0.12 (no interval) | 12.3" in report.text_table_markdown(unbounded)


def test_report_holds_table_verdicts_figures_and_answers():
    text = report.markdown(result(), ["figures/loss_curves.png"])
    assert report.table_markdown(result()) in text
    assert "| exp1 | **better** | base | -0.2000 (-0.3000 to -0.1000) | -18.1% |  |" in text
    assert "![loss curves](figures/loss_curves.png)" in text
    assert "- *exp1*: `fine`" in text
    assert "- *base*: (empty)" in text
    assert "/somewhere" not in text


def test_the_table_of_verdicts_names_what_each_shows():
    unsure = Difference("base, 16 bits", "exp1", 0.02, -0.1, 0.14, rows=4, tokens=90, seeds=1, detectable=0.15)
    first = replace(result(), quantizing=Difference("base, 16 bits", "base", 0.1, 0.05, 0.2, rows=6, seeds=1))
    made = replace(first, differences=[*first.differences, unsure], best_rival={"exp1": "base, 16 bits"})
    lines = verdict_table(made).splitlines()[2:]
    assert lines == [
        "| base | **worse** | base, 16 bits | +0.1000 (+0.0500 to +0.2000) | +10.5% | what quantizing cost |",
        "| exp1 | **better** | base | -0.2000 (-0.3000 to -0.1000) | -18.1% | what training won back |",
        "| exp1 | not distinguishable | base, 16 bits | +0.0200 (-0.1000 to +0.1400) | +2.0% | the best rival; "
        "detectable: 0.1500; 4 of 6 rows, 90 tokens |",
    ]
    assert verdict_table(replace(made, differences=[], quantizing=None)) == ""
    assert report._drawn(made)[0] == [made.quantizing, *made.differences]  # the figure counts what the table counts
    assert "perplexity" not in verdict_table(replace(made, unit="byte"))


def test_the_table_of_verdicts_keeps_open_ends_and_margins_apart():
    open_ended = Difference("base", "exp1", 0.1, -math.inf, math.inf, rows=6, seeds=1, detectable=math.inf)
    same = Difference("base", "exp1", 0.01, -0.02, 0.03, rows=6, seeds=1, margin=0.05)
    lines = verdict_table(replace(result(), differences=[open_ended, same])).splitlines()[2:]
    assert lines[0].endswith(
        "| not distinguishable | base | +0.1000 (no end to no end) | +10.5% | no effect is detectable |"
    )
    assert lines[1] == "| exp1 | the same | base | +0.0100 (-0.0200 to +0.0300) | +1.0% | within ±0.05 |"


@pytest.mark.parametrize(
    ("seeds", "runs", "says"),
    [
        ((0,), {}, "these adapters only"),
        ((0, 1, 2), {"draws": 3}, "exp1: 3 draws of 32 training rows, one seed each"),
        ((0, 1, 2), {"all_rows": True}, "3 seeds on all 32 training rows, so that draws cannot vary"),
        ((0, 1, 2), {}, "1 draw of 32 training rows). Where there is one draw, they do not cover others"),
        ((0, 1, 2, 3), {"draws": 2}, "4 seeds on 2 draws of 32 training rows"),
    ],
)
def test_how_far_a_verdict_reaches(seeds, runs, says):
    made = result(seeds=seeds)
    made.table[-1] = replace(made.table[-1], **runs)
    assert says in report.scope(made)


@pytest.mark.parametrize(
    ("gap", "says"),
    [
        (
            (0.1, 0.05, 0.2),
            "rose (+0.1000 nats, 95% interval +0.0500 to +0.2000; +10.5% perplexity; it rose on 31 of",
        ),
        ((-0.1, -0.2, -0.05), "fell (-0.1000"),
        ((0.1, -0.1, 0.3), "did not change distinguishably (+0.1000"),
    ],
)
def test_forgetting_in_words(gap, says):
    made = replace(result(gap=gap), rose={"exp1": 31})
    assert says in report.forgetting(made)[0]
    assert "nothing" not in report.forgetting(made)[0]


def test_what_could_have_been_detected_is_stated():
    missed = Difference("base", "exp1", 0.1, -0.1, 0.3, rows=48, seeds=1, tokens=900, detectable=0.29)
    (line,) = report.forgetting(replace(result(), forgetting=[missed]))
    assert "48 general questions (900 tokens)" in line
    assert "an effect of 0.2900 would be detected" in line
    nothing = replace(missed, detectable=math.inf)
    assert "no effect would be detected with so few rows" in str(nothing)
    within = replace(missed, low=0.05, high=0.12, margin=0.2)
    assert "stayed within ±0.2 (" in report.forgetting(replace(result(), forgetting=[within]))[0]


def test_missing_rivals_and_the_size_of_the_family_are_stated():
    made = replace(result(), absent={"base, 16 bits": "it needs 16.1 GiB of memory, and 14.6 are there"})
    text = report.markdown(made, [])
    assert "Rivals that were not measured: base, 16 bits (it needs 16.1 GiB" in text
    assert "These verdicts rest on 6 held-out rows with 175 scored tokens." in text
    assert "hold at once" not in text  # of an older version


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (
            -0.3,
            -0.1,
            "lower with rehearsal than without (-0.2000 nats, 95% interval -0.3000 to",
        ),
        (0.1, 0.3, "higher with rehearsal than without (+0.2000"),
        (-0.1, 0.3, "not distinguishable with rehearsal and without: no effect of it shows (+0.1000"),
        (-math.inf, math.inf, "no effect of it shows (+0.1000 nats, 95% interval no end to no end)"),
    ],
)
def test_rehearsal_in_words(low, high, says):
    value = (low + high) / 2 if math.isfinite(low) else 0.1
    assert says in report.rehearsal(Difference("without", "with", value, low, high, rows=48, seeds=1))


def thoughts(*counts):
    """Answers to 20 questions by two models, which think before the first `counts` of them."""
    asked = {"reference": "r", "answer": "r", "stopped": True, "invented": False}
    return {
        name: [asked | {"prompt": str(i), "thought": "Hm." * (i < count)} for i in range(20)]
        for name, count in zip(("base", "exp1"), counts, strict=True)
    }


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ((20, 0), "exp1 stopped thinking, unlike base: a thought precedes 0% of its answers instead of 100% (-1.00"),
        ((20, 8), "exp1 thinks less often than base: a thought precedes 40% of its answers instead of 100% (-0.60"),
        ((0, 20), "exp1 thinks more often than base: a thought precedes 100% of its answers instead of 0% (+1.00"),
        ((10, 8), ""),  # not distinguishable
    ],
)
def test_the_report_says_who_thinks_more_or_less(counts, says):
    found = answer_metrics.between(thoughts(*counts), [("base", "exp1")])
    made = replace(result(), answered=20, answer_differences=found)
    text = report.markdown(made, [])
    assert says in text
    assert ("a thought precedes" in text) is bool(says)
    assert report.thinking(result()) == []


def test_differences_of_answers_are_in_bold_where_they_remain_and_else_say_what_would_be_detected():
    clear = MetricDifference("ROUGE-L", 0.1, 0.3, 0.2, 0.1, 0.3, 0.001, 40, 40, 14, True, 0.15)
    unclear = MetricDifference("length", 0.4, 0.5, 0.1, -0.1, 12.5, 0.2, 40, 40, 14, False, 0.31)
    pairs = [AnswerDifferences("base", "exp1", [clear, unclear]), AnswerDifferences("exp1", "exp2", [clear])]
    made = replace(result(), answered=40, answer_differences=pairs)
    told = report.answer_differences(made)
    assert "Holm's correction over all 14 differences" in told
    assert "| exp1 against base | **+0.20** (+0.10 to +0.30) | +0.10 (-0.10 to +12.5) |" in told
    assert "| exp2 against exp1 | **+0.20** (+0.10 to +0.30) | – |" in told
    assert told.splitlines()[-1] == "- exp1 against base: length 0.31."
    assert told in report.markdown(made, [])
    (alone,) = pairs[1:]
    assert "Not distinguishable" not in report.answer_differences(replace(made, answer_differences=[alone]))
    assert report.answer_differences(result()) == ""  # of an older version


def test_what_the_references_would_get_at_the_limit_is_a_row_of_the_table():
    made = replace(result(), at_limit={"reference at the limit, 24 tokens": {"BLEU": Interval(45, 40, 50)}})
    assert report.text_table_markdown(made).splitlines()[-1] == (
        "| reference at the limit, 24 tokens | – | 45.0 (40.0 to 50.0) |"
    )
    assert "what the references themselves would get" in report.markdown(made, [])
    assert "reference" not in report.markdown(result(), []).lower()


def test_four_answers_are_too_few_and_counted():
    few = replace(result(rouge=(0.123, -math.inf, math.inf)), answered=4)
    table = report.text_table_markdown(few)
    assert table.startswith("| model | ROUGE-L |")
    assert "| exp1 | 0.12 |" in table
    assert report.answer_differences(few) == "Too few for intervals or comparisons: 4 answers."


@pytest.mark.parametrize(
    ("absent", "rows", "says"),
    [
        ({}, 6, "exp1 is better than base, the only rival measured (-0.2000 nats, 95% interval -0.3000 to -0.1000; "
                "perplexity 7.39 instead of 9.03 (-18.1%); 6 held-out rows with 175 tokens)"),
        ({"base, 16 bits": "too large"}, 6, "exp1 is better than base, the only rival measured ("),
        ({}, 4, "perplexity -18.1%; 4 of 6 held-out rows with 120 tokens)"),
    ],
)  # fmt: skip
def test_the_headline_says_how_large_and_on_what(absent, rows, says):
    change = Difference("base", "exp1", -0.2, -0.3, -0.1, rows=rows, seeds=1, tokens=120)
    made = replace(result(), differences=[change], best_rival={"exp1": "base"}, absent=absent)
    (line,) = report.headlines(made)
    assert says in line


def test_the_best_of_several_rivals_is_named_as_such():
    made = replace(result(), best_rival={"exp1": "base"})
    made.table.insert(1, replace(made.table[0], name="base, 16 bits"))
    assert report.headlines(made)[0].startswith("exp1 is better than base, the best of 2 rivals (")
    made = replace(made, absent={"base, own template": "the model has no chat template"})
    assert report.headlines(made)[0].startswith("exp1 is better than base, the best of 2 rivals measured (")


def test_cross_fitted_checkpoints_are_named():
    made = result()
    assert "cross-fitting" not in report.basis(made)
    made.table[-1] = replace(made.table[-1], cross_fitted=True)
    assert "judges the checkpoint of exp1 that the other half chose (cross-fitting)" in report.basis(made)


def test_forgetting_is_in_the_family_only_if_it_was_measured():
    joint = [Difference("base", "exp1", -0.2, -0.3, -0.1, rows=6, seeds=1, family=3)]
    made = replace(result(), differences=joint)
    assert "all 3 verdicts, forgetting included, hold at once" in report.basis(made)
    assert "all 3 verdicts hold at once" in report.basis(replace(made, forgetting=[]))


def test_the_report_names_lengths_in_characters():
    assert "is measured in characters" in report.markdown(result(answer="水在一百度时沸腾，请小心。"), [])
    assert "is measured in characters" not in report.markdown(result(answer="The Chinese word for tea is 茶."), [])


def outside_code(text):
    """The report without what stands between backticks, where Markdown and HTML have no effect."""
    return "".join(text.split("`")[::2])


@pytest.mark.parametrize("nasty", [{"answer": NASTY}, {"prompt": NASTY}])
def test_data_stay_on_one_line_and_without_effect(nasty, tmp_path):
    text = report.markdown(result(**nasty), [])
    assert text.count("\n") == report.markdown(result(), []).count("\n")
    assert "<script>" in text
    assert "<script>" not in outside_code(text)
    page = markup.html(text, tmp_path)
    assert "<script" not in page
    assert 'href="javascript' not in page


def test_of_many_differences_the_figure_shows_those_to_the_best_rivals_and_says_so(tmp_path, monkeypatch):
    drawn, figure = [], report.differences.figure
    monkeypatch.setattr(report.differences, "figure", lambda shown: drawn.append(shown) or figure(shown[:1]))
    monkeypatch.setattr(report, "logs_of", lambda _: {"exp1": [{"step": 1, "loss": 2.0}]})
    few = result()
    names = [f"exp{i}" for i in range(report.DRAWN + 5)]
    each = [replace(few.differences[0], a=rival, b=name) for name in names for rival in ("base", "base, 16 bits")]
    table = [*few.table, *(replace(few.table[-1], name=name) for name in names)]
    many = replace(few, table=table, differences=each, best_rival=dict.fromkeys(names, "base, 16 bits"))
    for made in (few, many):
        report.write(made, {}, tmp_path)
    assert drawn == [few.differences, many.headlines[: report.DRAWN]]
    assert f"shows {report.DRAWN} of {len(each)}" in report.markdown(many, [])
    assert "The figure of differences" not in report.markdown(few, [])
