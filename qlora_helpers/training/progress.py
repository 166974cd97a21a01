"""How far a run is: a bar in a notebook or a terminal, a line now and then where nobody watches."""

import html
import sys
import time
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from qlora_helpers.planning.step_time import in_words

REFRESH_SECONDS = 0.5
LINE_SECONDS = 30.0


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


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this; it has then imported IPython itself."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


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
