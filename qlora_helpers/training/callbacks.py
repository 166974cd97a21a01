"""What a run does beside training: its log, its copy on Google Drive, its best checkpoint."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from qlora_helpers import drive, runs


class LogWriter(TrainerCallback):
    """`log.jsonl`, a line a step. After a restart the lines past the checkpoint are dropped."""

    def __init__(self, path: Path, base_loss: float) -> None:
        self.path, self.base_loss = path, base_loss

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the file with the loss before training, and what an earlier part of this run logged."""
        first = {"step": 0, "epoch": 0.0, "eval_loss": self.base_loss}
        runs.write_jsonl(self.path, [first, *filter(_is_step, state.log_history)])

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
