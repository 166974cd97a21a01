"""TRL's trainer with small changes to steps, logging, evaluation and checkpoints."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerControl
from trl import SFTTrainer

from qlora_helpers import distributed, runs
from qlora_helpers.device import Device, forget_peak, peak_memory_gib
from qlora_helpers.evaluation import losses
from qlora_helpers.evaluation.row_losses import RowLoss, mean_loss
from qlora_helpers.models.qlora import save_biases
from qlora_helpers.runs import RunFolder
from qlora_helpers.training import checks, crossfit
from qlora_helpers.training.crossfit import Evaluations
from qlora_helpers.training.cuda_graphs import GraphStep


class QloraTrainer(SFTTrainer):
    """SFTTrainer with small changes to logging, evaluation and checkpoints. The training loop is the library's."""

    device_: Device
    evaluated_on: list[Any]
    identity: dict[str, str]
    rows_at_once: int
    control: TrainerControl
    last_evaluation: list[RowLoss]
    evaluations: Evaluations | None = None  # those of a run that is cross-fitted
    evaluated_step = -1
    peak_gib = 0.0  # of training steps
    eval_peak_gib = 0.0
    eval_seconds = 0.0  # of the last held-out losses, and of the answers after them
    graphs: GraphStep | None = None  # None: the library's forward and backward pass
    room_gib = math.inf  # memory that graphs and evaluations share
    _seconds = 0.0  # of training since the last log line, without evaluations and checkpoints
    _began: float | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._passes: list[tuple[int, torch.Tensor, float]] = []  # step, loss, learning rate since the last log line

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The library's loss without TRL's entropy and accuracy, which cost a tenth of a step on a CPU."""
        return Trainer.compute_loss(self, model, inputs, *args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """Let each process read all batches, in the order of a single process: the collator takes its share of each."""
        loader = super().get_train_dataloader()
        if distributed.count() > 1:
            batches_: Any = loader.batch_sampler
            batches_.num_processes, batches_.process_index = 1, 0
        return loader

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Compute the gradients of a batch, from a CUDA graph if there is one, without waiting for the GPU."""
        self._began = self._began or time.perf_counter()
        if self.graphs is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            loss = self.graphs(inputs["input_ids"], inputs["labels"], num_items_in_batch)
            if distributed.count() > 1:
                loss *= distributed.count()  # the library takes the mean over processes
                if self.accelerator.sync_gradients:
                    self.graphs.exchange(self.accelerator)
        self._passes.append((self.state.global_step + 1, loss, self._get_learning_rate()))
        return loss

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: nothing reads it, and the library would walk through all parameters in every step."""
        return 0

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Count tokens without waiting for the GPU where the collator has counted them. The model takes no count."""
        counted = inputs.pop("tokens", None)
        if counted is None:
            super()._track_num_input_tokens(inputs)
        else:
            self.state.num_input_tokens_seen += counted

    def _stop_clock(self) -> None:
        """Add the time since training began or went on: evaluation and saving do not count as training."""
        if self._began is not None:
            if self.device_.kind == "cuda":
                torch.cuda.synchronize()
            self._seconds += time.perf_counter() - self._began
            self._began = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the seconds of the step and the peak memory so far to its log line, so that both survive a restart.

        If several steps are logged at once, each gets its line, with an equal part of the time.
        """
        if "loss" in logs:
            self._stop_clock()
            steps = {step: rate for step, _, rate in self._passes}
            logs["seconds"], self._seconds = self._seconds / len(steps), 0.0
            logs["peak_gib"] = round(max(self.peak_gib, peak_memory_gib(self.device_)), 3)
            if len(steps) > 1:
                self._add_earlier_steps(logs, steps)
            self._passes = []
        Trainer.log(self, logs, start_time)

    def _add_earlier_steps(self, logs: dict[str, float], rates: dict[int, float]) -> None:
        """Add log lines of the steps before this one, and replace the mean loss by that of this step."""
        losses_of = dict.fromkeys(rates, 0.0)
        passes = torch.stack([loss for _, loss, _ in self._passes])
        values = self.accelerator.reduce(passes, "mean").tolist()
        for (step, _, _), value in zip(self._passes, values, strict=True):
            losses_of[step] += value
        _, logs["loss"] = losses_of.popitem()
        same = {key: logs[key] for key in logs if key != "grad_norm"}
        for step, loss in losses_of.items():
            epoch = self.state.epoch * step / self.state.global_step
            line = {**same, "loss": loss, "learning_rate": rates[step], "epoch": epoch, "step": step}
            self.state.log_history.append(line)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Loss per trained token of the rows to choose on, or else of the held-out rows."""
        self.last_evaluation = self.measure(self.evaluated_on)
        self.evaluated_step = self.state.global_step
        if self.evaluations is not None:
            self.evaluations[self.evaluated_step] = self.last_evaluation
            crossfit.write(Path(str(self.args.output_dir)).parent, self.evaluations)
        metrics = {"eval_loss": mean_loss(self.last_evaluation)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self, examples: list[Any]) -> list[RowLoss]:
        """Return the losses of rows with the current weights, by the function that measures them everywhere.

        Process 0 measures, and the others wait for its losses: what follows from them is then the same in all.
        """
        self.eval_seconds = 0.0
        with self.evaluating(), distributed.gathered(self.model), checks.unchanged(self.model):
            return distributed.from_main(
                lambda: losses.heldout_losses(self.model, examples, self.device_, self.rows_at_once)
            )

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Count time and memory inside the context as evaluation, and the memory before it as training."""
        self._stop_clock()
        self.peak_gib = max(self.peak_gib, peak_memory_gib(self.device_))
        if self.graphs is not None and self.peak_gib > self.room_gib / 2:
            self.graphs.release()
        forget_peak(self.device_)
        started = time.perf_counter()
        yield
        self.eval_seconds += time.perf_counter() - started
        self.eval_peak_gib = max(self.eval_peak_gib, peak_memory_gib(self.device_))
        forget_peak(self.device_)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save the library's checkpoint without TRL's model card, seal it, and delete older ones.

        Each process saves its random state. Process 0 saves and seals the rest. Where training stops early, none is
        saved: from there, the library would train another step.
        """
        self._stop_clock()
        if self.control.should_training_stop and self.state.global_step < self.state.max_steps:
            return
        Trainer._save_checkpoint(self, model, trial)
        distributed.wait()
        if not distributed.is_main():
            return
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        save_biases(self.model, folder)
        if self.evaluations is not None:
            crossfit.write(folder, self.evaluations)
        best_step = self.state.best_global_step if self.args.load_best_model_at_end else None
        best = f"checkpoint-{best_step}" if best_step else folder.name
        runs.seal(folder, self.identity, best if best != folder.name else None)
        runs.remove_old(RunFolder(folder.parents[1]), folder.name, best)
