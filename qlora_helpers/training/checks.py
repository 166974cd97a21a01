"""What stops a run that only looks like one: each check says what is wrong and how to mend it."""

import contextlib
import errno
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from qlora_helpers.data import cleaning
from qlora_helpers.data.cleaning import Data
from qlora_helpers.errors import UserError

ZERO_STEPS = 3  # a single step without gradient may be a row's own fault
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
SPARE = 2**20  # bytes: a disk with less is full, whatever the library that wrote to it says


class Guard(TrainerCallback):
    """Stops a run whose loss or gradients say that nothing is learned."""

    def __init__(self) -> None:
        self._without_gradient = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Look at a step's loss and at the norm of its gradients."""
        logs = logs or {}
        loss, norm = logs.get("loss"), logs.get("grad_norm")
        if loss is not None and (loss == 0 or not math.isfinite(loss)):
            raise UserError(
                f"training: the loss at step {state.global_step} is {loss}. Fix: a lower learning_rate if it is nan, "
                "or a look at the label viewer if it is 0: no token may be trained."
            )
        if norm is not None:
            self._without_gradient = self._without_gradient + 1 if norm == 0 else 0
        if self._without_gradient == ZERO_STEPS:
            raise UserError(
                f"training: the gradients of {ZERO_STEPS} steps up to step {state.global_step} are zero: the adapter "
                "learns nothing. Fix: run notebook 01, which proves the 4-bit arithmetic; if it passes, try "
                "quantization=none or other target_modules."
            )


def check_rows(data: Data) -> None:
    """Raise `UserError`, with the row's id, if a row has no token to learn or to be measured on, or if a held-out row
    is trained on. Cleaning drops such rows; this looks at what it is handed, whoever made it.
    """
    for where, examples in (("training", data.trained_on), ("held-out", data.heldout)):
        empty = next((example.row for example in examples if not example.trained), None)
        if empty:
            raise UserError(
                f"labels: {where} row {empty.id} ({empty.origin}) has no trained token: its label mask is empty. "
                "Fix: a larger max_length, or rows from cleaning.prepare, which drops such rows."
            )
    cleaning.check_no_leak(data)


def check_moved(model: Any) -> None:
    """Raise `UserError` if the adapter is where it began, which is lora_B = 0, or holds no numbers."""
    largest = [p.detach().abs().max() for name, p in model.named_parameters() if "lora_B" in name]
    if not all(torch.isfinite(value) for value in largest):
        raise UserError("training: the adapter holds nan or infinity. Fix: a lower learning_rate.")
    if not any(value > 0 for value in largest):
        raise UserError(
            "training: the adapter has not moved from its first weights. Fix: more steps or a higher learning_rate."
        )


@contextlib.contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """What is done inside must leave training as it was: the model's mode, its weights, which of them are trained, and
    the random numbers to come. Raises `UserError` with what changed.
    """
    before = _state(model)
    yield
    after = _state(model)
    changed = [name for name in before if not _equal(before[name], after[name])]
    if changed:
        raise UserError(
            f"evaluation: it changed {', '.join(changed)}: the run after it is another one. Fix: whatever measures "
            "must work on a copy and restore the model's mode and the random state."
        )


def _state(model: Any) -> dict[str, list[Any]]:
    """Adapter weights by value; those of the base by place and form, since they are large and 4-bit libraries repack
    them as a whole.
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
    """A disk that is full while `folder` is written becomes a `UserError`; a checkpoint that is whole stays whole.

    The libraries raise OSError, RuntimeError or an error of their own for it, so free space decides.
    """
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in NO_ROOM
        if isinstance(error, UserError) or not (full or shutil.disk_usage(folder).free < SPARE):
            raise
        raise UserError(
            f"disk: {folder} is full, and the run cannot go on. What was saved is whole. "
            "Fix: free some space, and run again: it goes on from the last checkpoint."
        ) from None
