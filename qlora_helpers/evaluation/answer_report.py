"""The answers in a report: their metrics, the differences between models, and who thinks."""

import math

from qlora_helpers.evaluation.answer_metrics import FEWEST_ANSWERS
from qlora_helpers.evaluation.comparison import Comparison
from qlora_helpers.evaluation.intervals import Interval
from qlora_helpers.evaluation.markup import bullets, markdown_table
from qlora_helpers.evaluation.paired import MetricDifference
from qlora_helpers.quoting import markdown as inert
from qlora_helpers.wording import counted


def text_table_markdown(result: Comparison) -> str:
    """Metrics of each model that answered, and of the references at the limit of tokens, with their intervals."""
    names = list(dict.fromkeys(name for model in result.table for name in model.text))
    answered = {model.name: model.text for model in result.table if model.text} | result.at_limit
    few = too_few(result)
    lines = [[inert(model), *(_interval(text.get(name), few) for name in names)] for model, text in answered.items()]
    return markdown_table(["model", *map(inert, names)], lines) if names else "No held-out question was answered."


def answer_differences(result: Comparison) -> str:
    """Differences of metrics and scores, answer by answer: a table, and what could have been detected."""
    if too_few(result):
        return f"Too few for intervals or comparisons: {counted(result.answered, 'answer')}."
    lines, missed = {}, []
    names = list(dict.fromkeys(one.metric for pair in result.answer_differences for one in pair.metrics))
    for pair in result.answer_differences:
        name, found = f"{inert(pair.b)} against {inert(pair.a)}", {one.metric: one for one in pair.metrics}
        lines[name] = [_change(found.get(metric)) for metric in names]
        if unclear := [f"{inert(one.metric)} {one.detectable:.2g}" for one in pair.metrics if one.limit]:
            missed.append(f"{name}: {', '.join(unclear)}")
    if not lines:
        return ""
    parts = [
        "The same answers compared one by one, with 95% intervals. In bold: distinguishable from zero after Holm's "
        f"correction over all {result.answer_differences[0].metrics[0].family} differences.",
        markdown_table(["", *map(inert, names)], [[name, *cells] for name, cells in lines.items()]),
        "Not distinguishable; a difference of this size would be detected in 80% of such comparisons:" * bool(missed),
        bullets(missed),
    ]
    return "\n\n".join(filter(None, parts))


def too_few(result: Comparison) -> bool:
    """Whether there are answers, but not enough for intervals."""
    return 0 < result.answered < FEWEST_ANSWERS


def thinking(result: Comparison) -> list[str]:
    """A sentence for every difference between models of which one thinks distinguishably more often."""
    lines = []
    for pair in result.answer_differences:
        gap = next((one for one in pair.metrics if one.metric == "thinks" and one.remains), None)
        if gap is None:
            continue
        less = "thinks less often than" if gap.b else "stopped thinking, unlike"
        how = less if gap.value < 0 else "thinks more often than"
        lines.append(
            f"{inert(pair.b)} {how} {inert(pair.a)}: a thought precedes {gap.b:.0%} of its answers instead of "
            f"{gap.a:.0%} ({gap.value:+.2f}, 95% interval {gap.low:+.2f} to {gap.high:+.2f}). "
            "This does not say whose answers are better: the other metrics leave thoughts out"
        )
    return lines


def _interval(interval: Interval | None, value_only: bool) -> str:
    if interval is None:
        return "–"
    value, low, high = (_number(n) for n in (interval.value, interval.low, interval.high))
    if value_only:
        return value
    return f"{value} (no interval)" if low == high == "–" else f"{value} ({low} to {high})"


def _change(change: MetricDifference | None) -> str:
    if change is None:
        return "–"
    value, low, high = (_number(n, "+") for n in (change.value, change.low, change.high))
    return f"{f'**{value}**' if change.remains else value} ({low} to {high})"


def _number(number: float, sign: str = "") -> str:
    return f"{number:{sign}.{1 if abs(number) >= 10 else 2}f}" if math.isfinite(number) else "–"
