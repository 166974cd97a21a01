"""Runs against each other on one held-out set: paired intervals, and a verdict in words that follows from them."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from qlora_helpers import runs
from qlora_helpers.errors import UserError
from qlora_helpers.evaluation import RowLoss, mean_loss, read_losses
from qlora_helpers.runs import RunFolder

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Held-out loss of `b` less that of `a`, per trained token, with its 95% interval. Below zero, `b` is better."""

    a: str
    b: str
    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """better, worse or not distinguishable: read from the interval alone."""
        if self.high < 0:
            return "better"
        return "worse" if self.low > 0 else "not distinguishable"

    def __str__(self) -> str:
        bounds = f"{self.value:+.4f}, 95% interval {self.low:+.4f} to {self.high:+.4f}"
        joint = "from" if self.verdict == "not distinguishable" else "than"
        return f"{self.b} is {self.verdict} {joint} {self.a} ({bounds})"


def difference(a: str, losses_a: list[RowLoss], b: str, losses_b: list[RowLoss]) -> Difference:
    """Paired bootstrap of the difference in mean loss per token: rows are resampled, so long rows weigh more.

    Bias-corrected and accelerated intervals (Efron 1987), 10,000 resamples, fixed seed. Raises `UserError` if the two
    were not measured on the same rows.
    """
    if [(row.id, row.tokens) for row in losses_a] != [(row.id, row.tokens) for row in losses_b]:
        raise UserError(
            f"comparison: {a} and {b} were measured on different held-out rows. Mend: run both with the same data set, "
            "data_seed, n_heldout, template and max_length."
        )
    gap = np.array([y.loss_sum - x.loss_sum for x, y in zip(losses_a, losses_b, strict=True)])
    tokens = np.array([row.tokens for row in losses_a], dtype=float)
    value = gap.sum() / tokens.sum()
    low, high = _interval(gap, tokens)
    return Difference(a, b, float(value), float(low), float(high))


def _interval(gap: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    from scipy.stats import bootstrap

    if len(gap) < 2:  # one row says nothing about other rows
        return -np.inf, np.inf
    if np.ptp(gap / tokens) < 1e-12:  # every resample gives the same: there is nothing to correct for
        return gap.sum() / tokens.sum(), gap.sum() / tokens.sum()
    result = bootstrap(
        (gap, tokens),
        lambda g, t, axis: g.sum(axis=axis) / t.sum(axis=axis),
        paired=True,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="BCa",
        random_state=np.random.default_rng(0),
    )
    return result.confidence_interval.low, result.confidence_interval.high


def compare(base: RunFolder, experiments: list[RunFolder]) -> dict[str, Any]:
    """The base model and complete runs on one held-out set, as written to `comparison.json`."""
    losses = {"base": read_losses(base)} | {run.name: read_losses(run) for run in experiments}
    names = list(losses)
    pairs = [("base", name) for name in names[1:]] + list(pairwise(names[1:]))
    differences = [difference(a, losses[a], b, losses[b]) for a, b in pairs]
    manifests = {run.name: run.read("manifest.json") for run in experiments}
    first = next(iter(manifests.values()))
    return {
        "heldout_rows": len(losses["base"]),
        "heldout_tokens": sum(row.tokens for row in losses["base"]),
        "heldout_fingerprint": first["data"]["heldout_fingerprint"],
        "device": first["device"],
        "versions": first["versions"],
        "table": [_line("base", losses["base"], base, None)]
        + [_line(run.name, losses[run.name], run, run.read("metrics.json")) for run in experiments],
        "differences": [{**vars(d), "verdict": d.verdict, "text": str(d)} for d in differences],
        "answers": _answers(base, experiments),
    }


def _line(name: str, losses: list[RowLoss], run: RunFolder, metrics: dict[str, Any] | None) -> dict[str, Any]:
    answers = runs.read_jsonl(run / "answers.jsonl")
    keys = ("train_rows", "steps", "epochs", "train_loss", "seconds", "tokens_per_second", "peak_memory_gib", "seed")
    return {
        "name": name,
        "heldout_loss": mean_loss(losses),
        "answers_that_stop": f"{sum(a['stopped'] for a in answers)} of {len(answers)}",
        **{key: metrics[key] if metrics else None for key in keys},
    }


def _answers(base: RunFolder, experiments: list[RunFolder]) -> list[dict[str, str]]:
    """One entry a prompt: what each model said."""
    said = {"base": runs.read_jsonl(base / "answers.jsonl")}
    said |= {run.name: runs.read_jsonl(run / "answers.jsonl") for run in experiments}
    return [
        {"prompt": first["prompt"], **{name: rows[i]["answer"] for name, rows in said.items()}}
        for i, first in enumerate(said["base"])
    ]


def table_markdown(result: dict[str, Any]) -> str:
    """The comparison as a Markdown table."""
    header = "| | rows | steps | held-out loss | training loss | answers that stop | seconds | tokens/s | peak GiB |"
    lines = [header, "|---|---|---|---|---|---|---|---|---|"]
    for row in result["table"]:
        cells = [row["name"], *(_cell(row[k], f) for k, f in _COLUMNS.items())]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


_COLUMNS = {
    "train_rows": "d",
    "steps": "d",
    "heldout_loss": ".4f",
    "train_loss": ".4f",
    "answers_that_stop": "s",
    "seconds": ".0f",
    "tokens_per_second": ",.0f",
    "peak_memory_gib": ".2f",
}


def _cell(value: Any, form: str) -> str:
    return "–" if value is None else format(value, form)


def report_markdown(result: dict[str, Any], figures: list[str]) -> str:
    """`report.md`: the question, the table, the verdicts, the figures, the answers, the limits, the versions."""
    device = result["device"]
    answers = "\n\n".join(
        f"**Asked:** {_quote(entry['prompt'])}\n\n"
        + "\n".join(f"- *{name}*: {_quote(text)}" for name, text in entry.items() if name != "prompt")
        for entry in result["answers"]
    )
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"""# Did fine-tuning help, and how sure are we?

{result["heldout_rows"]} held-out rows with {result["heldout_tokens"]:,} trained tokens (fingerprint
`{result["heldout_fingerprint"]}`), none of them trained on. Loss: mean per trained token, in nats; lower is better.

{table_markdown(result)}

## Verdicts

{chr(10).join(f"- {d['text']}." for d in result["differences"])}

Intervals: paired bootstrap over held-out rows, {RESAMPLES:,} resamples. With one seed each they speak of these adapters
only, not of the recipes. The training losses come from different numbers of steps: they are no evidence.

## Figures

{chr(10).join(f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in figures)}

## Answers

{answers}

## Made with

{device["name"]}, {device["dtype"]} ({device["reason"]}). {versions}.
"""


def _quote(text: str) -> str:
    """A text on one line, as data: no Markdown or HTML of its own takes effect."""
    flat = " ".join(text.split()).replace("`", "'")
    return f"`{flat}`" if flat else "(empty)"


def write_report(result: dict[str, Any], folder: Path, figures: list[str]) -> Path:
    """`comparison.json` and `report.md` in `folder`; returns the path of the report."""
    runs.write_json(folder / "comparison.json", result)
    runs.write_text(folder / "report.md", report_markdown(result, figures))
    return folder / "report.md"
