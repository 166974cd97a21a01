"""Measure training on one GPU and on several against the memory plan, or estimate it for up to 64 GPUs.

usage: python benchmarks/scale.py TOKENIZER_FOLDER ROWS.jsonl --out FILE [--gpus 2] [--models llama31-8b]
                                  [--fast auto off] [--strategies ddp fsdp fsdp-offload]
       python benchmarks/scale.py --model-only

The models have the shapes of known ones and random weights, which change neither speed nor memory. Every GPU gets as
many rows per step as one GPU does alone. `--model-only` needs no GPU: it prints the tables of docs/scale.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from math import ceil
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import qlora_helpers
from qlora_helpers import files
from qlora_helpers.config import Config
from qlora_helpers.planning import architectures, measurements, memory, plan, step_time
from qlora_helpers.planning.gpus import GPUS
from qlora_helpers.planning.sharding import REPLICATED
from qlora_helpers.planning.workload import ALONE, FULL, STRATEGIES, Parallel

SEED = 0
EPOCHS = 2  # so that a thousand rows are enough
SETTINGS: dict[str, Any] = {
    "preset": "tinyllama-guanaco-100", "profile": "gpu", "target_modules": "all-linear", "max_length": 512,
    "template": "guanaco", "gradient_accumulation": 1, "epochs": EPOCHS, "optimizer": "adamw_torch", "n_heldout": 8,
    "n_answers": 0, "few_shot": False, "save_steps": 1000, "seed": SEED,
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """How a model is trained: rows of each GPU per step, and steps that count."""

    rows: int
    steps: int
    own: dict[str, Any]


TASKS = {
    "tinyllama-1.1b": Task(8, 30, {"gradient_checkpointing": False}),
    "llama31-8b": Task(4, 20, {"gradient_checkpointing": True, "dropout": 0.0}),
}
WARMUP = {"auto": 60, "off": 20}  # steps that do not count; until then, graphs are captured for new lengths of rows


def settings_of(name: str, model: Path, rows: Path, parallel: Parallel, fast: str) -> dict[str, Any]:
    """Return the settings of a run of a model in a folder on so many GPUs."""
    task = TASKS[name]
    batch = task.rows * parallel.gpus
    samples = (WARMUP[fast] + task.steps) * batch // EPOCHS
    own = {"model": str(model), "dataset": str(rows), "batch_size": batch, "n_samples": samples}
    return SETTINGS | task.own | own | {"fast": fast}


def command(settings: dict[str, Any], parallel: Parallel, out: Path) -> list[str]:
    """Return the command line of one run. The config files for accelerate are named after the strategies."""
    words = [sys.executable, "-m"]
    if parallel != ALONE:
        name = f"{parallel.strategy.replace('-', '_')}.yaml"
        file = str(Path(qlora_helpers.__file__).parent / "accelerate" / name)
        words += ["accelerate.commands.launch", "--config_file", file, "--num_processes", str(parallel.gpus), "-m"]
    words += ["qlora_helpers", "train", "--out", str(out)]
    for name, value in settings.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", str(value)]
    return words


def result_of(run: Path, settings: dict[str, Any], parallel: Parallel, warmup: int) -> dict[str, Any]:
    """Return speed and memory from the files of a finished run. Tokens per second are those of all GPUs together."""
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    seconds = [line["seconds"] for line in files.read_jsonl(run / "log.jsonl") if "seconds" in line]
    tokens_per_step = metrics["tokens_per_second"] * sum(seconds) / len(seconds)
    manifest = json.loads((run / "manifest.json").read_text("utf-8"))
    path = manifest["training_path"]["path"]
    workload = replace(memory.workload_of(Config.from_params(**settings), None, parallel), path=path)
    return {
        "path": path,
        "tokens_per_second": tokens_per_step / median(seconds[warmup:]),
        "peak_gib": metrics["peak_memory_gib"],
        "planned_gib": sum(memory.training_parts(workload).values()) / memory.GIB,
        "eval_loss": metrics["eval_loss"],
        "device": manifest["device"],
        "versions": manifest["versions"],
    }


def write_shape(name: str, folder: Path, tokenizer_folder: Path) -> None:
    """Save a model with random weights in the shape of a known one."""
    write_model(architectures.known(name) or {}, folder, tokenizer_folder)


def write_model(known: dict[str, Any], folder: Path, tokenizer_folder: Path) -> None:
    """Save a model with random weights, and a vocabulary that the tokenizer fits into."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    shape = AutoConfig.for_model(**known | {"vocab_size": max(known["vocab_size"], len(tokenizer))})
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def runs_of(gpus: int, paths: Sequence[str], strategies: Sequence[str]) -> Iterator[tuple[Parallel, str]]:
    """Yield what is measured: for each path one GPU, if DDP is compared with it, and several; FSDP has no graphs."""
    for fast in paths:
        if "ddp" in strategies:
            yield ALONE, fast
        for strategy in strategies if fast == "off" else [s for s in strategies if s == "ddp"]:
            yield Parallel(gpus, strategy), fast


def measure(name: str, model: Path, rows: Path, runs: Iterable[tuple[Parallel, str]]) -> Iterator[dict[str, Any]]:
    """Yield one result per run. A failed run yields its error."""
    for parallel, fast in runs:
        settings = settings_of(name, model, rows, parallel, fast)
        line = {"model": name, "gpus": parallel.gpus, "strategy": parallel.strategy, "fast": fast, "seed": SEED}
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            done = subprocess.run(command(settings, parallel, out), stderr=subprocess.PIPE, text=True)
            if done.returncode:
                yield line | {"error": done.stderr.strip().splitlines()[-5:]}
                continue
            yield line | result_of(out, settings, parallel, WARMUP[fast])


@dataclass(frozen=True)
class Links:
    """Bandwidth of a ring of GPUs, in GB/s and one direction: inside a machine of 8, and between machines."""

    name: str
    inside: float
    between: float


# From data sheets: NVLink of an H100 SXM, 900 GB/s in both directions together; a DGX H100 has 8 x 400 Gb/s between
# machines, which parallel rings share. PCIe 4.0 x16; one network port of 100 Gb/s per machine.
LINKS = (Links("NVLink, 8 × 400 Gb/s", 450, 400), Links("PCIe 4.0, 100 Gb/s", 32, 12.5))
MACHINE = 8  # GPUs of a machine
HOP = 10e-6  # seconds that a message takes from one GPU to the next, whatever its size: an assumption
BUCKET = 25 * 2**20  # bytes of a bucket of DDP, torch's default
COUNTS = (2, 8, 16, 64)


def communication(workload: memory.Workload, parallel: Parallel, links: Links) -> float:
    """Return the seconds that the GPUs exchange data in a step of one pass, as rings do (Thakur et al. 2005).

    DDP all-reduces the gradients: each GPU sends 2 (N - 1) / N of them. FSDP gathers all stored weights in the forward
    and again in the backward pass, and reduces and scatters the gradients: (N - 1) / N each time.
    """
    number = parallel.gpus
    bandwidth = (links.inside if number <= MACHINE else min(links.inside, links.between)) * 1e9
    gradients = FULL * memory.trained_parameters(workload)
    if parallel.sharded:
        weights = sum(size for part, size in memory.static_parts(workload).items() if part != REPLICATED)
        sent, collectives = 2 * weights + gradients, 3 * workload.shape.layers
    else:
        sent, collectives = 2 * gradients, 2 * ceil(gradients / BUCKET)
    return (number - 1) / number * sent / bandwidth + collectives * (number - 1) * HOP


def steps_of_one() -> list[tuple[str, Config, float]]:
    """Return models with their settings and the seconds of a step on one H100: measured, or else estimated."""
    tiny, small = (
        next(line for line in measurements.read("speed") if line["quantization"] == "nf4" and line["model"] == model
             and line["batch_size"] == rows)
        for model, rows in (("tinyllama-1.1b", 16), ("llama2-7b", 4))
    )  # fmt: skip
    large = Config.preset("llama31-8b", model="llama2-70b", batch_size=1, gradient_accumulation=1)
    measured = [(line["model"], measurements.config_of(line), line["seconds_per_step"]) for line in (tiny, small)]
    return [*measured, ("llama2-70b (estimated)", large, step_time.seconds(large, GPUS["h100"]))]


def seventy_billion() -> str:
    """Return in a table whether models of 70 billion parameters fit two GPUs of 24 GB, one row each at a time."""
    heads = "| model | strategy | tokens | training, GiB on each GPU | fits | evaluation, GiB | fits | RAM, GiB |"
    lines = [heads, "| --- " * 8 + "|"]
    for model, strategy, length in product(("llama2-70b", "llama31-70b"), STRATEGIES, (512, 1024, 2048)):
        config = Config.preset("llama31-8b", model=model, batch_size=1, gradient_accumulation=16)
        config = config.replace(max_length=length, heldout_max_length=length, optimizer="adamw_8bit")
        planned = plan.plan_memory(config, "rtx-4090", parallel=Parallel(2, strategy))
        cells = [model, strategy, str(length)]
        for parts in (planned.training, planned.evaluation):
            total = sum(parts.values()) + planned.context
            cells += [f"{total:.2f}", "yes" if total <= GPUS["rtx-4090"].memory else "no"]
        lines.append(f"| {' | '.join(cells)} | {planned.ram:.2f} |")
    return "\n".join(lines)


# Peaks of reserved memory that Answer.AI published, with FSDP of 2024, on two GPUs and in GiB: model, strategy, rows of
# each GPU, tokens per row. https://github.com/AnswerDotAI/fsdp_qlora/blob/main/benchmarks_03_2024.md
PUBLISHED = (
    ("llama2-70b", "fsdp-offload", 2, 2048, 14.92),
    ("llama2-7b", "fsdp", 1, 512, 4.98),
    ("llama2-7b", "fsdp", 1, 2048, 5.21),
    ("llama2-7b", "fsdp", 4, 2048, 11.22),
    ("llama2-7b", "fsdp", 10, 2048, 20.97),
    ("llama2-7b", "fsdp-offload", 12, 2048, 22.38),
    ("llama2-7b", "ddp", 8, 2048, 20.94),
)


def of_answer_ai(model: str, rows: int, tokens: int = 2048) -> Config:
    """Return the settings of those runs, with `rows` rows per step: the defaults of their train.py."""
    targets = "q_proj,k_proj,v_proj,up_proj,down_proj,gate_proj"
    own = {"rank": 64, "target_modules": targets, "optimizer": "adamw_torch", "gradient_accumulation": 1}
    return Config.preset("llama31-8b", model=model, batch_size=rows, max_length=tokens, **own)


def published() -> str:
    """Return published peaks beside planned ones in a table."""
    lines = ["| model | strategy | rows × tokens on each GPU | published GiB | planned GiB |", "| --- " * 5 + "|"]
    for model, strategy, rows, tokens, gib in PUBLISHED:
        planned = plan.plan_memory(of_answer_ai(model, 2 * rows, tokens), parallel=Parallel(2, strategy))
        lines.append(f"| {model} | {strategy} | {rows} × {tokens} | {gib:.2f} | {sum(planned.training.values()):.2f} |")
    return "\n".join(lines)


def efficiency() -> str:
    """Return the estimated efficiency in a table: the share of a GPU's time in which it computes.

    The first number is without any overlap of computation and communication, the second with as much as possible. The
    last column is tokens per second of all GPUs, likewise.
    """
    last = f"tokens/s, {COUNTS[-1]} GPUs"
    heads = ["model", "rows × tokens", "tokens/s, 1 GPU", "strategy", "links", *(f"{n} GPUs" for n in COUNTS), last]
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join(['---'] * len(heads))} |"]
    for name, config, seconds in steps_of_one():
        workload = memory.workload_of(config)
        for strategy in ("ddp", "fsdp"):
            for links in LINKS:
                times = [communication(workload, Parallel(number, strategy), links) for number in COUNTS]
                shares = [(seconds / (seconds + time), min(1.0, seconds / time)) for time in times]
                alone = workload.tokens / seconds
                cells = [name, f"{workload.rows} × {config.max_length}", f"{alone:,.0f}", strategy, links.name]
                cells += [" – ".join(dict.fromkeys(f"{share:.0%}" for share in pair)) for pair in shares]
                cells.append(" – ".join(f"{COUNTS[-1] * alone * share:,.0f}" for share in shares[-1]))
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, or measure and write the results after every run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", type=Path, nargs="?")
    parser.add_argument("rows", type=Path, nargs="?")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--fast", nargs="+", default=list(WARMUP), choices=list(WARMUP))
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--model-only", action="store_true", help="print the estimates for up to 64 GPUs")
    args = parser.parse_args()
    if args.model_only:
        print(seventy_billion(), published(), efficiency(), sep="\n\n")
        return
    if not (args.tokenizer and args.rows and args.out):
        parser.error("TOKENIZER_FOLDER, ROWS.jsonl and --out are needed to measure")
    results: list[dict[str, Any]] = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, get_context("spawn")) as pool:
            pool.submit(write_shape, name, Path(folder), args.tokenizer).result()
            pool.shutdown()  # releases the GPU
            runs = runs_of(args.gpus, args.fast, args.strategies)
            for line in measure(name, Path(folder), args.rows.resolve(), runs):
                results.append(line)
                print(json.dumps(line), flush=True)
                files.write_json(args.out, {"runs": results})


if __name__ == "__main__":
    main()
