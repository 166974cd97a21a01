"""Metrics and scores of the answers in a comparison: of each model, between models, and of the references."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_helpers import files
from qlora_helpers.evaluation import paired, scores, text_metrics
from qlora_helpers.evaluation.intervals import Interval
from qlora_helpers.evaluation.paired import MetricDifference
from qlora_helpers.models import hub
from qlora_helpers.runs import RunFolder

FEWEST_ANSWERS = 5  # from fewer, metrics have no intervals, and models are not compared

Metrics = dict[str, Interval]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class AnswerDifferences:
    """Metrics and scores of model `b` minus those of model `a`, answer by answer."""

    a: str
    b: str
    metrics: list[MetricDifference]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return vars(self) | {"metrics": [metric.to_dict() for metric in self.metrics]}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "AnswerDifferences":
        """The differences that `to_dict` wrote."""
        return cls(plain["a"], plain["b"], [MetricDifference.from_dict(metric) for metric in plain["metrics"]])


def to_plain(metrics: Metrics) -> dict[str, Any]:
    """Plain values of each metric."""
    return {name: interval.to_dict() for name, interval in metrics.items()}


def from_plain(plain: Mapping[str, Any]) -> Metrics:
    """The metrics that `to_plain` wrote."""
    return {name: Interval.from_dict(value) for name, value in plain.items()}


def read(run: RunFolder) -> Rows:
    """Answers of a run. Most forms of the base model were not asked."""
    return files.read_jsonl(run / "answers.jsonl") if (run / "answers.jsonl").exists() else []


def answered(rows: Rows) -> int:
    """Number of answers with a reference."""
    return sum(bool((row["reference"] or "").strip()) for row in rows)


def of_model(rows: Rows) -> Metrics:
    """Text metrics and scores of a model's answers, without intervals from fewer than `FEWEST_ANSWERS` of them."""
    scored = sum(row.get("score") is not None for row in rows)
    return _bounded(text_metrics.text_metrics(rows), answered(rows)) | _bounded(scores.metrics(rows), scored)


def _bounded(metrics: Metrics, number: int) -> Metrics:
    if number >= FEWEST_ANSWERS:
        return metrics
    return {name: Interval(one.value, -math.inf, math.inf) for name, one in metrics.items()}


def of_models(answers: Mapping[str, Rows]) -> dict[str, Metrics]:
    """Metrics of each model. If one of them thinks, `thinks` is a metric of all that answered."""
    found = {name: of_model(rows) for name, rows in answers.items()}
    if any("thinks" in metrics for metrics in found.values()):
        for name, metrics in found.items():
            if metrics:
                metrics |= _bounded({"thinks": text_metrics.thinks(answers[name])}, answered(answers[name]))
    return found


def between(answers: Mapping[str, Rows], pairs: Iterable[tuple[str, str]]) -> list[AnswerDifferences]:
    """Differences of each pair of models that both answered, with Holm's correction over all of them together.

    None are made from fewer than `FEWEST_ANSWERS` answers. Raises `UserError` if two answered different questions.
    """
    made = {
        (a, b): [
            metric
            for metrics in (text_metrics.differences, scores.differences)
            for metric in metrics(answers[a], answers[b])
            if metric.answers >= FEWEST_ANSWERS
        ]
        for a, b in pairs
        if answers[a] and answers[b]
    }
    corrected = iter(paired.holm([metric for metrics in made.values() for metric in metrics]))
    return [AnswerDifferences(a, b, [next(corrected) for _ in metrics]) for (a, b), metrics in made.items() if metrics]


def at_limits(runs: Iterable[RunFolder]) -> dict[str, Metrics]:
    """What the references themselves would get, cut at each `max_new_tokens` of the runs, by a name for the table.

    A run without a saved tokenizer, as in a copy of its results, is left out.
    """
    found: dict[str, Metrics] = {}
    for run in runs:
        if not (run.adapter / "tokenizer_config.json").exists():
            continue
        limit = run.config().max_new_tokens
        name = f"reference at the limit, {limit} tokens"
        rows = read(run)
        if name not in found and answered(rows):
            cut = text_metrics.at_limit(rows, hub.saved_tokenizer(run.adapter), limit)
            found[name] = _bounded(cut, answered(rows))
    return found


def side_by_side(answers: Mapping[str, Rows]) -> list[dict[str, str]]:
    """Each prompt with the answer of every model that answered."""
    by_model = {name: rows for name, rows in answers.items() if rows}
    first = next(iter(by_model.values()), [])
    return [
        {"prompt": entry["prompt"], **{name: rows[i]["answer"] for name, rows in by_model.items()}}
        for i, entry in enumerate(first)
        if all(len(rows) > i and rows[i]["prompt"] == entry["prompt"] for rows in by_model.values())
    ]
