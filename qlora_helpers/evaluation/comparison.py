"""Finished runs against each other and against the forms of their base model, on one held-out set."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from qlora_helpers.errors import UserError
from qlora_helpers.evaluation import answer_metrics, verdicts
from qlora_helpers.evaluation.answer_metrics import AnswerDifferences
from qlora_helpers.evaluation.differences import Arm, Difference, difference
from qlora_helpers.evaluation.intervals import Interval
from qlora_helpers.evaluation.row_losses import BASE, IN_16_BITS, OWN_TEMPLATE, mean_loss, read_losses
from qlora_helpers.runs import RunFolder

FEW_SHOT = "base + 3 examples"
MEANS = ("train_rows", "steps", "epochs", "train_loss", "seconds", "tokens_per_second")  # of metrics.json

Folders = dict[str, list[RunFolder]]  # of each model: one for each seed


@dataclass(frozen=True)
class Summary:
    """One model of a comparison: means over its training seeds. What only a trained model has is None for a base model.

    `run` is the folder of the first seed, `text` the metrics of that seed's answers. `draws` is the number of different
    sets of training rows among the seeds, and `all_rows` says whether they are all rows there are. `cross_fitted` says
    whether held-out rows chose the checkpoints that the other half of them judges.
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
    draws: int = 1
    all_rows: bool = False
    cross_fitted: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values; a number that is not finite is null."""
        return vars(self) | {"text": answer_metrics.to_plain(self.text)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Summary":
        """The summary that `to_dict` wrote."""
        return cls(**{**plain, "text": answer_metrics.from_plain(plain["text"])})


@dataclass(frozen=True)
class Comparison:
    """Forms of the base model and finished runs on one held-out set, as written to `comparison.json`.

    `differences` are of held-out losses, `forgetting` of losses on general questions, per `unit` ("token" or "byte").
    `answers` holds each prompt with the answer of every model, `answered` the number of those that were scored.
    `answer_differences` compares them, and `at_limit` holds what the references would get at each limit of tokens.
    `best_rival` names the form of the base model with the lowest held-out loss, for each experiment. `quantizing` is
    the loss in 4 bits minus that in 16 bits. `rose` counts the general questions whose loss rose. `absent` gives the
    reason why a rival was not measured.
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
    answered: int = 0
    best_rival: dict[str, str] = field(default_factory=dict)
    quantizing: Difference | None = None
    rose: dict[str, int] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    answer_differences: list[AnswerDifferences] = field(default_factory=list)
    at_limit: dict[str, dict[str, Interval]] = field(default_factory=dict)

    @property
    def headlines(self) -> list[Difference]:
        """The difference of each experiment to its best rival."""
        return [d for d in self.differences if self.best_rival.get(d.b) == d.a]

    @property
    def all_differences(self) -> list[Difference]:
        """What quantizing cost, where it was measured, and the differences."""
        return [*([self.quantizing] if self.quantizing else []), *self.differences]

    @property
    def family(self) -> int:
        """Number of verdicts whose intervals hold at once."""
        return max((d.family for d in (*self.differences, *self.forgetting)), default=1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        lists = ("table", "differences", "forgetting", "answer_differences")
        parts: dict[str, Any] = {name: [part.to_dict() for part in getattr(self, name)] for name in lists}
        parts["at_limit"] = {name: answer_metrics.to_plain(metrics) for name, metrics in self.at_limit.items()}
        return vars(self) | parts | {"quantizing": self.quantizing and self.quantizing.to_dict()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Comparison":
        """The comparison that `to_dict` wrote."""
        parts: dict[str, Any] = {
            name: [Difference.from_dict(d) for d in plain[name]] for name in ("differences", "forgetting")
        }
        parts["table"] = [Summary.from_dict(line) for line in plain["table"]]
        parts["answer_differences"] = [AnswerDifferences.from_dict(d) for d in plain.get("answer_differences", [])]
        parts["at_limit"] = {name: answer_metrics.from_plain(line) for name, line in plain.get("at_limit", {}).items()}
        parts["quantizing"] = plain.get("quantizing") and Difference.from_dict(plain["quantizing"])
        return cls(**{**plain, **parts})


def compare(experiments: Folders, margin: float | None = None) -> Comparison:
    """Compare experiments, each a list of runs that differ only in their seed, with each other and their rivals.

    The rivals are the forms of the base model, if all runs have the same one. All verdicts are one family, whose
    intervals hold at once. Differences below `margin` do not matter; by default it is that of the first run's config.

    Raises `UserError` if the runs were measured on different held-out sets or computed in different dtypes.
    """
    every = [run for group_ in experiments.values() for run in group_]
    manifests = [run.read("manifest.json") for run in every]
    _check_comparable(every, manifests)
    one_model = len({m["baseline"] for m in manifests}) == 1
    rivals, absent = rivals_of(every) if one_model else ({}, {})
    folders = rivals | experiments
    arms = {name: arm(name, runs, name in experiments) for name, runs in folders.items()}
    heldout = arms[next(iter(experiments))].seeds[0]
    general = _general(rivals[BASE], experiments, arms) if BASE in rivals else []
    cost = [(arms[IN_16_BITS], arms[BASE])] if IN_16_BITS in rivals else []
    pairs = [(name, other) for name in rivals for other in experiments] + list(pairwise(experiments))
    compared = [verdicts.on_shared_rows(arms[a], arms[b]) for a, b in pairs]
    unit = "token" if one_model else "byte"
    margin = every[0].config().margin if margin is None else margin
    judged = verdicts.as_one_family([*cost, *general, *compared], unit, margin)
    answers = {name: answer_metrics.read(runs[0]) for name, runs in folders.items()}
    first, texts = manifests[0], answer_metrics.of_models(answers)
    return Comparison(
        heldout_rows=len(heldout),
        heldout_tokens=sum(row.tokens for row in heldout),
        heldout_fingerprint=first["data"]["heldout_fingerprint"],
        unit=unit,
        device=first["device"],
        versions=first["versions"],
        data=first["data"]["source"],
        model=first["model"],
        table=[_summary(arms[name], runs, texts[name]) for name, runs in folders.items()],
        differences=judged[len(cost) + len(general) :],
        forgetting=judged[len(cost) :][: len(general)],
        answers=answer_metrics.side_by_side(answers),
        answered=min(answer_metrics.answered(answers[name]) for name in experiments),
        best_rival={
            name: verdicts.best([arms[rival] for rival in rivals], arms[name]) for name in experiments if rivals
        },
        quantizing=judged[0] if cost else None,
        rose={after.name: verdicts.risen(before, after) for before, after in general},
        absent=absent,
        answer_differences=answer_metrics.between(answers, pairs),
        at_limit=answer_metrics.at_limits(runs[0] for runs in experiments.values()),
    )


def rivals_of(every: Iterable[RunFolder]) -> tuple[Folders, dict[str, str]]:
    """The forms of the base model that were measured for these runs, and why the others were not."""
    folders: Folders = {}
    absent: dict[str, str] = {}
    for run in every:
        m = run.read("manifest.json")  # that of an older version names the base model only
        named = {BASE: m["baseline"]} | m.get("rivals", {}) | {FEW_SHOT: f"{m['baseline']}/few_shot"}
        paths = {name: run.path.parent / folder for name, folder in named.items()}
        folders |= {n: [RunFolder(path)] for n, path in paths.items() if (path / "heldout_losses.jsonl").exists()}
        absent |= m.get("absent_rivals", {})
    return folders, {name: reason for name, reason in absent.items() if name not in folders}


def arm(name: str, runs: list[RunFolder], trained: bool = True, file: str = "heldout_losses.jsonl") -> Arm:
    """The losses of each run, labeled with its draw of training rows, or its seed if all runs share one draw."""
    configs = [run.config() for run in runs] if trained else []
    draws = [run.read("manifest.json")["data"].get("draw", 0) for run in runs] if trained else []
    one_draw = len(set(draws)) == 1  # as in runs of older versions, which drew the same rows for every seed
    labels = tuple(config.seed if one_draw else draw for config, draw in zip(configs, draws, strict=True))
    return Arm(name, [read_losses(run, file) for run in runs], trained, labels)


def _general(base: list[RunFolder], experiments: Folders, arms: Mapping[str, Arm]) -> list[tuple[Arm, Arm]]:
    before, *after = (
        replace(arms[name], seeds=[read_losses(run, "general_losses.jsonl") for run in runs])
        for name, runs in ({BASE: base} | experiments).items()
    )
    return [(before, arm) for arm in after]


def read(folder: Path) -> Comparison:
    """The comparison that is stored in `folder`."""
    return Comparison.from_dict(RunFolder(folder).read("comparison.json"))


def group(folders: Iterable[RunFolder]) -> dict[str, list[RunFolder]]:
    """Group runs that differ only in their seed, under the folder name of the first.

    The draw of training rows counts as a seed. A run that repeats draw and seed of its group, or was trained on other
    data, forms a group of its own.
    """
    names: dict[tuple[str, str, int], str] = {}
    groups: dict[str, list[RunFolder]] = {}
    times: Counter[tuple[Any, ...]] = Counter()
    for run in folders:
        config, data = run.config(), run.read("manifest.json")["data"]["source_fingerprint"]
        recipe = config.replace(seed=0, draw=None).identity
        one = (recipe, data, config.training_draw, config.seed)
        key = (recipe, data, times[one])
        times[one] += 1
        if key not in names:
            names[key] = _free_name(run, {BASE, IN_16_BITS, *OWN_TEMPLATE.values(), FEW_SHOT, *groups})
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
    dtypes = [m["device"]["dtype"] for m in manifests]
    for values, what, fix in (
        (rows, "measured on different held-out sets", "the same dataset, data_seed and n_heldout"),
        (dtypes, "computed in different dtypes", f"one compute_dtype, such as {min(dtypes)}"),
    ):
        names = {value: run.name for run, value in zip(every, values, strict=True)}
        if len(names) > 1:
            which = ", ".join(f"{name}: {value}" for value, name in names.items())
            raise UserError(f"comparison: the runs were {what} ({which}). Fix: compare runs with {fix}.")


def rehearsed(without: list[RunFolder], with_it: list[RunFolder]) -> Difference:
    """Loss on the general questions of runs with rehearsal minus that of runs without: below zero, it helped."""
    named = {"without rehearsal": without, "with rehearsal": with_it}
    a, b = (arm(name, runs, True, "general_losses.jsonl") for name, runs in named.items())
    return difference(a, b)


def _summary(arm: Arm, runs: list[RunFolder], text: dict[str, Interval]) -> Summary:
    losses = [mean_loss(rows) for rows in arm.seeds]
    finished = [run for run in runs if run.finished]
    metrics = [run.read("metrics.json") for run in finished]
    means = {key: float(np.mean([m[key] for m in metrics])) if metrics else None for key in MEANS}
    data = [run.read("manifest.json")["data"] for run in finished]
    return Summary(
        name=arm.name,
        run=runs[0].name,
        seeds=[m["seed"] for m in metrics],
        heldout_loss=float(np.mean(losses)),
        heldout_loss_by_seed=losses,
        **means,
        peak_memory_gib=max((m["peak_memory_gib"] for m in metrics), default=None),
        text=text,
        draws=len({frozenset(d["train_ids"]) for d in data}),
        all_rows=all(not d["counts"].get("usable, not asked for") for d in data),
        cross_fitted=any((run / "evaluations.jsonl").exists() for run in runs),
    )


def recommend(difference: Difference, rows: list[dict[str, Any]]) -> str:
    """Which of two runs to take, the second against the first: the better one, else the one that needs clearly less
    memory, else the faster one.
    """
    first, second = rows
    if difference.verdict in ("better", "worse"):
        better = second if difference.verdict == "better" else first
        return f"Take {better['run']}: its held-out loss is lower."
    for column, words in (("peak GiB", "needs less memory"), ("seconds a step", "is faster")):
        if column not in first:  # on a CPU, the peak of a process says nothing about a single run
            continue
        less, more = sorted(rows, key=lambda row: row[column])
        if less[column] < 0.95 * more[column]:
            return f"Take {less['run']}: no difference shows in the loss, and it {words}."
    return "Take either: no difference shows, in loss, memory or time."
