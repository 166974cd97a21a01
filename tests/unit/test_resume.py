"""A run that is interrupted at any step and started again ends exactly as if it had not been interrupted."""

import contextlib
import dataclasses
import shutil

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from transformers import TrainerCallback

from qlora_helpers.data import cleaning
from qlora_helpers.runs import RunFolder
from qlora_helpers.training import trainer
from qlora_helpers.training.checks import ZERO_STEPS

STEPS = 8
SETTINGS = st.fixed_dictionaries(
    {
        "early_stopping_patience": st.sampled_from([None, 1, 2]),
        "keep_best": st.booleans(),
        "batch_size": st.sampled_from([1, 2, 4]),
        "bias": st.sampled_from(["none", "all"]),
        "seed": st.integers(0, 3),
        "eval_steps": st.integers(1, 3),
        "save_steps": st.integers(1, 5),
        "learning_rate": st.sampled_from([0.01, 0.5]),
        "lr_scheduler": st.sampled_from(["linear", "constant"]),
    }
)
SLOW = settings(
    max_examples=8, suppress_health_check=list(HealthCheck), deadline=None, phases=[Phase.explicit, Phase.generate]
)
STOPS = {"early_stopping_patience": 2, "learning_rate": 0.5, "lr_scheduler": "constant", "eval_steps": 1}


class Cut(TrainerCallback):
    """Interrupts before the step after `steps`, or after the last one."""

    def __init__(self, steps):
        self.steps, self.fired = steps, False

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.steps:
            self.fired = True
            raise KeyboardInterrupt

    def on_train_end(self, args, state, control, **kwargs):
        if state.global_step <= self.steps:
            self.fired = True
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def check(config, tokenizer, tmp_path_factory):
    """Return a function that trains with some settings, whole and with a cut at each of `cuts`, and compares."""
    config = config.replace(epochs=2, max_new_tokens=2, n_answers=2, n_selection=6)
    root = tmp_path_factory.mktemp("resume")

    def checked(changes, cuts, cross_fitted=False, moved=False):
        own = config.replace(**changes, gradient_accumulation=4 // changes.get("batch_size", 4))
        data = cleaning.prepare(own, tokenizer)
        data = dataclasses.replace(data, selection=[]) if cross_fitted else data
        whole, run = RunFolder(root / "whole"), RunFolder(root / "cut")
        trainer.train(own, data, tokenizer, whole)
        if cuts is None:  # where the count of early stopping is not zero
            cuts = [whole.read("metrics.json")["steps"] - 1]
            assert cuts[0] + 1 < STEPS, "early stopping did not stop this run"
        for steps in cuts:
            cut = Cut(steps)
            with contextlib.suppress(KeyboardInterrupt):
                trainer.train(own, data, tokenizer, run, [cut])
            assert cut.fired
            if moved:
                run = RunFolder(run.path.rename(root / f"moved-{steps}"))
            trainer.train(own, data, tokenizer, run)
            assert results(run) == results(whole), (changes, steps)
            shutil.rmtree(run.path)
        shutil.rmtree(whole.path)

    return checked


def results(run):
    """Everything that a run ends with, except times."""
    metrics = run.read("metrics.json")
    kept = {name: metrics[name] for name in metrics if "second" not in name and "gib" not in name}
    log = [{key: line[key] for key in line.keys() & {"step", "loss", "grad_norm", "eval_loss"}} for line in run.log()]
    names = ("heldout_losses.jsonl", "general_losses.jsonl", "answers.jsonl", "evaluations.jsonl")
    return kept, log, {name: (run / name).read_bytes() for name in names if (run / name).exists()}


@pytest.mark.parametrize(
    ("changes", "cut", "cross_fitted"),
    [
        ({**STOPS, "save_steps": 1}, None, True),  # one step before early stopping
        pytest.param(
            {**STOPS, "keep_best": True, "early_stopping_patience": None, "save_steps": 50},
            STEPS,
            False,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_moved_run_ends_like_an_undisturbed_one(check, changes, cut, cross_fitted):
    check(changes, cut and [cut], cross_fitted, moved=True)


@pytest.mark.slow
@SLOW
@given(SETTINGS, st.booleans(), st.booleans())
@example({**STOPS, "early_stopping_patience": 1, "save_steps": 1}, True, False)
@example({**STOPS, "keep_best": True, "save_steps": 2, "bias": "all", "batch_size": 1}, False, True)
def test_a_run_cut_at_any_step_ends_like_an_undisturbed_one(check, changes, cross_fitted, moved):
    check(changes, range(STEPS + 1), cross_fitted, moved)


def test_the_count_of_steps_without_a_gradient_outlasts_a_cut():
    """Otherwise a run that learns nothing, interrupted every few steps, would never stop."""
    guard = trainer.Guard()
    for _ in range(ZERO_STEPS - 1):
        guard.on_log(None, None, None, logs={"grad_norm": 0.0})
    assert trainer.Guard.from_state(guard.state())._without_gradient == ZERO_STEPS - 1
