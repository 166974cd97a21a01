"""Training speed on a GPU: this package on each of its paths, TRL's SFTTrainer, and the first report's own script.

usage: python benchmarks/gpu_speed.py TOKENIZER_FOLDER ROWS.jsonl [--out FILE] [--groups recipe qv …] [--unsloth FOLDER]

All contenders train the same rows, cut at 256 tokens, on a 4-bit base (NF4, double quantization) of TinyLlama's shape
with random weights, with LoRA r=16, each in a process of its own that may use 14.56 GiB, as on a T4. The group `8b` has
the shape of Llama 3.1 8B, rows of up to 1,024 tokens and, if `--unsloth` is the folder that it is installed in, Unsloth
with the settings of its own notebooks. Tokens per second count real tokens, not padding, as the median of three windows
after the first steps. A group is one table.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from qlora_helpers import files
from qlora_helpers.config import Config

T4_GIB = 14.56
SMALL, LARGE = "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "meta-llama/Llama-3.1-8B"
OURS, TRL, REPORT, UNSLOTH = "this package", "TRL", "published script", "Unsloth"
WARM, WINDOW = 10, 20  # steps before the first window, and in each of the three windows
# The library sorts 50 batches at a time by length, so that a graph of every length exists only after these.
WARM_GROUPED = 60


def contender(name: str, batch: int, fast: str = "", **more: Any) -> dict[str, Any]:
    """Return the settings of one contender."""
    return {"name": name, "batch": batch, "fast": fast, "dtype": "bfloat16", "linear": "qv", "dropout": 0.05,
            "sampling": "random", "warm": WARM, "steps": WARM + 3 * WINDOW, "shape": SMALL, "length": 256,
            "accumulation": 1, "checkpointing": False, "optimizer": "adamw_torch", **more}  # fmt: skip


GROUPED = {"sampling": "group_by_length", "warm": WARM_GROUPED, "steps": WARM_GROUPED + 3 * WINDOW}
EIGHT = {
    "shape": LARGE, "length": 1024, "linear": "all", "dropout": 0.0, "checkpointing": True, "steps": WARM + 15,
    "optimizer": "adamw_8bit",
}  # fmt: skip
GROUPS: dict[str, list[dict[str, Any]]] = {
    # The published recipe: four rows per update, in random order, 125 updates, from train() to its return.
    "recipe": [
        contender(REPORT, 4, steps=125),
        contender(OURS, 4, "graphs", steps=125),
        contender(OURS, 4, "auto", steps=125),
        contender(OURS, 4, "compiled", steps=125),
        contender(OURS, 4, "off", steps=40),
    ],
    "qv": [
        *(contender(TRL, rows) for rows in (16, 22, 24)),
        *(contender(OURS, rows, "compiled", **GROUPED) for rows in (22, 28)),
        contender(OURS, 24, "graphs", **GROUPED),
    ],
    "all-linear": [
        *(contender(TRL, rows, linear="all") for rows in (16, 17)),
        contender(OURS, 16, "compiled", linear="all", **GROUPED),
    ],
    "fp16": [
        contender(REPORT, 4, dtype="float16", steps=40),
        *(contender(TRL, rows, dtype="float16") for rows in (22, 24)),
        *(contender(OURS, rows, "graphs", dtype="float16", **GROUPED) for rows in (4, 16, 28)),
    ],
    # Eight rows per update, as in Unsloth's notebooks, and no dropout, which it needs for its kernels.
    "8b": [
        contender(UNSLOTH, 2, accumulation=4, **EIGHT),
        contender(OURS, 1, "graphs", accumulation=8, **EIGHT),
        contender(OURS, 2, "graphs", accumulation=4, **EIGHT),
    ],
    # Losses of every step without dropout, whose random numbers depend on the padding.
    "losses": [contender(OURS, 4, fast, dropout=0.0, steps=40) for fast in ("off", "graphs", "compiled")],
}


def config_of(setting: dict[str, Any], model: Path) -> Config:
    """Return the config of a run of this package."""
    target = {"target_modules": ["all-linear"]} if setting["linear"] == "all" else {}
    return Config.from_params(
        preset="tinyllama-guanaco-100", profile="gpu", model=str(model), dataset="sample",
        compute_dtype=setting["dtype"], batch_size=setting["batch"], gradient_accumulation=setting["accumulation"],
        dropout=setting["dropout"], sampling=setting["sampling"], gradient_checkpointing=setting["checkpointing"],
        fast=setting["fast"] or "off", max_length=setting["length"], optimizer=setting["optimizer"], eval_steps=10**6,
        save_steps=10**6, epochs=1, **target,
    )  # fmt: skip


def rows_of(path: Path, tokenizer: Any, setting: dict[str, Any]) -> list[list[int]]:
    """Return the token ids of as many rows as are trained, repeated if there are fewer."""
    texts = [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]
    ids = tokenizer(texts, truncation=True, max_length=setting["length"])["input_ids"]
    number = setting["steps"] * setting["batch"] * setting["accumulation"]
    return [ids[index % len(ids)] for index in range(number)]


def ours(setting: dict[str, Any], rows: list[list[int]], model: Path, folder: Path) -> tuple[Any, Any]:
    """Build this package's trainer; returns it and a function that trains."""
    from transformers import AutoTokenizer

    from qlora_helpers.data import cleaning
    from qlora_helpers.device import detect
    from qlora_helpers.evaluation.context import RunContext
    from qlora_helpers.models.qlora import attach_lora, load_base
    from qlora_helpers.runs import RunFolder
    from qlora_helpers.training import paths, trainer

    config = config_of(setting, model)
    device = detect(config.compute_dtype)
    cleaning.identity = lambda *_: {}  # type: ignore[assignment]
    examples = [SimpleNamespace(input_ids=ids, labels=ids) for ids in rows]
    data: Any = SimpleNamespace(trained_on=examples, heldout=examples[:2], selection=[])
    run = RunFolder(folder)
    files.write_json(run / "manifest.json", {})
    context = RunContext(config, data, AutoTokenizer.from_pretrained(model), device, run)
    ready = trainer.build_trainer(attach_lora(load_base(config, device), config), context)
    ready.evaluate = lambda *_, **__: {"eval_loss": 1.0}  # type: ignore[method-assign]
    ready._save_checkpoint = lambda *_: None  # type: ignore[method-assign]

    def train() -> None:
        paths.prepare(ready, context, None)
        _count_tokens(ready)
        ready.train()

    return ready, train


def peer(setting: dict[str, Any], rows: list[list[int]], model: Path, folder: Path) -> tuple[Any, Any]:
    """Build the trainer of TRL, Unsloth or the published script; returns it and a function that trains."""
    if setting["name"] == UNSLOTH:
        return _trained(_unsloth(setting, rows, model, _common(setting, folder)))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    dtype = getattr(torch, setting["dtype"])
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    packed = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    base = AutoModelForCausalLM.from_pretrained(model, quantization_config=packed, dtype=dtype, device_map={"": 0})
    build = _published if setting["name"] == REPORT else _trl
    return _trained(build(setting, rows, base, tokenizer, _common(setting, folder)))


def _common(setting: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the arguments that all trainers have."""
    return {
        "output_dir": str(folder), "num_train_epochs": 1, "learning_rate": 2e-4, "logging_steps": 5,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "bf16": setting["dtype"] == "bfloat16", "fp16": setting["dtype"] == "float16",
        "gradient_accumulation_steps": setting["accumulation"],
    }  # fmt: skip


def _trained(ready: Any) -> tuple[Any, Any]:
    """Return a trainer and a function that counts its tokens and trains."""

    def train() -> None:
        _count_tokens(ready)
        ready.train()

    return ready, train


def _lora(setting: dict[str, Any]) -> Any:
    from peft import LoraConfig

    targets = "all-linear" if setting["linear"] == "all" else ["q_proj", "v_proj"]
    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=targets, task_type="CAUSAL_LM")


def _published(setting: dict[str, Any], rows: Any, base: Any, tokenizer: Any, common: dict[str, Any]) -> Any:
    """Build the Trainer of the first report: rows padded to the full length, one at a time, with checkpointing."""
    from datasets import Dataset
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    adapted = get_peft_model(prepare_model_for_kbit_training(base), _lora(setting))
    padded = tokenizer.pad({"input_ids": rows}, padding="max_length", max_length=setting["length"])
    common |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": setting["batch"]}
    arguments = TrainingArguments(**common)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return Trainer(adapted, arguments, train_dataset=Dataset.from_dict(dict(padded)), data_collator=collator)


def _trl(setting: dict[str, Any], rows: Any, base: Any, tokenizer: Any, common: dict[str, Any]) -> Any:
    """Build an SFTTrainer without checkpointing."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        **common, per_device_train_batch_size=setting["batch"], gradient_checkpointing=False, max_length=None,
        train_sampling_strategy=setting["sampling"],
    )  # fmt: skip
    ready = SFTTrainer(
        base, arguments, train_dataset=Dataset.from_dict({"input_ids": rows}), processing_class=tokenizer,
        peft_config=_lora(setting),
    )  # fmt: skip
    for parameter in ready.model.parameters():  # faster than TRL's bfloat16, and fp16 works only so
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return ready


def _unsloth(setting: dict[str, Any], rows: Any, model: Path, common: dict[str, Any]) -> Any:
    """Build the trainer of Unsloth's notebooks."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    dtype = getattr(torch, setting["dtype"])
    base, tokenizer = FastLanguageModel.from_pretrained(
        str(model), max_seq_length=setting["length"], dtype=dtype, load_in_4bit=True
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = FastLanguageModel.get_peft_model(
        base, r=16, target_modules=targets, lora_alpha=16, lora_dropout=0, bias="none",
        use_gradient_checkpointing="unsloth", random_state=3407,
    )  # fmt: skip
    common |= {
        "per_device_train_batch_size": setting["batch"],
        "optim": setting["optimizer"],
        "max_length": setting["length"],
    }
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in rows]
    return SFTTrainer(
        adapted, args=SFTConfig(**common), processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"text": texts}),
    )  # fmt: skip


def _count_tokens(trainer: Any) -> None:
    """Let the collator note the real tokens of every batch, on the CPU."""
    collate, trainer.batch_tokens = trainer.data_collator, []

    def counting(features: list[Any]) -> Any:
        trainer.batch_tokens.append(sum(sum(f.get("attention_mask", [1] * len(f["input_ids"]))) for f in features))
        return collate(features)

    trainer.data_collator = counting


def measure(setting: dict[str, Any], model: Path, rows_file: Path) -> dict[str, Any]:
    """Train one contender: tokens per second in three windows, peak GiB, seconds of train(), and losses."""
    if setting["name"] == UNSLOTH:
        import unsloth  # noqa: F401 - it has to be imported before the libraries that it changes
    import torch
    from transformers import AutoTokenizer, TrainerCallback

    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    torch.cuda.set_per_process_memory_fraction(T4_GIB / total)
    rows = rows_of(rows_file, AutoTokenizer.from_pretrained(model), setting)
    window = (setting["steps"] - setting["warm"]) // 3
    bounds = [setting["warm"] + index * window for index in range(4)]
    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in bounds:
                torch.cuda.synchronize()
                times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as scratch:
        trainer, train = (ours if setting["name"] == OURS else peer)(setting, rows, model, Path(scratch))
        trainer.add_callback(Clock())
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        train()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        manifest = Path(scratch) / "manifest.json"
        path = json.loads(manifest.read_text())["training_path"] if manifest.exists() else None
    each = trainer.args.gradient_accumulation_steps
    tokens = [sum(trainer.batch_tokens[a * each : b * each]) for a, b in pairwise(bounds)]
    rates = [n / (b - a) for n, (a, b) in zip(tokens, pairwise(times), strict=True)]
    return {
        "tokens_per_second": statistics.median(rates),
        "windows": rates,
        "peak_gib": torch.cuda.max_memory_reserved() / 2**30,
        "train_seconds": seconds,
        "path": path,
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
    }


def make_shape(folder: Path, tokenizer: str, name: str = SMALL) -> None:
    """Save a checkpoint with random weights in the shape of a known model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from qlora_helpers.planning import architectures

    with torch.device("cuda"):
        shape = AutoConfig.for_model(**(architectures.known(name) or {}))
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def measure_in_subprocess(setting: dict[str, Any], model: Path, rows: Path, unsloth: str | None) -> dict[str, Any]:
    """Run `measure` in a fresh process, so that no contender inherits another's memory."""
    command = [sys.executable, __file__, str(model), str(rows), "--contender", json.dumps(setting)]
    environment = dict(os.environ)
    if setting["shape"] == LARGE:  # Unsloth sets it, too
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if setting["name"] == UNSLOTH:
        if unsloth is None:
            return {"failed": "--unsloth is not given"}
        environment["PYTHONPATH"] = os.pathsep.join([unsloth, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error" in line]
        return {"failed": "out of memory" if "OutOfMemory" in done.stderr else (lines or ["?"])[-1][:500]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure the chosen groups; with `--contender`, measure one contender for the comparing process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tokenizer")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--unsloth", metavar="FOLDER", help="what `pip install --target FOLDER unsloth` has made")
    parser.add_argument("--contender")
    args = parser.parse_args()
    if args.contender:
        print(json.dumps(measure(json.loads(args.contender), Path(args.tokenizer), args.rows)))
        return
    from qlora_helpers.device import detect, versions

    with tempfile.TemporaryDirectory() as scratch:
        result: dict[str, Any] = {
            "device": detect().to_dict(),
            "versions": versions(),
            "limit_gib": T4_GIB,
            "groups": {},
        }
        for group in args.groups:
            measured = result["groups"].setdefault(group, [])
            for setting in GROUPS[group]:
                model = Path(scratch) / Path(setting["shape"]).name
                if not model.exists():
                    make_shape(model, args.tokenizer, setting["shape"])
                measured.append({**setting, **measure_in_subprocess(setting, model, args.rows, args.unsloth)})
                print(group, _in_words(measured[-1]), flush=True)
                if args.out:
                    files.write_json(args.out, result)


def _in_words(line: dict[str, Any]) -> str:
    about = f"{line['name']} {line['fast']} batch {line['batch']} {line['dtype']} {line['linear']} {line['sampling']}"
    if "failed" in line:
        return f"{about}: {line['failed']}"
    rate, peak, seconds = line["tokens_per_second"], line["peak_gib"], line["train_seconds"]
    return f"{about}: {rate:,.0f} tokens/s, {peak:.2f} GiB, train() {seconds:.1f} s {line['path'] or ''}"


if __name__ == "__main__":
    main()
