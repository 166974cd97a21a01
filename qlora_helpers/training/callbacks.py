"""What a run does beside training: its log, its copy on Google Drive, its best checkpoint, its progress, its figure."""

import contextlib
import html
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from qlora_helpers import drive, files, plots
from qlora_helpers.notebook import in_notebook
from qlora_helpers.planning.step_time import in_words
from qlora_helpers.runs import RunFolder

REFRESH_SECONDS = 0.5
LINE_SECONDS = 30.0
REDRAW_SECONDS = 2.0


class LogWriter(TrainerCallback):
    """`log.jsonl`, a line a step. After a restart the lines past the checkpoint are dropped."""

    def __init__(self, path: Path, base_loss: float) -> None:
        self.path, self.base_loss = path, base_loss

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the file with the loss before training, and what an earlier part of this run logged."""
        first = {"step": 0, "epoch": 0.0, "eval_loss": self.base_loss}
        files.write_jsonl(self.path, [first, *filter(_is_step, state.log_history)])

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the newest line."""
        if _is_step(state.log_history[-1]):
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


class CopyToDrive(TrainerCallback):
    """Brings the run on Google Drive up to date when a checkpoint is whole."""

    def __init__(self, mirror: drive.Mirror) -> None:
        self.mirror = mirror

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The checkpoint is sealed: copy it."""
        self.mirror.push()


class SaveBest(TrainerCallback):
    """Saves a checkpoint whenever the held-out loss is a new low, so that the best one is there at the end."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Compare with the best so far, which the trainer notes only after this."""
        control.should_save |= state.best_metric is None or metrics["eval_loss"] < state.best_metric


def _is_step(line: dict[str, Any]) -> bool:
    return "loss" in line or "eval_loss" in line


@dataclass(frozen=True)
class Bar:
    """One moment of a run: HTML in a notebook, a line anywhere else."""

    step: int
    steps: int
    loss: float | None
    heldout: float | None
    seconds_left: float | None

    def __str__(self) -> str:
        parts = [f"step {self.step} of {self.steps}"]
        parts += [f"loss {self.loss:.3f}"] if self.loss is not None else []
        parts += [f"held-out {self.heldout:.3f}"] if self.heldout is not None else []
        if self.step < self.steps and self.seconds_left is not None:
            parts.append(f"about {in_words(self.seconds_left)} left")
        return ", ".join(parts)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return (
            f'<progress value="{self.step}" max="{self.steps}" style="width:16em"></progress> {html.escape(str(self))}'
        )


class Progress(TrainerCallback):
    """Shows the run where it is watched. In place of the library's own bar, which prints a line a step to a file."""

    def __init__(self) -> None:
        self._began, self._first_step, self._shown = 0.0, 0, 0.0
        self._losses: dict[str, float] = {}
        self._handle: Any = None
        self._ended = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Time runs from here: a run that was cut off begins somewhere in the middle."""
        self._began = self._shown = time.monotonic()
        self._first_step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Note the losses; show them, if the last time is long enough ago."""
        self._losses |= logs or {}
        watched = in_notebook() or sys.stdout.isatty()
        if time.monotonic() - self._shown >= (REFRESH_SECONDS if watched else LINE_SECONDS):
            self._show(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the end behind."""
        self._show(state)
        if not in_notebook() and sys.stdout.isatty():
            print()
        self._ended = True

    def _show(self, state: Any) -> None:
        self._shown = time.monotonic()
        done = state.global_step - self._first_step
        left = (self._shown - self._began) / done * (state.max_steps - state.global_step) if done else None
        bar = Bar(state.global_step, state.max_steps, self._losses.get("loss"), self._losses.get("eval_loss"), left)
        if in_notebook():
            if self._handle is None:
                from IPython.display import display

                self._handle = display(bar, display_id=True)
            else:
                self._handle.update(bar)
        elif not self._ended:  # what is measured afterwards has no line of its own
            print(f"\r\x1b[K{bar}" if sys.stdout.isatty() else bar, end="" if sys.stdout.isatty() else "\n", flush=True)


class LiveLoss(TrainerCallback):
    """The run so far, redrawn in one place of a notebook while it trains; outside one, nothing."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self._handle: Any = None
        self._shown = -math.inf

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Redraw, if the last time is long enough ago."""
        self._show(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Redraw; always at the last step, since an evaluation may come after the end of training."""
        self._show(state, always=state.global_step >= state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the whole curve behind."""
        self._show(state, always=True)

    def _show(self, state: Any, always: bool = False) -> None:
        now = time.monotonic()
        if not in_notebook() or (now - self._shown < REDRAW_SECONDS and not always):
            return
        self._shown = now
        # The file has the loss before training; for the rest it may lag a line behind.
        logged = []
        with contextlib.suppress(OSError):  # not there yet, or on a Drive that is gone
            logged = self.run.log()
        first = [line for line in logged if line["step"] == 0]
        figure = plots.loss_curves({"this run": [*first, *state.log_history]})
        if self._handle is None:
            from IPython.display import display

            self._handle = display(figure, display_id=True)
        else:
            self._handle.update(figure)
