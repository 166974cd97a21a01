"""How the steps of a run are computed: by the library, from CUDA graphs, or with compiled blocks."""

from pathlib import Path
from typing import Any

import torch

from qlora_helpers import distributed, files
from qlora_helpers.evaluation.context import RunContext
from qlora_helpers.training import cuda_graphs
from qlora_helpers.training.cuda_graphs import Choice

LOG_EVERY = 10  # steps between log writes with graphs; every step still has its line


def prepare(trainer: Any, context: RunContext, checkpoint: Path | None) -> None:
    """Choose how the steps of `trainer` are computed, print it, and record it in the manifest.

    A run that continues stays on its path, so that it ends as if it had not been interrupted.
    """
    config, run, device = context.config, context.run, context.device
    done = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    passes = (config.steps(len(context.data.trained_on)) - done) * config.gradient_accumulation
    longest = max(len(example.input_ids) for example in context.data.trained_on)
    lengths = cuda_graphs.lengths_for(longest, config.sampling)
    wanted = (run.training_path().get("path") if checkpoint else None) or config.fast
    trainer.graphs, choice = None, _impossible(trainer)
    if choice is None:
        trainer.graphs, choice = cuda_graphs.choose(
            trainer.model, device, trainer.accelerator.backward, wanted, config.batch_size, lengths, passes
        )
    if distributed.is_main():
        files.write_json(run / "manifest.json", {**run.read("manifest.json"), "training_path": choice.to_dict()})
    if device.kind == "cuda":
        print(f"Steps: {choice}")
    if trainer.graphs is not None:
        largest = max(max(example.input_ids) for example in context.data.trained_on)
        embeddings = trainer.model.get_input_embeddings()
        embeddings(torch.tensor([largest], device=embeddings.weight.device))  # raises `UserError` if there is none
        trainer.data_collator = cuda_graphs.FixedShapes(config.batch_size, lengths)
        trainer.args.logging_steps = LOG_EVERY
        trainer.room_gib = min(device.memory_gib, config.memory_limit_gib or device.memory_gib)


def _impossible(trainer: Any) -> Choice | None:
    """Return the library's own path, and why no other is tried, or None."""
    if distributed.count() > 1:
        return Choice("off", "graphs do not exchange the gradients of several processes")
    if not trainer.model_accepts_loss_kwargs:
        return Choice("off", "the model's loss is a mean of its own")
    return None
