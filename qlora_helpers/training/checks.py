"""Checks that stop a run which would learn or measure nothing. Each says what is wrong and how to fix it."""

import contextlib
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from qlora_helpers import distributed
from qlora_helpers.data import cleaning
from qlora_helpers.data.cleaning import Data
from qlora_helpers.errors import FULL, UserError

ZERO_STEPS = 3  # consecutive steps: a single step without gradient may be due to its rows
SPARE = 2**20  # bytes; a disk with less free space is full, whatever error the writing library raises


class Guard(TrainerCallback, ExportableState):
    """Stops a run whose loss or gradients show that it learns nothing. Checkpoints keep its count of steps."""

    def __init__(self) -> None:
        self._without_gradient = 0

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of this callback, in the form of the library."""
        return {"args": {}, "attributes": {"_without_gradient": self._without_gradient}}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Check the loss and the gradient norm of a step. Raises `UserError` with the step."""
        logs = logs or {}
        loss, norm = logs.get("loss"), logs.get("grad_norm")
        if loss is not None and (loss == 0 or not math.isfinite(loss)):
            raise UserError(
                f"training: the loss at step {state.global_step} is {loss}. Fix: lower learning_rate if it is not "
                "finite; if it is 0, check in the label viewer that any token is trained."
            )
        if norm is not None:
            self._without_gradient = self._without_gradient + 1 if norm == 0 else 0
        if self._without_gradient == ZERO_STEPS:
            raise UserError(
                f"training: the gradients of {ZERO_STEPS} steps up to step {state.global_step} are zero: the adapter "
                "learns nothing. Fix: run notebook 01, which checks the 4-bit kernels; if it passes, try "
                "quantization=none or other target_modules."
            )


def check_rows(data: Data) -> None:
    """Raise `UserError` with the row's id if a row has no trained token, or if a held-out row is also trained on.

    Cleaning drops such rows. This checks data from any source.
    """
    parts = {"training": data.trained_on, "held-out": data.heldout, "selection": data.selection}
    for where, examples in parts.items():
        empty = next((example.row for example in examples if not example.trained), None)
        if empty:
            raise UserError(
                f"labels: {where} row {empty.id} ({empty.origin}) has no trained token: its label mask is empty. "
                "Fix: increase max_length, or use cleaning.prepare, which drops such rows."
            )
    cleaning.check_no_leak(data)


def check_saved_alike(checkpoint: Path) -> None:
    """Raise `UserError` if FSDP saved the checkpoint and does not run now, or the other way round."""
    sharded = any(checkpoint.glob("pytorch_model_fsdp*"))
    if sharded != distributed.is_sharded():
        with_or_without = "with" if sharded else "without"
        raise UserError(
            f"checkpoint: {checkpoint} was saved {with_or_without} FSDP. Fix: continue {with_or_without} it, with any "
            "number of processes, or choose another run folder."
        )


def check_moved(model: Any) -> None:
    """Raise `UserError` if the adapter still has its initial weights, lora_B = 0, or weights that are not finite."""
    largest = [p.detach().abs().max() for name, p in model.named_parameters() if "lora_B" in name]
    if not all(torch.isfinite(value) for value in largest):
        raise UserError("training: the adapter contains nan or infinity. Fix: lower learning_rate.")
    if not any(value > 0 for value in largest):
        raise UserError(
            "training: the adapter still has its initial weights. Fix: train for more steps, or raise learning_rate."
        )


@contextlib.contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """Check that the body of a `with` statement does not affect training. Raises `UserError` with what changed.

    The model's mode, its weights, which of them are trained, and the random state must stay the same.
    """
    before = _state(model)
    yield
    after = _state(model)
    changed = [name for name in before if not _equal(before[name], after[name])]
    if changed:
        raise UserError(
            f"evaluation: it changed {', '.join(changed)}, which affects the rest of the run. Fix: let the evaluation "
            "work on a copy, and restore the model's mode and the random state."
        )


def _state(model: Any) -> dict[str, list[Any]]:
    """Return everything that an evaluation must not change.

    Adapter weights are compared by value. Base weights are compared by address, shape and dtype, because they are large
    and 4-bit libraries repack whole tensors.
    """
    named = list(model.named_parameters())
    generators = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]
    return {
        "the model's mode (train or eval)": [model.training],
        "which weights are trained": [p.requires_grad for _, p in named],
        "the adapter's weights": [p.detach().clone() for _, p in named if p.requires_grad],
        "the base's weights": [(p.data_ptr(), p.shape, p.dtype) for _, p in named if not p.requires_grad],
        "the random state": [*generators, random.getstate(), str(np.random.get_state())],
    }


def _equal(a: list[Any], b: list[Any]) -> bool:
    same = (torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=False))
    return len(a) == len(b) and all(same)


@contextlib.contextmanager
def full_disk_as_user_error(folder: Path) -> Iterator[None]:
    """Raise `UserError` if the body of a `with` statement fails because the disk of `folder` is full.

    Complete checkpoints stay complete. Libraries report a full disk as OSError, RuntimeError or an error of their own,
    so the free space decides.
    """
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in FULL
        if isinstance(error, UserError) or not (full or shutil.disk_usage(folder).free < SPARE):
            raise
        raise UserError(
            f"disk: {folder} is full, and the run cannot continue. Saved checkpoints are complete. "
            "Fix: free some space and run again; training resumes from the last checkpoint."
        ) from None
