"""The figure that a notebook redraws while a run trains."""

import contextlib
import math
import time
from typing import Any

from transformers import TrainerCallback

from qlora_helpers import plots
from qlora_helpers.runs import RunFolder
from qlora_helpers.training.progress import in_notebook

REFRESH_SECONDS = 2.0


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
        if not in_notebook() or (now - self._shown < REFRESH_SECONDS and not always):
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
