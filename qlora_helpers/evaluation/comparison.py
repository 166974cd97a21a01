"""Finished runs against each other and against their base model, on one held-out set."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from qlora_helpers import files
from qlora_helpers.errors import UserError
from qlora_helpers.evaluation.differences import Arm, Difference, difference
from qlora_helpers.evaluation.intervals import Interval
from qlora_helpers.evaluation.losses import mean_loss, read_losses
from qlora_helpers.evaluation.text_metrics import text_metrics, thinks
from qlora_helpers.runs import RunFolder

BASE, FEW_SHOT = "base", "base + 3 examples"
MEANS = ("train_rows", "steps", "epochs", "train_loss", "seconds", "tokens_per_second")  # of metrics.json


@dataclass(frozen=True)
class Summary:
    """One model of a comparison: means over its training seeds. What only a trained model has is None for a base model.

    `run` is the folder of the first seed, `text` the metrics of that seed's answers.
    """

    name: str
    run: str
    seeds: list[int]
    heldout_loss: float
    heldout_loss_by_seed: list[float]
    train_rows: float | None
    steps: float | None
    epochs: float | None
    train_loss: float | None
    seconds: float | None
    tokens_per_second: float | None
    peak_memory_gib: float | None
    text: dict[str, Interval]

    def to_dict(self) -> dict[str, Any]:
        """Plain values; a number that is not finite is null."""
        return vars(self) | {"text": {name: interval.to_dict() for name, interval in self.text.items()}}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Summary":
        """The summary that `to_dict` wrote."""
        return cls(**{**plain, "text": {name: Interval.from_dict(value) for name, value in plain["text"].items()}})


@dataclass(frozen=True)
class Comparison:
    """Base model and finished runs on one held-out set, as written to `comparison.json`.

    `differences` are of held-out losses, `forgetting` of losses on general questions, per `unit` ("token" or "byte").
    `answers` holds each prompt with the answer of every model.
    """

    heldout_rows: int
    heldout_tokens: int
    heldout_fingerprint: str
    unit: str
    device: dict[str, Any]
    versions: dict[str, str]
    data: str
    model: dict[str, Any]
    table: list[Summary]
    differences: list[Difference]
    forgetting: list[Difference]
    answers: list[dict[str, str]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        parts = {name: [part.to_dict() for part in getattr(self, name)] for name in ("table", "differences")}
        return vars(self) | parts | {"forgetting": [part.to_dict() for part in self.forgetting]}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Comparison":
        """The comparison that `to_dict` wrote."""
        table = [Summary.from_dict(line) for line in plain["table"]]
        parts = {name: [Difference.from_dict(d) for d in plain[name]] for name in ("differences", "forgetting")}
        return cls(**{**plain, **parts, "table": table})


def compare(experiments: dict[str, list[RunFolder]]) -> Comparison:
    """Compare experiments, each a list of runs that differ only in their seed, with each other and the base model.

    Raises `UserError` if the runs were measured on different held-out sets or computed in different dtypes.
    """
    every = [run for group_ in experiments.values() for run in group_]
    manifests = [run.read("manifest.json") for run in every]
    _check_comparable(every, manifests)
    bases = {run.path.parent / m["baseline"] for run, m in zip(every, manifests, strict=True)}
    one_model = len({path.name for path in bases}) == 1
    base = RunFolder(sorted(bases)[0])
    folders = {BASE: [base], FEW_SHOT: [RunFolder(base / "few_shot")]} if one_model else {}
    folders = {name: group_ for name, group_ in folders.items() if (group_[0] / "heldout_losses.jsonl").exists()}
    rivals = list(folders)
    folders |= experiments
    arms = {name: Arm(name, [read_losses(run) for run in runs], name in experiments) for name, runs in folders.items()}
    unit = "token" if one_model else "byte"
    pairs = [(name, other) for name in rivals for other in experiments]
    pairs += list(pairwise(experiments))
    heldout = arms[next(iter(experiments))].seeds[0]
    first = manifests[0]
    texts = _texts(folders)
    return Comparison(
        heldout_rows=len(heldout),
        heldout_tokens=sum(row.tokens for row in heldout),
        heldout_fingerprint=first["data"]["heldout_fingerprint"],
        unit=unit,
        device=first["device"],
        versions=first["versions"],
        data=first["data"]["source"],
        model=first["model"],
        table=[_summary(name, runs, texts[name]) for name, runs in folders.items()],
        differences=[difference(arms[a], arms[b], unit) for a, b in pairs],
        forgetting=_forgetting(base, experiments) if rivals else [],
        answers=_side_by_side(folders),
    )


def read(folder: Path) -> Comparison:
    """The comparison that is stored in `folder`."""
    return Comparison.from_dict(RunFolder(folder).read("comparison.json"))


def group(folders: Iterable[RunFolder]) -> dict[str, list[RunFolder]]:
    """Group runs that differ only in their seed, under the folder name of the first.

    A run that repeats a seed of its group, or was trained on other data, forms a group of its own.
    """
    names: dict[tuple[str, str, int], str] = {}
    groups: dict[str, list[RunFolder]] = {}
    times: Counter[tuple[str, str, int]] = Counter()
    for run in folders:
        config, data = run.config(), run.read("manifest.json")["data"]["source_fingerprint"]
        recipe = config.replace(seed=0).identity
        key = (recipe, data, times[recipe, data, config.seed])
        times[recipe, data, config.seed] += 1
        if key not in names:
            names[key] = _free_name(run, {BASE, FEW_SHOT, *groups})
        groups.setdefault(names[key], []).append(run)
    return groups


def _free_name(run: RunFolder, taken: set[str]) -> str:
    """The folder's name, preceded by those of its parents if another experiment has it."""
    parts = run.path.resolve().parts
    names = ["/".join(parts[-depth:]) for depth in range(1, len(parts) + 1)]
    free = next((name for name in names if name not in taken), None)
    return free or f"{names[0]} again"


def _check_comparable(every: list[RunFolder], manifests: list[dict[str, Any]]) -> None:
    """Raise `UserError` for different held-out rows or dtypes: rounding changes a loss as much as a few rows do."""
    rows = [m["data"]["heldout_fingerprint"] for m in manifests]
    _check_equal(every, rows, "measured on different held-out sets", "the same dataset, data_seed and n_heldout")
    dtypes = [m["device"]["dtype"] for m in manifests]
    _check_equal(every, dtypes, "computed in different dtypes", f"one compute_dtype, such as {min(dtypes)}")


def _check_equal(every: list[RunFolder], values: list[str], what: str, fix: str) -> None:
    names = {value: run.name for run, value in zip(every, values, strict=True)}
    if len(names) > 1:
        which = ", ".join(f"{name}: {value}" for value, name in names.items())
        raise UserError(f"comparison: the runs were {what} ({which}). Fix: compare runs with {fix}.")


def _forgetting(base: RunFolder, experiments: dict[str, list[RunFolder]]) -> list[Difference]:
    """Change of the loss on the general questions: above zero, something was forgotten."""
    before = replace(_general(BASE, [base]), trained=False)
    return [difference(before, _general(name, runs)) for name, runs in experiments.items()]


def rehearsed(without: list[RunFolder], with_it: list[RunFolder]) -> Difference:
    """Loss on the general questions of runs with rehearsal minus that of runs without: below zero, it helped."""
    return difference(_general("without rehearsal", without), _general("with rehearsal", with_it))


def _general(name: str, runs: list[RunFolder]) -> Arm:
    return Arm(name, [read_losses(run, "general_losses.jsonl") for run in runs])


def _summary(name: str, runs: list[RunFolder], text: dict[str, Interval]) -> Summary:
    losses = [mean_loss(read_losses(run)) for run in runs]
    metrics = [run.read("metrics.json") for run in runs if run.finished]
    means = {key: float(np.mean([m[key] for m in metrics])) if metrics else None for key in MEANS}
    return Summary(
        name=name,
        run=runs[0].name,
        seeds=[m["seed"] for m in metrics],
        heldout_loss=float(np.mean(losses)),
        heldout_loss_by_seed=losses,
        **means,
        peak_memory_gib=max((m["peak_memory_gib"] for m in metrics), default=None),
        text=text,
    )


def _texts(folders: dict[str, list[RunFolder]]) -> dict[str, dict[str, Interval]]:
    """Text metrics of each model's first seed. If one of the models thinks, `thinks` is a metric of all."""
    answered = {name: _answers(runs[0]) for name, runs in folders.items()}
    texts = {name: text_metrics(rows) for name, rows in answered.items()}
    if any("thinks" in text for text in texts.values()):
        texts = {name: text and text | {"thinks": thinks(answered[name])} for name, text in texts.items()}
    return texts


def _answers(run: RunFolder) -> list[dict[str, Any]]:
    """Answers of a run; on a CPU, the base model with examples in its prompt has none."""
    return files.read_jsonl(run / "answers.jsonl") if (run / "answers.jsonl").exists() else []


def _side_by_side(folders: dict[str, list[RunFolder]]) -> list[dict[str, str]]:
    """Each prompt with the answer of every model's first seed."""
    by_model = {name: rows for name, runs in folders.items() if (rows := _answers(runs[0]))}
    first = next(iter(by_model.values()))
    return [
        {"prompt": entry["prompt"], **{name: rows[i]["answer"] for name, rows in by_model.items()}}
        for i, entry in enumerate(first)
        if all(len(rows) > i and rows[i]["prompt"] == entry["prompt"] for rows in by_model.values())
    ]


def recommend(difference: Difference, rows: list[dict[str, Any]]) -> str:
    """Which of two runs to take, the second against the first: the better one, else the one that needs clearly less
    memory, else the faster one.
    """
    first, second = rows
    if difference.verdict != "not distinguishable":
        better = second if difference.verdict == "better" else first
        return f"Take {better['run']}: its held-out loss is lower."
    for column, words in (("peak GiB", "needs less memory"), ("seconds a step", "is faster")):
        if column not in first:  # on a CPU, the peak of a process says nothing about a single run
            continue
        less, more = sorted(rows, key=lambda row: row[column])
        if less[column] < 0.95 * more[column]:
            return f"Take {less['run']}: no difference shows in the loss, and it {words}."
    return "Take either: no difference shows, in loss, memory or time."
