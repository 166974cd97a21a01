"""Let a run exceed GPU memory on purpose, and report how it ends.

usage: python benchmarks/out_of_memory.py --out DIR [--model FOLDER]

After the third of six steps, GPU memory is limited to what half the batch needs. With on_oom=stop the run ends with a
one-line error. With on_oom=shrink it continues from its last checkpoint with half the batch size and takes the same
steps.
"""

import argparse
import json
from pathlib import Path
from typing import Any

# isort: off
from qlora_helpers import runs
from qlora_helpers.data import cleaning
from qlora_helpers.models import hub
from qlora_helpers.planning import plan
from qlora_helpers.training import trainer  # imported first: it configures torch's allocator

# isort: on
import torch
from transformers import TrainerCallback

from qlora_helpers.config import BUNDLED_MODEL, Config
from qlora_helpers.device import detect
from qlora_helpers.errors import UserError

CUT_AFTER = 3


class Cut(TrainerCallback):
    """Limits GPU memory after a few steps."""

    def __init__(self, gib: float) -> None:
        self.gib = gib

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Allow no more than `gib` of reserved memory from this step on."""
        if state.global_step == CUT_AFTER:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(self.gib / detect().memory_gib)


def main() -> None:
    """Train one run that stops and one that shrinks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=BUNDLED_MODEL)
    args = parser.parse_args()
    config = Config.from_params(
        profile="gpu",
        model=args.model,
        dataset="sample",
        n_samples=96,
        n_heldout=16,
        n_answers=4,
        batch_size=32,
        epochs=2,
        save_steps=2,
    )
    device, tokenizer = detect(), hub.load_tokenizer(config)
    data = cleaning.prepare(config, tokenizer)
    half = config.replace(batch_size=16, gradient_accumulation=2)
    limit = 1.1 * sum(plan.plan_memory(half, device).training.values())
    folder = runs.workdir(str(args.out))
    for on_oom in ("stop", "shrink"):
        torch.cuda.set_per_process_memory_fraction(1.0)
        run = runs.RunFolder(folder / on_oom)
        try:
            trainer.train(config.replace(on_oom=on_oom), data, tokenizer, run, [Cut(limit)])
        except UserError as error:
            print(f"on_oom={on_oom}: {error}")
            complete = sorted(path.parent.name for path in run.path.glob("checkpoints/*/complete.json"))
            print("complete checkpoints:", complete)
            continue
        stored = run.read("config.json")["config"]
        split = {name: stored[name] for name in ("batch_size", "gradient_accumulation")}
        metrics = run.read("metrics.json")
        seen = {name: metrics[name] for name in ("steps", "eval_loss", "peak_memory_gib")}
        print(f"on_oom={on_oom}:", json.dumps({**split, **seen, "limit_gib": round(limit, 2)}))


if __name__ == "__main__":
    main()
