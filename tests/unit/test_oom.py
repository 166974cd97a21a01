"""Runs that exceed GPU memory midway. The tests raise torch's own error at the start of a step."""

import pytest
import torch
from transformers import TrainerCallback

from qlora_helpers import UserError
from qlora_helpers.data import cleaning
from qlora_helpers.evaluation import answers
from qlora_helpers.runs import RunFolder
from qlora_helpers.training import oom, trainer


class RaiseOnce(TrainerCallback):
    """Raises once, at the start of step 5, and records the batch size and accumulation of each step."""

    def __init__(self, error):
        self.error, self.splits = error, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.splits.append((state.global_step, args.per_device_train_batch_size, args.gradient_accumulation_steps))
        if state.global_step == 5 and self.error:
            error, self.error = self.error, None
            raise error


@pytest.fixture(scope="module")
def train(config, tokenizer, tmp_path_factory):
    """Train in eight steps, into folders that share the losses of the base model."""
    longer, folder = config.replace(epochs=2, dropout=0.0, n_answers=1), tmp_path_factory.mktemp("runs")
    data = cleaning.prepare(longer, tokenizer)

    def run_it(name, *callbacks, **changes):
        return trainer.train(longer.replace(**changes), data, tokenizer, RunFolder(folder / name), callbacks)

    run_it.folder = folder
    return run_it


def test_shrunk_run_resumes_from_the_checkpoint_with_the_same_steps(train):
    callback = RaiseOnce(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    run = train("shrunk", callback, on_oom="shrink")
    plain = train("plain")
    assert callback.splits == [*((step, 4, 1) for step in range(6)), *((step, 2, 2) for step in range(4, 8))]
    assert run.read("config.json")["config"]["batch_size"] == 2
    assert run.read("config.json")["identity"] == plain.read("config.json")["identity"]
    steps = [[line["step"] for line in done.log() if "loss" in line] for done in (run, plain)]
    assert steps[0] == steps[1] == list(range(1, 9))
    losses = [done.read("metrics.json")["eval_loss"] for done in (run, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_stopping_raises_a_one_line_error_that_holds_no_tensors(train):
    with pytest.raises(UserError) as caught:
        train("stopped", RaiseOnce(torch.cuda.OutOfMemoryError("CUDA out of memory")))
    assert str(caught.value).startswith("memory: the GPU ran out: ")
    assert caught.value.__context__ is None
    assert (train.folder / "stopped" / "checkpoints" / "checkpoint-4" / "complete.json").exists()


def test_other_runtime_errors_are_raised(train):
    with pytest.raises(RuntimeError, match="another error"):
        train("failed", RaiseOnce(RuntimeError("another error")))


def test_running_out_during_answers_restores_the_tokenizer(setup, config, device, tokenizer, monkeypatch):
    model, _ = setup
    side = tokenizer.padding_side

    def fail(*args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(answers, "_continue", fail)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        answers.generate(model, tokenizer, config, device, [{"prompt": "x", "reference": None}])
    assert tokenizer.padding_side == side


def test_is_oom_error():
    assert oom.is_oom_error(torch.cuda.OutOfMemoryError("any"))
    assert oom.is_oom_error(RuntimeError("CUDA error: out of memory"))
    assert oom.is_oom_error(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when …"))
    assert not oom.is_oom_error(RuntimeError("shapes do not match"))
