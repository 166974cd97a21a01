"""Two-fold cross-fitting: judge each held-out row by the checkpoint that the other half of the rows would choose.

The lowest of many losses is too low by chance if the rows that choose also judge (Cawley and Talbot, "On over-fitting
in model selection and subsequent selection bias in performance evaluation", JMLR 11, 2010). A run without rows to
choose on therefore saves the loss of every held-out row at every evaluation.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from qlora_helpers import distributed, files
from qlora_helpers.config import Config
from qlora_helpers.evaluation.context import RunContext
from qlora_helpers.evaluation.lessons import stopped
from qlora_helpers.evaluation.row_losses import RowLoss, mean_loss

FILE = "evaluations.jsonl"
Evaluations = dict[int, list[RowLoss]]  # losses of the held-out rows by step


def cross_fitted(evaluations: Mapping[int, list[RowLoss]], config: Config) -> list[RowLoss]:
    """Return the loss of each row at the step that the other half of the rows chooses, in the order of the rows."""
    first = halves(next(iter(evaluations.values())))
    chosen = {}
    for half in (True, False):
        others = {
            step: mean_loss([row for row, side in zip(rows, first, strict=True) if side != half])
            for step, rows in evaluations.items()
        }
        chosen[half] = chosen_step(others, config)
    return [evaluations[chosen[half]][number] for number, half in enumerate(first)]


def chosen_step(losses: Mapping[int, float], config: Config) -> int:
    """Return the step whose weights a run ends with, given its loss at each evaluation in order.

    With `keep_best`, it is the step of the lowest loss; else the last one. Early stopping ends the evaluations.
    """
    last = stopped(list(losses.values()), config.early_stopping_patience)
    steps = list(losses)[: None if last is None else last + 1]
    return min(steps, key=losses.__getitem__) if config.keep_best else steps[-1]


def halves(rows: list[RowLoss]) -> list[bool]:
    """Return whether each row is in the first of two halves, by a hash of its id. Groups are not split if possible."""
    keys = [row.group or row.id for row in rows]
    if len(set(keys)) < 2:
        keys = [row.id for row in rows]
    order = sorted(set(keys), key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    first = set(order[::2])
    return [key in first for key in keys]


def begin(context: RunContext, checkpoint: Path | None) -> Evaluations | None:
    """Return the evaluations up to the checkpoint from which a run continues; None for a run that is not cross-fitted.

    They are also written to the run folder. A printed line says that the run is cross-fitted.
    """
    config = context.config
    if not config.selection_rows or context.data.selection:
        return None
    print(
        f"Fewer than {config.selection_rows} rows (n_selection) are left to choose a checkpoint on. Each half of the "
        "held-out rows is judged by the checkpoint that the other half chooses.",
        flush=True,
    )
    evaluations: Evaluations = {}
    for line in files.read_jsonl(checkpoint / FILE) if checkpoint else []:
        evaluations.setdefault(line.pop("step"), []).append(RowLoss(**line))
    write(context.run.path, evaluations)
    return evaluations


def write(folder: Path, evaluations: Evaluations) -> None:
    """Write one line per step and row to `evaluations.jsonl` in a run folder or in a checkpoint."""
    lines = ({"step": step, **asdict(row)} for step, rows in evaluations.items() for row in rows)
    if distributed.is_main():
        files.write_jsonl(folder / FILE, lines)
