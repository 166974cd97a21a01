"""The generated part of docs/scale.md: one GPU and two, measured."""

import json
from typing import Any

import page_parts

from qlora_helpers.evaluation.report import markdown_table
from qlora_helpers.files import ROOT

RESULTS = ROOT / "results" / "h100-scale" / "scale.json"
HEADS = ["model", "GPUs", "strategy", "steps from", "tokens/s", "of one GPU", "measured GiB", "planned GiB"]
STEPS = {"off": "the library", "graphs": "graphs"}


def table() -> str:
    """Speed of each run beside one GPU with the same kind of steps, and its memory beside the plan."""
    runs: list[dict[str, Any]] = json.loads(RESULTS.read_text("utf-8"))["runs"]
    alone = {(run["model"], run["path"]): run["tokens_per_second"] for run in runs if run["gpus"] == 1}
    rows = [
        [
            run["model"],
            str(run["gpus"]),
            run["strategy"] if run["gpus"] > 1 else "",
            STEPS[run["path"]],
            f"{run['tokens_per_second']:,.0f}",
            f"{run['tokens_per_second'] / alone[run['model'], run['path']]:.2f}",
            f"{run['peak_gib']:.2f}",
            f"{run['planned_gib']:.2f}",
        ]
        for run in runs
    ]
    first = runs[0]
    return page_parts.join(
        f"{first['device']['name']}, {page_parts.packages(first)}. Random weights; rows of at most 512 tokens, on each "
        "GPU 8 per step with TinyLlama's shape, and 4 with recomputed activations with that of Llama 3.1 8B; adapters "
        "on all linear layers. Speed is the median of steps after the first 20. Memory is the peak of training on the "
        "first GPU. Command: `python benchmarks/scale.py TOKENIZER ROWS.jsonl --out FILE`.",
        markdown_table(HEADS, rows),
    )
