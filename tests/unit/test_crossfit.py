"""A checkpoint is judged by rows that did not choose it, so the best of many noisy losses is not reported as better."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import EarlyStoppingCallback

from qlora_helpers.evaluation.row_losses import RowLoss, mean_loss
from qlora_helpers.runs import RunFolder
from qlora_helpers.training import crossfit

BEST = SimpleNamespace(keep_best=True, early_stopping_patience=None)
LEVEL, STEPS, ROWS = 2.0, 20, 50


def noise(rng, rows=ROWS):
    """Losses of checkpoints that are equally good."""
    return {step: [RowLoss(f"row{i}", LEVEL + rng.normal(), 1, 1) for i in range(rows)] for step in range(1, STEPS + 1)}


def test_choosing_among_equal_checkpoints_looks_like_no_gain():
    rng = np.random.default_rng(0)
    reported, chosen_and_judged = [], []
    for _ in range(200):
        evaluations = noise(rng)
        reported.append(mean_loss(crossfit.cross_fitted(evaluations, BEST)))
        chosen_and_judged.append(min(map(mean_loss, evaluations.values())))
    error = 1 / np.sqrt(200 * ROWS)
    assert abs(np.mean(reported) - LEVEL) < 3 * error
    assert np.mean(chosen_and_judged) < LEVEL - 20 * error


def test_a_better_checkpoint_is_found_by_both_halves():
    evaluations = noise(np.random.default_rng(0))
    evaluations[7] = [RowLoss(row.id, row.loss_sum - 1, 1, 1) for row in evaluations[7]]
    assert crossfit.cross_fitted(evaluations, BEST) == evaluations[7]


def test_a_row_does_not_choose_its_own_checkpoint():
    evaluations = noise(np.random.default_rng(1), rows=12)
    for number in range(12):
        for step, rows in evaluations.items():
            assert crossfit.cross_fitted(evaluations, BEST)[number] in [e[number] for e in evaluations.values()]
            lower = [RowLoss(r.id, r.loss_sum - 100 * (i == number), 1, 1) for i, r in enumerate(rows)]
            before = crossfit.cross_fitted(evaluations, BEST)[number]
            after = crossfit.cross_fitted({**evaluations, step: lower}, BEST)[number]
            assert after == (lower[number] if before == rows[number] else before)


@given(
    st.lists(st.integers(0, 8), min_size=1, max_size=30),
    st.one_of(st.none(), st.integers(1, 4)),
    st.booleans(),
)
def test_the_chosen_step_is_that_of_the_library(losses, patience, keep_best):
    state, control = SimpleNamespace(best_metric=None), SimpleNamespace(should_training_stop=False)
    args = SimpleNamespace(greater_is_better=False, metric_for_best_model="eval_loss")
    stopper = EarlyStoppingCallback(patience) if patience else None
    best = last = None
    for last, loss in enumerate(losses, 1):
        if stopper:
            stopper.on_evaluate(args, state, control, {"eval_loss": loss})
        if state.best_metric is None or loss < state.best_metric:  # the trainer's rule, applied after its callbacks
            state.best_metric, best = loss, last
        if control.should_training_stop:
            break
    config = SimpleNamespace(keep_best=keep_best, early_stopping_patience=patience)
    assert crossfit.chosen_step(dict(enumerate(losses, 1)), config) == (best if keep_best else last)


@given(st.lists(st.sampled_from(["", "a", "b", "c"]), min_size=2, max_size=20))
def test_both_halves_have_rows_and_groups_are_not_split(groups):
    rows = [RowLoss(f"row{i}", 1.0, 1, 1, group) for i, group in enumerate(groups)]
    first = crossfit.halves(rows)
    assert set(first) == {True, False}
    sides = {group: {side for row, side in zip(rows, first, strict=True) if row.group == group} for group in "abc"}
    if len({row.group or row.id for row in rows}) > 1:
        assert all(len(found) < 2 for found in sides.values())


@pytest.mark.parametrize("last", [-1, 3, 20])
def test_a_resumed_run_has_the_evaluations_up_to_its_checkpoint(tmp_path, capsys, last):
    evaluations = noise(np.random.default_rng(0), rows=3)
    crossfit.write(tmp_path, evaluations)  # of the steps after the checkpoint too
    before = {step: rows for step, rows in evaluations.items() if step <= last}
    crossfit.write(tmp_path / "checkpoint", before)
    context = SimpleNamespace(
        config=SimpleNamespace(selection_rows=9), run=RunFolder(tmp_path), data=SimpleNamespace(selection=[])
    )
    assert crossfit.begin(context, tmp_path / "checkpoint" if last > 0 else None) == before
    assert (tmp_path / crossfit.FILE).read_bytes() == (tmp_path / "checkpoint" / crossfit.FILE).read_bytes()
    assert "Fewer than 9 rows (n_selection)" in capsys.readouterr().out
