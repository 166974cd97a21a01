"""The generated parts of docs/scale.md: one GPU and two, and a run that loses a process."""

import json
from typing import Any

import page_parts

from qlora_helpers.evaluation.report import markdown_table
from qlora_helpers.files import ROOT

RESULTS = ROOT / "results" / "two-gpus"
HEADS = ["model", "GPUs", "strategy", "steps from", "tokens/s", "of one GPU", "measured GiB", "planned GiB"]
PROCESSES = {"1": "one GPU", "2": "two GPUs"}
STEPS = {"off": "the library", "graphs": "graphs"}


def table() -> str:
    """Speed of each run beside one GPU with the same kind of steps, and its memory beside the plan."""
    runs: list[dict[str, Any]] = _runs("scale")
    alone = {_like(run): run["tokens_per_second"] for run in runs if run["gpus"] == 1}
    rows = [
        [
            run["model"],
            f"{run['gpus']} × {_card(run)}",
            run["strategy"] if run["gpus"] > 1 else "",
            STEPS[run["path"]],
            f"{run['tokens_per_second']:,.0f}",
            f"{run['tokens_per_second'] / alone[_like(run)]:.2f}" if _like(run) in alone else "",
            f"{run['peak_gib']:.2f}",
            f"{run['planned_gib']:.2f}",
        ]
        for run in runs
    ]
    first = runs[0]
    return page_parts.join(
        f"{page_parts.packages(first)}. Random weights; rows of at most 512 tokens, on each "
        "GPU 8 per step with TinyLlama's shape, and 4 with recomputed activations with that of Llama 3.1 8B; adapters "
        "on all linear layers. Speed is the median of steps after the first 20, and with graphs after the first 60, in "
        "which they are captured. Memory is the peak of training on the first GPU. Command: "
        "`python benchmarks/scale.py TOKENIZER ROWS.jsonl --out FILE`.",
        markdown_table(HEADS, rows),
    )


def killed() -> str:
    """Held-out losses with one GPU and two, and of a run that went on after one of two processes was killed."""
    found = {run["run"]: run for run in _runs("resume")}
    rows = [
        [PROCESSES[name[0]], f"{run['eval_loss']:.4f}", f"seed {name[-1]}"]
        for name, run in found.items()
        if "seed" in name
    ]
    ends = {"killed-then-2": "two GPUs, killed, then two", "killed-then-1": "two GPUs, killed, then one"}
    rows += [[words, f"{found[name]['eval_loss']:.4f}", "seed 0"] for name, words in ends.items()]
    same = found["killed-then-2"]["adapter"] == found["2-seed-0"]["adapter"]
    return page_parts.join(
        f"Four layers of TinyLlama's shape, {found['2-seed-0']['steps']} steps of 16 rows from graphs, on "
        f"{found['2-seed-0']['device']}s. After one of two processes was killed, the launcher had ended within "
        f"{found['killed']['seconds']:.1f} s. Continued with two, the adapter is "
        f"{'equal, bit by bit, to' if same else 'not that of'} that of the run that was not interrupted. Command: "
        "`python benchmarks/resume.py TOKENIZER ROWS.jsonl --out FILE`.",
        markdown_table(["run", "held-out loss", ""], rows),
    )


def _runs(name: str) -> list[dict[str, Any]]:
    return list(json.loads((RESULTS / f"{name}.json").read_text("utf-8"))["runs"])


def _card(run: dict[str, Any]) -> str:
    return str(run["device"]["name"]).split()[1]


def _like(run: dict[str, Any]) -> tuple[str, str, str]:
    """What a ratio of speeds keeps equal."""
    return run["model"], run["path"], _card(run)
