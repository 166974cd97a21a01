"""How the steps of a run are computed: by the library, from CUDA graphs, or with compiled blocks."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast

from qlora_helpers import distributed, files
from qlora_helpers.config import Config
from qlora_helpers.data.cleaned import Data
from qlora_helpers.data.streaming import StreamedData
from qlora_helpers.device import Device, autocast
from qlora_helpers.errors import UserError, cause
from qlora_helpers.evaluation.context import RunContext
from qlora_helpers.models import forward
from qlora_helpers.training import batches, cuda_graphs
from qlora_helpers.training.cuda_graphs import GraphStep, Passes

PATHS = ("off", "graphs", "compiled")  # from the slowest
LOG_EVERY = 10  # steps between log writes with graphs; every step still has its line
TIMED = 3  # passes that a path is timed with, after one that is not timed
COMPILE_SECONDS = 8.0  # per length; 6 were measured beside an H100: see docs/speed.md
COMPILED_SAVES = 0.3  # share of a graph's time, measured on an H100
WINDOWS = ("sliding_window", "attention_chunk_size")  # settings of models whose tokens do not see all earlier ones


@dataclass(frozen=True)
class Choice:
    """How the forward and backward passes of a run are computed, why, and the seconds of one on each path tried."""

    path: str
    reason: str
    seconds: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        times = ", ".join(f"{path} {1000 * seconds:.0f} ms" for path, seconds in self.seconds.items())
        return f"fast={self.path} ({self.reason}{f'; {times} a pass' if times else ''})."


def prepare(trainer: Any, context: RunContext, checkpoint: Path | None) -> None:
    """Choose how the steps of `trainer` are computed, print it, and record it in the manifest.

    A run that continues stays on its path, so that it ends as if it had not been interrupted.
    """
    config, run, device, data = context.config, context.run, context.device, context.data
    done = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    passes = (config.steps(len(data.trained_on)) - done) * config.gradient_accumulation
    wanted = (run.training_path().get("path") if checkpoint else None) or config.fast
    if config.gradient_checkpointing:
        recompute(trainer, config)
    trainer.graphs, choice = None, _impossible(trainer, config)
    if choice is None:
        longest, largest = distributed.from_main(lambda: _longest_and_largest(data))
        lengths = cuda_graphs.lengths_for(longest, config.sampling)
        rows = config.batch_size // distributed.count()
        trainer.graphs, choice = _agreed(
            *choose(trainer.model, device, trainer.accelerator.backward, wanted, rows, lengths, passes)
        )
    if distributed.is_main():
        files.write_json(run / "manifest.json", {**run.read("manifest.json"), "training_path": asdict(choice)})
    if device.kind == "cuda":
        print(f"Steps: {choice}")
    if trainer.graphs is not None:
        embeddings = trainer.model.get_input_embeddings()
        embeddings(torch.tensor([largest], device=embeddings.weight.device))  # raises `UserError` if there is none
        trainer.data_collator = cuda_graphs.FixedShapes(rows, lengths)
        if distributed.count() > 1:
            _exchange_after_backward(trainer)
        trainer.args.logging_steps = LOG_EVERY
        trainer.room_gib = min(device.memory_gib, config.memory_limit_gib or device.memory_gib)


def _agreed(step: GraphStep | None, choice: Choice) -> tuple[GraphStep | None, Choice]:
    """Return the slowest of the paths that the processes have chosen: all of them exchange gradients in one way."""
    slowest = min(distributed.of_all(choice), key=lambda one: PATHS.index(one.path))
    if step is None or slowest.path == choice.path:
        return step, slowest
    step.release()
    step.passes.undo_compile()
    return (None if slowest.path == "off" else step), slowest


def _exchange_after_backward(trainer: Any) -> None:
    """Prepare a trainer for gradients that are exchanged after the backward pass, which a graph replays.

    accelerate leaves the model as it is: DDP exchanges them in hooks of the backward pass, and a graph has none.
    """
    trainer.data_collator = batches.Share(trainer.data_collator)
    trainer.accelerator.prepare_model = partial(trainer.accelerator.prepare_model, evaluation_mode=True)
    for parameter in trainer.graphs.trained:
        broadcast(parameter.data)  # DDP would do it too


def _longest_and_largest(data: Data) -> tuple[int, int]:
    """Return the number of tokens of the longest row that is trained on, and the largest token id."""
    if isinstance(data, StreamedData):
        return data.seen.longest, data.seen.largest_token
    rows = [example.input_ids for example in data.trained_on]
    return max(map(len, rows)), max(map(max, rows))


def recompute(trainer: Any, config: Config) -> None:
    """Let the model recompute activations from now on, as in training: passes are timed and captured before it begins.

    Without dropout there are no random numbers to draw again. A graph could not set their generator back.
    """
    options = {"use_reentrant": False, "preserve_rng_state": config.dropout > 0}
    trainer.args.gradient_checkpointing_kwargs = options
    trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _impossible(trainer: Any, config: Config) -> Choice | None:
    """Return the library's own path, and why no other is tried, or None."""
    if distributed.is_sharded():
        return Choice("off", "graphs do not gather the weights that FSDP has sharded")
    if not trainer.model_accepts_loss_kwargs:
        return Choice("off", "the model's loss is a mean of its own")
    if config.gradient_checkpointing and config.dropout:
        return Choice("off", "recomputed activations draw dropout again, which a graph cannot; dropout=0 needs none")
    return None


def choose(
    model: Any, device: Device, backward: Callable[[torch.Tensor], None], wanted: str, rows: int,
    lengths: Sequence[int], passes_left: int,
) -> tuple[GraphStep | None, Choice]:  # fmt: skip
    """Return the step of the fastest path for the passes that are left, and the choice; None for the library's own.

    `wanted` is auto or a path. Each path is timed on a batch of the greatest length before training starts, which
    changes neither weights nor gradients nor random numbers. What cannot be captured is trained without graphs.
    """
    if device.kind != "cuda" or wanted == "off":
        return None, Choice("off", "as requested" if wanted == "off" else "CUDA graphs need an NVIDIA or AMD GPU")
    passes = Passes(model, device, backward)
    if reason := _unsuitable(model, passes, max(lengths)):
        return None, Choice("off", reason)
    step = GraphStep(passes, rows)
    seconds: dict[str, float] = {}
    mode = model.training
    model.train()
    try:
        with torch.cuda.device(model.device):
            return _fastest(step, wanted, lengths, passes_left, seconds)
    except Exception as error:
        step.release()
        return None, Choice("off", f"capturing failed: {cause(error)}", seconds)
    finally:
        model.zero_grad()
        model.train(mode)


def _unsuitable(model: Any, passes: Passes, longest: int) -> str | None:
    """Return why the passes may not replace the model's own forward pass, or None."""
    text = model.config.get_text_config()
    if any((getattr(text, name, None) or longest) < longest for name in WINDOWS):
        return "the model attends within a window that is shorter than the rows"
    rounding = 0.0 if passes.device.dtype == "float32" else batches.ROUNDING
    try:
        with autocast(passes.device):
            same = batches.same_loss(model, batches.padded, rounding, passes.loss)
    except (AttributeError, ValueError, TypeError, UserError):
        return "the model's attention or output head cannot be called separately"
    return None if same else "the loss differs from that of the model's own forward pass"


def _fastest(
    step: GraphStep, wanted: str, lengths: Sequence[int], passes_left: int, seconds: dict[str, float]
) -> tuple[GraphStep | None, Choice]:
    example = step.untrained(max(lengths))
    step.attach_gradients()  # else the passes would make others
    seconds["off"] = _seconds(lambda: step.passes(*example))
    if wanted != "compiled":
        step.warm_up(lengths)
        seconds["graphs"] = _seconds(lambda: step(*example))
        if wanted == "graphs":
            return step, Choice("graphs", "as requested", seconds)
        if seconds["off"] <= seconds["graphs"]:
            step.release()
            return None, Choice("off", "graphs are not faster here", seconds)
        if passes_left * seconds["graphs"] * COMPILED_SAVES < COMPILE_SECONDS * len(lengths):
            return step, Choice("graphs", "compiling would take longer than it saves", seconds)
        step.release()
    step.passes.compile()
    step.warm.clear()
    step.warm_up(lengths)
    seconds["compiled"] = _seconds(lambda: step(*example))
    if wanted == "compiled":
        return step, Choice("compiled", "as requested", seconds)
    if seconds["compiled"] < seconds["graphs"]:
        return step, Choice("compiled", "the fastest here", seconds)
    step.release()
    step.passes.undo_compile()
    return step, Choice("graphs", "compiled blocks are not faster here", seconds)


def _seconds(run: Callable[[], Any]) -> float:
    """Return the seconds of a call, the mean of three after a first one."""
    with forward.random_numbers_given_back():
        run()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(TIMED):
            run()
        torch.cuda.synchronize()
    return round((time.perf_counter() - began) / TIMED, 5)
