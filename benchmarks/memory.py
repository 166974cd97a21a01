"""Measure peak GPU memory of training and evaluation, for the models' shapes with random weights.

usage: python benchmarks/memory.py TOKENIZER_FOLDER [--out data] [--names memory_settings …] [--parallel N]

Every setting of OUT/NAME.jsonl runs through the package's own loader and trainer, and the result is appended to
OUT/NAME_measured.jsonl; measured settings are skipped. Memory does not depend on the values of the weights. Several
processes can share one large GPU, because torch counts memory per process; their step times do not measure speed.
"""

import argparse
import gc
import json
import random
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from qlora_helpers import files
from qlora_helpers.config import Config
from qlora_helpers.data import cleaning
from qlora_helpers.device import GIB, detect, versions
from qlora_helpers.evaluation import answers, losses
from qlora_helpers.evaluation.context import RunContext
from qlora_helpers.models.qlora import attach_lora, load_base
from qlora_helpers.planning import architectures, measurements
from qlora_helpers.runs import RunFolder
from qlora_helpers.training import trainer

STEPS = 5  # optimizer states exist after the first step, and then the allocator settles


def write_shape(name: str, folder: Path, tokenizer: Any) -> None:
    """Save a checkpoint with random weights, as on a hub, so that the package's own loading is measured too."""
    with torch.device("cuda"):
        shape = AutoConfig.for_model(**(architectures.known(name) or {}))
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    _fresh()


def rows(number: int, config: Config, vocabulary: int) -> list[Any]:
    """Return random rows, all tokens trained. The first of a batch has `max_length` tokens, others at least half."""
    draw = random.Random(0)
    made = []
    for index in range(number):
        most = config.max_length
        length = most if index % config.batch_size == 0 else draw.randint(most // 2, most)
        ids = [draw.randrange(10, vocabulary) for _ in range(length)]
        row = SimpleNamespace(id=str(index), messages=[])
        made.append(SimpleNamespace(input_ids=ids, labels=ids, cut=1, row=row))
    return made


class Timer(TrainerCallback):
    """Records the end of each step. The first steps choose kernels and do not count."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Record the time when the GPU has finished."""
        torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def measure(setting: dict[str, Any], folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Measure one setting: GiB that torch reserved and allocated, and seconds per step."""
    config = measurements.config_of(setting).replace(model=str(folder), save_steps=1000)
    device = detect(config.compute_dtype)
    _fresh()
    base = load_base(config, device)
    measured: dict[str, Any] = _peak("load")
    measured["weights"] = torch.cuda.memory_allocated() / GIB
    model = attach_lora(base, config)
    trained = rows(config.batch_size * STEPS, config, 30000)
    data: Any = SimpleNamespace(trained_on=trained, heldout=rows(16, config, 30000), source_fingerprint="")
    timer = Timer()
    with tempfile.TemporaryDirectory() as run_folder:
        run = RunFolder(Path(run_folder))
        cleaning.identity = lambda *_: {}
        ready = trainer.build_trainer(model, RunContext(config, data, tokenizer, device, run), [timer])
        ready.evaluate = lambda *_, **__: {"eval_loss": 1.0}
        ready._save_checkpoint = lambda *_: None
        _fresh()
        measured |= {"start": torch.cuda.memory_allocated() / GIB, "start_reserved": torch.cuda.memory_reserved() / GIB}
        measured["start_blocks"] = _blocks()
        ready.train()
        measured |= _peak("train")
        measured["seconds_per_step"] = min(b - a for a, b in zip(timer.ends, timer.ends[1:], strict=False))
    del ready
    _fresh()
    losses.heldout_losses(model, data.heldout, device, measurements.HELDOUT_ROWS)
    measured |= _peak("heldout")
    _fresh()
    long = " ".join(["word"] * (config.max_length // 2))
    answers.generate(model, tokenizer, config, device, [{"prompt": long, "reference": None}] * measurements.ANSWERS)
    measured |= _peak("answers")
    return measured


def _fresh() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def _blocks() -> dict[str, float]:
    """Return GiB by state: memory that is reserved but not allocated is either free or waits for another stream."""
    sizes: Counter[str] = Counter()
    for segment in torch.cuda.memory_snapshot():
        for block in segment["blocks"]:
            sizes[block["state"]] += block["size"]
    return {state: size / GIB for state, size in sizes.items()}


def _peak(name: str) -> dict[str, float]:
    seen = {"reserved": torch.cuda.max_memory_reserved(), "allocated": torch.cuda.max_memory_allocated()}
    return {f"{name}_{kind}": size / GIB for kind, size in seen.items()}


def main() -> None:
    """Measure the missing settings, each in a separate process, like a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--out", type=Path, default=Path("data"))
    parser.add_argument("--names", nargs="+", default=["memory_settings"], metavar="NAME")
    parser.add_argument("--parallel", type=int, default=1, help="processes that share the GPU")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    fresh = get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(args.parallel, fresh, max_tasks_per_child=1) as pool,
    ):
        missing = [(name, setting) for name in args.names for setting in _missing(args.out, name)]
        models = dict.fromkeys(setting["model"] for _, setting in missing)
        list(pool.map(write_shape, models, [Path(folder, model) for model in models], [tokenizer] * len(models)))
        started = [pool.submit(attempt, setting, Path(folder, setting["model"]), tokenizer) for _, setting in missing]
        for (name, setting), future in zip(missing, started, strict=True):
            measured = future.result()
            print(name, setting["id"], measured, flush=True)
            with (args.out / f"{name}_measured.jsonl").open("a") as file:
                file.write(json.dumps({**setting, **measured, "parallel": args.parallel}) + "\n")


def _missing(out: Path, name: str) -> list[dict[str, Any]]:
    path = out / f"{name}_measured.jsonl"
    done = {line["id"] for line in files.read_jsonl(path)} if path.exists() else set()
    return [setting for setting in files.read_jsonl(out / f"{name}.jsonl") if setting["id"] not in done]


def attempt(setting: dict[str, Any], folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Measure a setting within its `limit_gib`, if it has one. `fits` in the result is false if memory ran out."""
    total = torch.cuda.get_device_properties(0).total_memory / GIB
    torch.cuda.set_per_process_memory_fraction(setting.get("limit_gib", total) / total)
    try:
        measured = {"fits": True, **measure(setting, folder, tokenizer)}
    except torch.cuda.OutOfMemoryError as error:
        measured = {"fits": False, "error": str(error).split(". ")[0]}
    return {**measured, "device": torch.cuda.get_device_name(), "versions": versions()}


if __name__ == "__main__":
    main()
