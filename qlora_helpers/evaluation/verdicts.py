"""Which models of a comparison are compared on which rows, in one family of verdicts."""

from dataclasses import replace
from itertools import chain

import numpy as np

from qlora_helpers.evaluation import differences
from qlora_helpers.evaluation.differences import Arm, Difference
from qlora_helpers.evaluation.row_losses import OWN_TEMPLATE


def on_shared_rows(rival: Arm, arm: Arm) -> tuple[Arm, Arm]:
    """Both, on the rows that the rival was measured on: those that its own template shows whole, if it has one."""
    if rival.name not in OWN_TEMPLATE.values():
        return rival, arm
    ids = {row.id for row in rival.seeds[0]}
    return rival, replace(arm, seeds=[[row for row in rows if row.id in ids] for rows in arm.seeds])


def as_one_family(pairs: list[tuple[Arm, Arm]], unit: str, margin: float | None) -> list[Difference]:
    """The difference of each pair, in order, with intervals that hold at once."""
    groups: dict[tuple[str, ...], list[int]] = {}  # pairs of the same rows are resampled together
    for number, (_, b) in enumerate(pairs):
        groups.setdefault(tuple(row.id for row in b.seeds[0]), []).append(number)
    if not groups:
        return []
    judged = differences.family([[pairs[n] for n in numbers] for numbers in groups.values()], unit, margin)
    found = dict(zip(chain(*groups.values()), chain(*judged), strict=True))
    return [found[number] for number in range(len(pairs))]


def best(rivals: list[Arm], arm: Arm) -> str:
    """Name of the rival with the lowest loss on the rows that all rivals were measured on."""
    shared = set.intersection(*({row.id for row in rival.seeds[0]} for rival in rivals))
    *others, own = (
        replace(one, seeds=[[row for row in rows if row.id in shared] for rows in one.seeds]) for one in (*rivals, arm)
    )
    return min(others, key=lambda rival: differences.contrast([rival, own], [1, -1]).estimate.value).name


def risen(before: Arm, after: Arm) -> int:
    """Number of rows whose loss rose, in the mean over seeds."""
    means = [np.mean([[row.loss_sum for row in rows] for rows in arm.seeds], axis=0) for arm in (before, after)]
    return int((means[1] > means[0]).sum())
