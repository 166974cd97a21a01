"""Time of an evaluation on a GPU: answers from a CUDA graph and losses of up to 32 rows, beside `generate` and 8.

usage: python benchmarks/gpu_evaluation.py TOKENIZER_FOLDER ROWS.jsonl [--out FILE] [--rows 100] [--tokens 128]

Held-out losses and answers of the first rows, and losses on the general questions, for a 4-bit base (NF4, double
quantization) of TinyLlama's shape with random weights and an adapter with r=16, each path in a process of its own that
may use 14.56 GiB, as on a T4. Seconds are the fastest of two rounds after a short one. Random weights never end an
answer, so every answer has all its tokens. `itself` are equal answers of `generate` in batches of half the size.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_speed import T4_GIB, config_of, contender, make_shape

from qlora_helpers import files
from qlora_helpers.config import Config

ROUNDS = 2
PATHS, DTYPES = ("generate", "graph"), ("bfloat16", "float32")
PARTS = ("losses", "answers", "general")


def take(path: str) -> list[list[int]]:
    """Let this process evaluate on a path; returns a list that collects the tokens of all answers."""
    from qlora_helpers.evaluation import answers
    from qlora_helpers.models import forward
    from qlora_helpers.planning import memory

    written: list[list[int]] = []
    generated = answers._continue

    def collected(*given: Any) -> list[list[int]]:
        written.extend(output := generated(*given))
        return output

    answers._continue = collected
    if path == "generate":
        forward.static_cache = lambda *_: None  # type: ignore[assignment]
        memory.MOST_ROWS_ON_GPU = memory.MOST_ROWS
    return written


def load(config: Config, rows: int) -> tuple[Any, Any, Any, list[Any]]:
    """Return the model with an adapter that changes its outputs, tokenizer, device, and held-out rows."""
    import torch
    from transformers import AutoTokenizer

    from qlora_helpers.data import prompts, sources
    from qlora_helpers.device import detect
    from qlora_helpers.models.qlora import attach_lora, load_base

    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    torch.cuda.set_per_process_memory_fraction(T4_GIB / total)
    tokenizer, device = AutoTokenizer.from_pretrained(config.model), detect(config.compute_dtype)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = attach_lora(load_base(config, device), config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01)
    whole = config.replace(max_length=config.heldout_max_length)
    return model, tokenizer, device, list(prompts.encode(sources.load(config).rows[:rows], whole, tokenizer))


def measure(name: str, config: Config, number: int) -> dict[str, Any]:
    """Evaluate on one path: seconds and peak GiB of each part, batch sizes, losses, and the tokens of the answers."""
    from qlora_helpers.evaluation import answers, losses

    model, tokenizer, device, heldout = load(config, number)
    longest = max(len(example.input_ids) for example in heldout)
    written = take(name)
    rows, questions = losses.eval_batch_sizes(config.replace(heldout_max_length=longest), device)
    of_general, _ = losses.eval_batch_sizes(config.replace(heldout_max_length=losses.GENERAL_LENGTH), device)
    asked, general = answers.heldout_prompts(heldout, number), losses.general_examples(config, tokenizer)

    def answer(size: int = questions, short: bool = False) -> list[list[int]]:
        own = config.replace(max_new_tokens=8) if short else config
        written.clear()
        answers.generate(model, tokenizer, own, device, asked[:4] if short else asked, batch_size=size)
        return list(written)

    answer(short=True)
    losses.heldout_losses(model, heldout[:2], device, 1)
    parts = {
        "losses": _timed(lambda: losses.heldout_losses(model, heldout, device, rows)),
        "answers": _timed(answer),
        "general": _timed(lambda: losses.heldout_losses(model, general, device, of_general)),
    }
    again = answer(questions // 2) if name == "generate" else None
    return {
        "path": name, "dtype": config.compute_dtype, "batch_sizes": {"rows": rows, "questions": questions},
        "tokens": {"longest": longest, "all": sum(len(example.input_ids) for example in heldout)},
        "seconds": {part: seconds for part, (seconds, _, _) in parts.items()},
        "peak_gib": {part: peak for part, (_, peak, _) in parts.items()},
        "row_losses": [row.loss_sum / max(row.tokens, 1) for part in ("losses", "general") for row in parts[part][2]],
        "answers": parts["answers"][2], "again": again,
    }  # fmt: skip


def _timed(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Return the seconds of the fastest round, peak GiB that were reserved, and the result."""
    import torch

    seconds: list[float] = []
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        result = run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds), torch.cuda.max_memory_reserved() / 2**30, result


def measure_in_subprocess(name: str, dtype: str, model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run `measure` in a fresh process, so that no path inherits another's memory."""
    command = [sys.executable, __file__, str(model), str(args.data), "--path", name, "--dtype", dtype]
    command += ["--rows", str(args.rows), "--tokens", str(args.tokens)]
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run([*command, "--out", f"{scratch}/one.json"], capture_output=True, text=True)
        for line in done.stdout.splitlines():
            print("  ", line, flush=True)
        if done.returncode:
            return {"path": name, "dtype": dtype, "failed": done.stderr[-1500:]}
        return dict(json.loads(Path(scratch, "one.json").read_text()))


def equal_share(one: list[list[int]] | None, other: list[list[int]] | None) -> float | None:
    """Return the share of answers whose tokens are all equal."""
    return one and other and sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def compare(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Compare the two paths in one dtype: times as long, equal answers, and the largest difference of a row's loss."""
    if "failed" in before or "failed" in now:
        return {}
    old, new = (sum(side["seconds"].values()) for side in (before, now))
    pairs = zip(before["row_losses"], now["row_losses"], strict=True)
    return {
        "dtype": now["dtype"],
        "share_of_time": new / old,
        "equal_answers": equal_share(before["answers"], now["answers"]),
        "itself": equal_share(before["answers"], before["again"]),
        "largest_loss_difference": max(abs(a - b) for a, b in pairs),
    }


def in_words(line: dict[str, Any]) -> str:
    """Return one line about a path."""
    about = f"{line['path']} {line['dtype']}"
    if "failed" in line:
        return f"{about} failed: {line['failed']}"
    each = [f"{part} {line['seconds'][part]:.2f} s {line['peak_gib'][part]:.2f} GiB" for part in PARTS]
    return f"{about} {line['batch_sizes']} {line['tokens']}: {', '.join(each)}; {sum(line['seconds'].values()):.2f} s"


def main() -> None:
    """Measure both paths in both dtypes; with `--path`, measure one for the comparing process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tokenizer")
    parser.add_argument("data", metavar="ROWS.jsonl", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--path", choices=PATHS)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    args = parser.parse_args()
    if args.path:
        config = config_of(contender("", 4, dtype=args.dtype[0]), Path(args.tokenizer))
        config = config.replace(dataset=str(args.data.resolve()), max_new_tokens=args.tokens, columns=None)
        files.write_json(args.out, measure(args.path, config, args.rows))
        return
    from qlora_helpers.device import detect, versions

    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        make_shape(model, args.tokenizer)
        result: dict[str, Any] = {
            "device": detect().to_dict(), "versions": versions(), "limit_gib": T4_GIB, "rows": args.rows,
            "answer_tokens": args.tokens, "measured": [], "compared": [],
        }  # fmt: skip
        for dtype in args.dtype:
            pair = [measure_in_subprocess(name, dtype, model, args) for name in PATHS]
            result["compared"].append(compare(*pair))
            for line in pair:  # 100 answers of each path are too long to keep
                for key in ("answers", "again", "row_losses"):
                    line.pop(key, None)
                print(in_words(line), flush=True)
            result["measured"] += pair
            print(json.dumps(result["compared"][-1]), flush=True)
            if args.out:
                files.write_json(args.out, result)


if __name__ == "__main__":
    main()
