"""Trainer callbacks: log, copy to Google Drive, best checkpoint, progress bar and live figure."""

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

from qlora_helpers import distributed, drive, files, plots
from qlora_helpers.device import Device, forget_peak
from qlora_helpers.errors import UserError
from qlora_helpers.notebook import in_notebook
from qlora_helpers.planning.step_time import in_words
from qlora_helpers.runs import RunFolder

REFRESH_SECONDS = 0.5
LINE_SECONDS = 30.0
REDRAW_SECONDS = 2.0
REDRAW_SHARE = 0.015  # of the time; a drawing takes the longer, the more steps it shows


class LogWriter(TrainerCallback):
    """Writes `log.jsonl`, one line per step. After a restart, lines after the checkpoint are dropped.

    `base_loss` is the loss before training, of the rows that `eval_loss` is measured on.
    """

    def __init__(self, path: Path, base_loss: float) -> None:
        self.path, self.base_loss = path, base_loss
        self._written = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the file with the loss before training and the steps before an interruption."""
        first = {"step": 0, "epoch": 0.0, "eval_loss": self.base_loss}
        files.write_jsonl(self.path, [first, *filter(_is_step, state.log_history)])
        self._written = len(state.log_history)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Append the lines since the last time."""
        new, self._written = state.log_history[self._written :], len(state.log_history)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in new if _is_step(line))


class MemoryFromHere(TrainerCallback):
    """Counts peak memory from the beginning of training, and gives back what is cached until then.

    With FSDP that is the whole model, which every process loads before it keeps a shard.
    """

    def __init__(self, device: Device) -> None:
        self.device = device

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the peak so far; the library has prepared model and optimizer."""
        forget_peak(self.device)


class LogBeforeSaving(TrainerCallback):
    """Logs before checkpoints and evaluations and at the end, where not every step is logged."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide after the library whether this step is logged."""
        control.should_log |= control.should_save or control.should_evaluate or state.global_step >= state.max_steps


class CopyToDrive(TrainerCallback):
    """Copies the run to Google Drive after every checkpoint."""

    def __init__(self, mirror: drive.Mirror) -> None:
        self.mirror = mirror

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mirror.push()


class SaveBest(TrainerCallback):
    """Saves a checkpoint at every new minimum of the evaluated loss, so that the best one is kept."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the best checkpoint so far by its step: the library notes its path, and folders are moved."""
        if state.best_global_step:
            state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{state.best_global_step}")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Compare with the best loss so far, which the trainer updates only after this call."""
        control.should_save |= state.best_metric is None or metrics["eval_loss"] < state.best_metric


def _shows_displays() -> bool:
    """Whether this process can update a display. Processes that a notebook has started cannot: they print lines."""
    return in_notebook() and distributed.count() == 1


def _is_step(line: dict[str, Any]) -> bool:
    return "loss" in line or "eval_loss" in line


@dataclass(frozen=True)
class Bar:
    """Progress of a run at one moment: HTML in a notebook, one line of text elsewhere."""

    step: int
    steps: int
    loss: float | None
    evaluated: float | None
    seconds_left: float | None
    rows: str = "held-out"

    def __str__(self) -> str:
        parts = [f"step {self.step} of {self.steps}"]
        parts += [f"loss {self.loss:.3f}"] if self.loss is not None else []
        parts += [f"{self.rows} {self.evaluated:.3f}"] if self.evaluated is not None else []
        if self.step < self.steps and self.seconds_left is not None:
            parts.append(f"about {in_words(self.seconds_left)} left")
        return ", ".join(parts)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        bar = f'<progress value="{self.step}" max="{self.steps}" style="width:16em"></progress>'
        return f'{bar} <span style="display:inline-block">{html.escape(str(self))}</span>'  # on a phone, a line below


class Progress(TrainerCallback):
    """Shows the progress of a run, in the place of transformers' own bar, which prints a line per step to a file."""

    def __init__(self, rows: str = "held-out") -> None:
        self._rows = rows
        self._began, self._first_step, self._shown = 0.0, 0, 0.0
        self._losses: dict[str, float] = {}
        self._handle: Any = None
        self._printed = ""
        self._ended = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock. A resumed run does not start at step 0."""
        self._began = self._shown = time.monotonic()
        self._first_step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Store the losses, and show them unless they were shown a moment ago."""
        self._losses |= logs or {}
        watched = _shows_displays() or sys.stdout.isatty()
        if time.monotonic() - self._shown >= (REFRESH_SECONDS if watched else LINE_SECONDS):
            self._show(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._show(state)
        if not _shows_displays() and sys.stdout.isatty():
            print()
        self._ended = True

    def _show(self, state: Any) -> None:
        self._shown = time.monotonic()
        done = state.global_step - self._first_step
        left = (self._shown - self._began) / done * (state.max_steps - state.global_step) if done else None
        losses = self._losses.get("loss"), self._losses.get("eval_loss")
        bar = Bar(state.global_step, state.max_steps, *losses, left, self._rows)
        if _shows_displays():
            if self._handle is None:
                from IPython.display import display

                self._handle = display(bar, display_id=True)
            else:
                self._handle.update(bar)
        elif not self._ended and str(bar) != self._printed:  # measurements after training get no line
            print(f"\r\x1b[K{bar}" if sys.stdout.isatty() else bar, end="" if sys.stdout.isatty() else "\n", flush=True)
            self._printed = str(bar)


class LiveLoss(TrainerCallback):
    """Draws the loss curves of a run in a notebook, updated in place while it trains. Does nothing elsewhere.

    While the run trains, drawing takes at most `REDRAW_SHARE` of the time.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self._handle: Any = None
        self._due = -math.inf
        self._before: list[dict[str, Any]] = []  # the loss before training

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Redraw, unless the figure was drawn a moment ago."""
        self._show(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Redraw, always at the last step: an evaluation may follow the end of training."""
        self._show(state, always=state.global_step >= state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._show(state, always=True)

    def _show(self, state: Any, always: bool = False) -> None:
        began = time.monotonic()
        if not in_notebook() or (began < self._due and not always):
            return
        if not self._before:  # only the file has step 0; it may not be written yet, or no longer be mounted
            with contextlib.suppress(OSError, UserError):
                self._before = [line for line in self.run.log()[:1] if line["step"] == 0]
        figure = plots.loss_curves({self.run.name: [*self._before, *state.log_history]})
        if self._handle is None:
            from IPython.display import display

            self._handle = display(figure, display_id=True)
        else:
            self._handle.update(figure)
        ended = time.monotonic()
        self._due = max(began + REDRAW_SECONDS, ended + (ended - began) / REDRAW_SHARE)
