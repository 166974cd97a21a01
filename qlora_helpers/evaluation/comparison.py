"""Runs against each other on one held-out set: paired intervals, and a verdict in words that follows from them."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from qlora_helpers import files
from qlora_helpers.errors import UserError
from qlora_helpers.evaluation import answers, intervals
from qlora_helpers.evaluation.intervals import Interval
from qlora_helpers.evaluation.losses import RowLoss, mean_loss, read_losses
from qlora_helpers.runs import RunFolder

BASE, FEW_SHOT = "base", "base + 3 examples"


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: the losses of each of its training seeds, on the same rows. The base is not trained,
    and has one.
    """

    name: str
    seeds: list[list[RowLoss]]
    trained: bool = True


@dataclass(frozen=True)
class Difference:
    """Loss of `b` less that of `a`, per trained token (nats) or per byte (bits), with its 95% interval. Below zero, `b`
    is better. `seeds` is the smaller number of training seeds behind the two, where the base model counts as many.
    """

    a: str
    b: str
    value: float
    low: float
    high: float
    rows: int
    seeds: int
    unit: str = "token"

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

    def to_dict(self) -> dict[str, Any]:
        """Plain values; an interval without an end is null there."""
        plain = {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in asdict(self).items()}
        return plain | {"verdict": self.verdict, "text": str(self)}


def difference(a: Arm, b: Arm, unit: str = "token") -> Difference:
    """The mean difference over seeds, per `unit` ("token" or "byte"), rows weighted by how many they have.

    The interval holds what other rows would change (rows are resampled, each with both its losses), and, where an arm
    has several seeds, what other seeds would change. With one seed it speaks of these two adapters alone. Raises
    `UserError` if the two were not measured on the same rows.
    """
    found, rows = contrast([a, b], [-1, 1], unit)
    return Difference(a.name, b.name, found.value, found.low, found.high, rows, fewest_seeds([a, b]), unit)


def fewest_seeds(arms: Iterable[Arm]) -> int:
    """The smallest number of training seeds behind any of them; the base model is not trained."""
    return min((len(arm.seeds) for arm in arms if arm.trained), default=1)


def contrast(arms: Sequence[Arm], factors: Sequence[float], unit: str = "token") -> tuple[Interval, int]:
    """The sum of the arms' losses times `factors`, and the rows counted: with -1 and 1 a difference, with those of a
    least-squares line its slope. Rows are resampled with all their losses, since every arm saw the same ones.
    """
    first = arms[0].seeds[0]
    for arm in arms:
        if any(_keys(losses, unit) != _keys(first, unit) for losses in arm.seeds):
            raise UserError(
                f"comparison: {arms[0].name} and {arm.name} were measured on different held-out rows. Fix: run both "
                "with the same data set, data_seed, n_heldout, template and max_length."
            )
    weights = np.array([row.tokens if unit == "token" else row.bytes for row in first], dtype=float)
    if unit == "byte":  # a row that one of them cut is another text
        for arm in arms[1:]:
            weights *= [x.bytes == y.bytes for x, y in zip(first, arm.seeds[0], strict=True)]
    counted = weights > 0
    if not counted.any():
        raise UserError("comparison: no held-out row is whole in both runs. Fix: a larger max_length.")
    scale = np.asarray(factors, dtype=float) / (1.0 if unit == "token" else math.log(2))
    sums = [
        np.array([[row.loss_sum for row in seed] for seed in arm.seeds])[:, counted] * factor
        for arm, factor in zip(arms, scale, strict=True)
    ]
    means = np.array([arm.mean(axis=0) for arm in sums])
    gap = means.sum(axis=0)
    gap[np.abs(gap) < 1e-12 * np.abs(means).sum(axis=0)] = 0  # what rounding leaves of equal losses is no difference
    over_rows = intervals.ratio(gap, weights[counted])
    by_seed = (intervals.seed_error(arm.sum(axis=1) / weights[counted].sum()) for arm in sums)
    return intervals.widen(over_rows, *by_seed), int(counted.sum())


def _keys(losses: list[RowLoss], unit: str) -> list[tuple[str, int]]:
    """What must agree: the rows, and their tokens too where these are counted."""
    return [(row.id, row.tokens if unit == "token" else 0) for row in losses]


def group(found: Iterable[RunFolder]) -> dict[str, list[RunFolder]]:
    """Runs that differ in their seed alone, under the name of the first. A seed that comes twice is no second seed: the
    run that brings it again stands alone, and so does one whose data are others.
    """
    names: dict[tuple[str, str, int], str] = {}
    groups: dict[str, list[RunFolder]] = {}
    times: Counter[tuple[str, str, int]] = Counter()
    for run in found:
        config, data = run.config(), run.read("manifest.json")["data"]["source_fingerprint"]
        recipe = config.replace(seed=0).identity
        key = (recipe, data, times[recipe, data, config.seed])
        times[recipe, data, config.seed] += 1
        if key not in names:
            names[key] = _free_name(run, {BASE, FEW_SHOT, *groups})
        groups.setdefault(names[key], []).append(run)
    return groups


def _free_name(run: RunFolder, taken: set[str]) -> str:
    """The folder's name; with its parents' where another experiment has it."""
    parts = run.path.resolve().parts
    names = ["/".join(parts[-depth:]) for depth in range(1, len(parts) + 1)]
    free = next((name for name in names if name not in taken), None)
    return free or f"{names[0]} again"


def compare(experiments: dict[str, list[RunFolder]]) -> dict[str, Any]:
    """The base model and complete runs on one held-out set, as written to `comparison.json`.

    Each experiment is a list of runs that differ in their seed. Raises `UserError` if held-out sets differ.
    """
    every = [run for group_ in experiments.values() for run in group_]
    manifests = [run.read("manifest.json") for run in every]
    _check_comparable(every, manifests)
    bases = {run.path.parent / m["baseline"] for run, m in zip(every, manifests, strict=True)}
    one_model = len({path.name for path in bases}) == 1
    base = RunFolder(sorted(bases)[0])
    folders = {BASE: [base], FEW_SHOT: [RunFolder(base / "few_shot")]} if one_model else {}
    folders = {name: group_ for name, group_ in folders.items() if (group_[0] / "heldout_losses.jsonl").exists()}
    controls = list(folders)
    folders |= experiments
    arms = {
        name: Arm(name, [read_losses(run) for run in group_], name in experiments) for name, group_ in folders.items()
    }
    unit = "token" if one_model else "byte"
    pairs = [(name, other) for name in controls for other in experiments]
    pairs += list(pairwise(experiments))
    return {
        "heldout_rows": len(arms[next(iter(experiments))].seeds[0]),
        "heldout_tokens": sum(row.tokens for row in arms[next(iter(experiments))].seeds[0]),
        "heldout_fingerprint": manifests[0]["data"]["heldout_fingerprint"],
        "unit": unit,
        "device": manifests[0]["device"],
        "versions": manifests[0]["versions"],
        "data": manifests[0]["data"]["source"],
        "model": manifests[0]["model"],
        "table": [_line(name, folders[name]) for name in folders],
        "differences": [difference(arms[a], arms[b], unit).to_dict() for a, b in pairs],
        "forgetting": _forgetting(base, experiments) if controls else [],
        "answers": _side_by_side(folders),
    }


def _check_comparable(every: list[RunFolder], manifests: list[dict[str, Any]]) -> None:
    """Raise `UserError` for other held-out rows, and for another dtype: rounding moves a loss as a few rows do."""
    rows = [m["data"]["heldout_fingerprint"] for m in manifests]
    _check_equal(every, rows, "measured on different held-out sets", "the same dataset, data_seed and n_heldout")
    dtypes = [m["device"]["dtype"] for m in manifests]
    _check_equal(every, dtypes, "computed in different dtypes", f"one compute_dtype, such as {min(dtypes)}")


def _check_equal(every: list[RunFolder], values: list[str], what: str, fix: str) -> None:
    names = {value: run.name for run, value in zip(every, values, strict=True)}
    if len(names) > 1:
        which = ", ".join(f"{name}: {value}" for value, name in names.items())
        raise UserError(f"comparison: the runs were {what} ({which}). Fix: compare runs with {fix}.")


def _forgetting(base: RunFolder, experiments: dict[str, list[RunFolder]]) -> list[dict[str, Any]]:
    """Losses on the general questions, after less before: above zero, something was forgotten."""
    before = replace(_general(BASE, [base]), trained=False)
    return [difference(before, _general(name, group_)).to_dict() for name, group_ in experiments.items()]


def rehearsed(without: list[RunFolder], with_it: list[RunFolder]) -> Difference:
    """Loss on the general questions of runs that rehearsed less that of runs that did not: below zero, it helped."""
    return difference(_general("without rehearsal", without), _general("with rehearsal", with_it))


def _general(name: str, group_: list[RunFolder]) -> Arm:
    return Arm(name, [read_losses(run, "general_losses.jsonl") for run in group_])


def _line(name: str, group_: list[RunFolder]) -> dict[str, Any]:
    """One line of the table: means over seeds, the most memory, and the text metrics of the first seed's answers."""
    losses = [mean_loss(read_losses(run)) for run in group_]
    metrics = [run.read("metrics.json") for run in group_ if run.finished]
    keys = ("train_rows", "steps", "epochs", "train_loss", "seconds", "tokens_per_second")
    text = answers.text_metrics(_said(group_[0]))
    return {
        "name": name,
        "run": group_[0].name,
        "seeds": [m["seed"] for m in metrics],
        "heldout_loss": float(np.mean(losses)),
        "heldout_loss_by_seed": losses,
        **{key: float(np.mean([m[key] for m in metrics])) if metrics else None for key in keys},
        "peak_memory_gib": max((m["peak_memory_gib"] for m in metrics), default=None),
        "text": {key: _finite(interval) for key, interval in text.items()},
    }


def _said(run: RunFolder) -> list[dict[str, Any]]:
    """Answers, if there are any: on a CPU the base model gives none after examples."""
    return files.read_jsonl(run / "answers.jsonl") if (run / "answers.jsonl").exists() else []


def _finite(interval: Interval) -> dict[str, float | None]:
    ends = {"value": interval.value, "low": interval.low, "high": interval.high}
    return {key: value if math.isfinite(value) else None for key, value in ends.items()}


def _side_by_side(folders: dict[str, list[RunFolder]]) -> list[dict[str, str]]:
    """One entry a prompt: what the first seed of each said."""
    said = {name: found for name, group_ in folders.items() if (found := _said(group_[0]))}
    first = next(iter(said.values()))
    return [
        {"prompt": entry["prompt"], **{name: rows[i]["answer"] for name, rows in said.items()}}
        for i, entry in enumerate(first)
        if all(len(rows) > i and rows[i]["prompt"] == entry["prompt"] for rows in said.values())
    ]


def recommend(difference: Difference, rows: list[dict[str, Any]]) -> str:
    """Which of two runs to take, the second against the first: the better one, else the one that needs less memory or,
    where that is much the same, the faster one.
    """
    first, second = rows
    if difference.verdict != "not distinguishable":
        better = second if difference.verdict == "better" else first
        return f"Take {better['run']}: its held-out loss is lower."
    for column, words in (("peak GiB", "needs less memory"), ("seconds a step", "is faster")):
        if column not in first:  # on a CPU, a process's peak says nothing of one of its runs
            continue
        less, more = sorted(rows, key=lambda row: row[column])
        if less[column] < 0.95 * more[column]:
            return f"Take {less['run']}: no difference shows in the loss, and it {words}."
    return "Take either: no difference shows, in loss, memory or time."
