"""Peak memory of real training and evaluation, in the models' shapes with random weights, on the GPU at hand.

usage: python benchmarks/memory.py TOKENIZER_FOLDER [--out results/memory] [--name settings] [--models NAME …]

Runs every line of OUT/settings.jsonl through the package's own loader and trainer, and appends what it saw to
OUT/settings_measured.jsonl; what is there is not measured again. Memory does not depend on what the weights are.
Several processes, each with its models, may share one large GPU: torch counts their memory apart (their seconds are no
measure of speed).
"""

import argparse
import gc
import json
import random
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from qlora_helpers import answers, cleaning, evaluation, runs, training
from qlora_helpers.config import Config
from qlora_helpers.device import GIB, detect, versions
from qlora_helpers.model import attach_lora, load_base
from qlora_helpers.runs import RunFolder
from qlora_helpers.shapes import known

STEPS = 5  # optimizer states are there after the first, and the allocator has settled
NEW_TOKENS = 32
PROMPTS = 16


def write_shape(name: str, folder: Path, tokenizer: Any) -> None:
    """A checkpoint with random weights, as a hub would serve it, so that the package's own loading is measured too."""
    with torch.device("cuda"):
        shape = AutoConfig.for_model(**known(name))
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    _fresh()


def config_of(setting: dict[str, Any]) -> Config:
    """The run that a line of settings.jsonl describes."""
    named = "query_key_value" if setting["model"].startswith("bloom") else "q_proj v_proj"
    targets = {"q,v": named, "all": "all-linear"}[setting["targets"]]
    return Config.from_params(
        profile="gpu",
        quantization=setting["quantization"],
        double_quant=setting["double_quant"],
        compute_dtype=setting["dtype"],
        rank=setting["rank"],
        target_modules=targets,
        bias=setting["bias"],
        batch_size=setting["batch_size"],
        max_length=setting["max_length"],
        gradient_checkpointing=setting["checkpointing"],
        optimizer=setting["optimizer"],
        max_new_tokens=NEW_TOKENS,
        save_steps=1000,
        epochs=1,
    )


def rows(number: int, config: Config, vocabulary: int) -> list[Any]:
    """Random rows, all trained on; the first of every batch is as long as rows may be, others half as long or more."""
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
    """Seconds of each step; the first ones choose kernels and do not count."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time when the GPU is done."""
        torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def measure(setting: dict[str, Any], folder: Path, tokenizer: Any) -> dict[str, Any]:
    """What one setting takes: GiB that torch reserved and allocated, and seconds a step."""
    config = config_of(setting).replace(model=str(folder))
    device = detect(config.compute_dtype)
    _fresh()
    base = load_base(config, device)
    found: dict[str, Any] = _peak("load")
    found["weights"] = torch.cuda.memory_allocated() / GIB
    model = attach_lora(base, config)
    trained = rows(config.batch_size * STEPS, config, 30000)
    data: Any = SimpleNamespace(trained_on=trained, heldout=rows(16, config, 30000), source_fingerprint="")
    timer = Timer()
    with tempfile.TemporaryDirectory() as run_folder:
        run = RunFolder(Path(run_folder))
        cleaning.identity = lambda *_: {}
        trainer = training.build_trainer(model, config, data, tokenizer, device, run, [timer])
        trainer.evaluate = lambda *_, **__: {"eval_loss": 1.0}
        trainer._save_checkpoint = lambda *_: None
        _fresh()
        found |= {"start": torch.cuda.memory_allocated() / GIB, "start_reserved": torch.cuda.memory_reserved() / GIB}
        trainer.train()
        found |= _peak("train")
        found["seconds_per_step"] = min(b - a for a, b in zip(timer.ends, timer.ends[1:], strict=False))
    del trainer
    _fresh()
    evaluation.heldout_losses(model, data.heldout, device)
    found |= _peak("heldout")
    _fresh()
    long = " ".join(["word"] * (config.max_length // 2))
    answers.generate(model, tokenizer, config, device, [{"prompt": long, "reference": None}] * PROMPTS)
    found |= _peak("answers")
    return found


def _fresh() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def _peak(name: str) -> dict[str, float]:
    seen = {"reserved": torch.cuda.max_memory_reserved(), "allocated": torch.cuda.max_memory_allocated()}
    return {f"{name}_{kind}": size / GIB for kind, size in seen.items()}


def main() -> None:
    """Measure what is missing, model by model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/memory"))
    parser.add_argument("--name", default="settings")
    parser.add_argument("--models", nargs="+", help="these only; all if not given")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    settings = runs.read_jsonl(args.out / f"{args.name}.jsonl")
    path = args.out / f"{args.name}_measured.jsonl"
    done = {line["id"] for line in runs.read_jsonl(path)} if path.exists() else set()
    for model in args.models or dict.fromkeys(setting["model"] for setting in settings):
        missing = [setting for setting in settings if setting["model"] == model and setting["id"] not in done]
        with tempfile.TemporaryDirectory() as folder:
            if missing:
                write_shape(model, Path(folder), tokenizer)
            for setting in missing:
                _measure_into(path, setting, Path(folder), tokenizer)


def _measure_into(path: Path, setting: dict[str, Any], folder: Path, tokenizer: Any) -> None:
    """One line, with the device; `fits` says whether it held to the setting's `limit_gib`, if it has one."""
    started = time.time()
    total = torch.cuda.get_device_properties(0).total_memory / GIB
    limit = setting.get("limit_gib", total)
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        found = {"fits": True, **measure(setting, folder, tokenizer)}
    except torch.cuda.OutOfMemoryError as error:
        found = {"fits": False, "error": str(error).split(". ")[0]}
    gc.collect()
    _fresh()
    print(setting["id"], f"{time.time() - started:.0f} s", found, flush=True)
    device = {"device": torch.cuda.get_device_name(), "versions": versions()}
    with path.open("a") as file:
        file.write(json.dumps({**setting, **found, **device}) + "\n")


if __name__ == "__main__":
    main()
