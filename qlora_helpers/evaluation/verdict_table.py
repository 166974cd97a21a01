"""All differences of a comparison as one Markdown table."""

import math

from qlora_helpers.evaluation.comparison import Comparison
from qlora_helpers.evaluation.differences import UNSURE, Difference
from qlora_helpers.evaluation.markup import markdown_table
from qlora_helpers.evaluation.row_losses import BASE
from qlora_helpers.quoting import markdown as inert
from qlora_helpers.wording import counted


def verdict_table(result: Comparison) -> str:
    """What quantizing cost, then each experiment against its rivals and against the one before it.

    The verdict stands first, where a phone shows it. Empty if nothing was compared.
    """
    names = [model.name for model in result.table]
    ordered = sorted(result.all_differences, key=lambda d: names.index(d.b))  # stable: of each model, the rivals first
    lines = [[*_cells(d), _remark(result, d)] for d in ordered]
    if not lines:
        return ""
    unit = "nats" if result.unit == "token" else "bits per byte"
    heads = ["model", "verdict", "compared with", f"{unit} (95% interval)", "perplexity", "remark"]
    if result.unit == "byte":  # a perplexity per byte would not mean the same for both
        heads, lines = [h for h in heads if h != "perplexity"], [[*line[:4], *line[5:]] for line in lines]
    return markdown_table(heads, lines)


def _cells(d: Difference) -> list[str]:
    low, high = ("no end" if math.isinf(end) else f"{end:+.4f}" for end in (d.low, d.high))
    verdict = f"**{d.verdict}**" if d.verdict in ("better", "worse") else d.verdict
    return [inert(d.b), verdict, inert(d.a), f"{d.value:+.4f} ({low} to {high})", f"{math.expm1(d.value):+z.1%}"]


def _remark(result: Comparison, d: Difference) -> str:
    """What a difference shows, what could have been detected, and its rows if they are not all."""
    parts = []
    if result.quantizing and (d.a, d.b) == (result.quantizing.a, result.quantizing.b):
        parts.append("what quantizing cost")
    elif result.quantizing and d.a == BASE:
        parts.append("what training won back")
    if result.best_rival.get(d.b) == d.a:
        parts.append("the best rival")
    if d.verdict == UNSURE and d.detectable:
        parts.append("no effect is detectable" if math.isinf(d.detectable) else f"detectable: {d.detectable:.4f}")
    if d.margin and d.verdict not in ("better", "worse", UNSURE):
        parts.append(f"within ±{d.margin}")
    if d.rows != result.heldout_rows:
        parts.append(f"{d.rows} of {counted(result.heldout_rows, 'row')}, {counted(d.tokens, 'token')}")
    return "; ".join(parts)
