"""Peak memory of real training and evaluation, in the models' shapes with random weights, on the GPU at hand.

usage: python benchmarks/memory.py TOKENIZER_FOLDER [--out results/memory] [--part I/N]

Runs every line of OUT/settings.jsonl through the package's own trainer and appends what it saw to OUT/measured.jsonl;
what is there is not measured again. Memory does not depend on what the weights are. Parts can run side by side on one
large GPU: torch counts each process's memory apart. Their seconds are then longer, and the number of parts is noted.
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

import bitsandbytes as bnb
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from qlora_helpers import answers, cleaning, evaluation, runs, training
from qlora_helpers.config import Config
from qlora_helpers.device import GIB, Device, detect, versions
from qlora_helpers.model import attach_lora
from qlora_helpers.runs import RunFolder
from qlora_helpers.shapes import known

STEPS = 5  # optimizer states are there after the first, and the allocator has settled
NEW_TOKENS = 32
PROMPTS = 16


def base_in_shape(name: str, config: Config, device: Device) -> Any:
    """A frozen base with random weights, stored as `model.load_base` stores a real one."""
    with torch.device("cuda"):
        shape = AutoConfig.for_model(**known(name))
        base = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, device.dtype))
    if config.quantization != "none":
        head = base.get_output_embeddings()
        for path, module in list(base.named_modules()):
            if isinstance(module, torch.nn.Linear) and module is not head:
                parent, _, own = path.rpartition(".")
                setattr(base.get_submodule(parent), own, _in_four_bits(module, config))
        base.is_loaded_in_4bit = True
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    return base.eval()


def _in_four_bits(linear: torch.nn.Linear, config: Config) -> Any:
    packed = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=linear.weight.dtype,
        compress_statistics=config.double_quant,
        quant_type=config.quantization,
        device="meta",
    )
    packed.weight = bnb.nn.Params4bit(
        linear.weight.data,
        requires_grad=False,
        compress_statistics=config.double_quant,
        quant_type=config.quantization,
        module=packed,
    ).cuda()
    packed.bias = linear.bias
    return packed


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


def measure(setting: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """One line of measured.jsonl: GiB that torch reserved and allocated, and seconds a step."""
    config = config_of(setting)
    device = detect(config.compute_dtype)
    base = base_in_shape(setting["model"], config, device)
    found: dict[str, Any] = {"weights": torch.cuda.memory_allocated() / GIB}
    model = attach_lora(base, config)
    trained = rows(config.batch_size * STEPS, config, 30000)
    data: Any = SimpleNamespace(trained_on=trained, heldout=rows(16, config, 30000), source_fingerprint="")
    timer = Timer()
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))
        cleaning.identity = lambda *_: {}
        trainer = training.build_trainer(model, config, data, tokenizer, device, run, [timer])
        trainer.evaluate = lambda *_, **__: {"eval_loss": 1.0}
        trainer._save_checkpoint = lambda *_: None
        _fresh()
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
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/memory"))
    parser.add_argument("--part", default="0/1")
    args = parser.parse_args()
    part, parts = map(int, args.part.split("/"))
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    settings = runs.read_jsonl(args.out / "settings.jsonl")
    path = args.out / "measured.jsonl"
    done = {line["id"] for line in runs.read_jsonl(path)} if path.exists() else set()
    for setting in settings[part::parts]:
        if setting["id"] in done:
            continue
        started = time.time()
        try:
            found = measure(setting, tokenizer)
        except torch.cuda.OutOfMemoryError as error:
            print(setting["id"], str(error).splitlines()[0], flush=True)
            _fresh()
            continue
        _fresh()
        print(setting["id"], f"{time.time() - started:.0f} s", found, flush=True)
        device = {"parts": parts, "device": torch.cuda.get_device_name(), "versions": versions()}
        with path.open("a") as file:
            file.write(json.dumps({**setting, **found, **device}) + "\n")


if __name__ == "__main__":
    main()
