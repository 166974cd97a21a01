"""Runs that would learn or measure nothing stop with the reason. Each test plants one fault."""

import dataclasses
import errno
import random

import numpy as np
import pytest
import torch
from transformers import Trainer

from qlora_helpers import UserError
from qlora_helpers.data.prompts import IGNORE
from qlora_helpers.evaluation import losses
from qlora_helpers.training import checks, trainer


@pytest.fixture(scope="module")
def config(config):
    return config.replace(epochs=1, eval_steps=1, n_answers=1)


@pytest.fixture
def train(config, data, tokenizer, run):
    """Train into `run`, with rows or settings changed by the test."""

    def run_training(rows=data, **changes):
        return trainer.train(config.replace(**changes), rows, tokenizer, run)

    return run_training


def plant_loss(monkeypatch, change):
    """Apply `change` to the loss that the library computes."""
    original = Trainer.compute_loss
    monkeypatch.setattr(Trainer, "compute_loss", lambda *args, **kwargs: change(original(*args, **kwargs)))


@pytest.mark.parametrize(("factor", "shown"), [(0.0, "0.0"), (float("nan"), "nan"), (float("inf"), "inf")])
def test_loss_that_is_zero_or_not_finite_stops_at_the_first_step(train, monkeypatch, factor, shown):
    plant_loss(monkeypatch, lambda loss: loss * factor)
    with pytest.raises(UserError, match=f"loss at step 1 is {shown}.*Fix"):
        train()


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_three_steps_without_a_gradient_stop(train, monkeypatch, clip):
    """The loss is unchanged, but detached from the weights, as repacked 4-bit weights do it."""
    plant_loss(monkeypatch, lambda loss: loss * 0 + loss.detach())
    with pytest.raises(UserError, match=r"gradients of 3 steps up to step 3 are zero.*Fix"):
        train(max_grad_norm=clip)


def test_isolated_steps_without_a_gradient_do_not_stop(train, monkeypatch):
    """The second of four steps has one, so that the two after it are not the third in a row."""
    calls = iter(range(4))
    plant_loss(monkeypatch, lambda loss: loss * 0 + loss.detach() if next(calls) != 1 else loss)
    assert train().finished


def test_adapter_that_does_not_change_stops(train):
    with pytest.raises(UserError, match=r"still has its initial weights.*Fix"):
        train(learning_rate=0.0)


def test_adapter_that_is_not_finite_stops():
    layer = torch.nn.Module()
    layer.lora_B = torch.nn.Parameter(torch.tensor([1.0, float("nan")]))
    with pytest.raises(UserError, match=r"nan or infinity.*Fix"):
        checks.check_moved(layer)


def draw(model):
    torch.rand(1)


def draw_plain(model):
    random.random()


def draw_numpy(model):
    np.random.rand()


def leave_in_eval(model):
    model.eval()


def move_the_adapter(model):
    next(p for p in model.parameters() if p.requires_grad).data += 1e-3


def freeze(model):
    next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)


def repack(model):
    weight = next(p for p in model.parameters() if not p.requires_grad)
    weight.data = weight.data.clone()


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (draw, "random state"),
        (draw_plain, "random state"),
        (draw_numpy, "random state"),
        (leave_in_eval, "mode"),
        (move_the_adapter, "adapter's weights"),
        (freeze, "which weights are trained"),
        (repack, "base's weights"),
    ],
)
def test_evaluation_that_affects_training_stops(train, monkeypatch, fault, named):
    original = losses.heldout_losses

    def meddle(model, *args, **kwargs):
        measured = original(model, *args, **kwargs)
        if model.training:  # the base model is evaluated before training, where nothing is affected
            fault(model)
        return measured

    monkeypatch.setattr(losses, "heldout_losses", meddle)
    with pytest.raises(UserError, match=f"evaluation: it changed .*{named}.*Fix"):
        train()


@pytest.mark.parametrize("where", ["train", "heldout"])
def test_row_with_an_empty_label_mask_is_named(train, data, where, run):
    rows = getattr(data, where)
    masked = dataclasses.replace(rows[1], labels=[IGNORE] * len(rows[1].labels))
    planted = dataclasses.replace(data, **{where: [rows[0], masked, *rows[2:]]})
    with pytest.raises(UserError, match=f"row {masked.row.id} .*label mask is empty.*Fix"):
        train(planted)
    assert not run.path.exists()


def test_heldout_row_that_is_trained_on_stops(train, data, run):
    planted = dataclasses.replace(data, train=[*data.train[1:], data.heldout[0]])
    with pytest.raises(UserError, match=r"1 of its rows are also trained on.*Fix"):
        train(planted)
    assert not run.path.exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_a_one_line_error_and_the_run_resumes(train, monkeypatch, number, run):
    """The disk fills up while the second checkpoint is written."""
    original = Trainer._save_checkpoint

    def full(self, *args):
        if self.state.global_step == 4:
            raise OSError(number, "No space left on device")
        original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_checkpoint", full)
        with pytest.raises(UserError, match=rf"disk: {run.path} is full.*Fix"):
            train()
    assert (run / "checkpoints" / "checkpoint-2" / "complete.json").exists()
    assert train().finished


def test_other_errors_are_not_changed(tmp_path):
    with pytest.raises(RuntimeError, match="something else"), checks.full_disk_as_user_error(tmp_path):
        raise RuntimeError("something else")


def test_full_disk_is_recognized_by_its_free_space(tmp_path, monkeypatch):
    """torch's writer reports only that it failed."""
    usage = checks.shutil._ntuple_diskusage(100, 100, 0)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="is full"), checks.full_disk_as_user_error(tmp_path):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0")
