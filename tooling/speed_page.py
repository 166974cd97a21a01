"""The generated part of docs/speed.md: training and evaluation on a GPU, beside other tools."""

import json
from typing import Any

import page_parts

from qlora_helpers.evaluation.report import markdown_table
from qlora_helpers.files import ROOT

RESULTS = ROOT / "results" / "h100-speed"
OURS, REPORT = "this package", "published script"
GROUPS = {
    "qv": "### Adapters on queries and values, as many rows as fit\n\nbf16, at most 256 tokens per row.",
    "all-linear": "### Adapters on all linear layers, as many rows as fit\n\nbf16, at most 256 tokens per row.",
    "fp16": "### fp16, as on a T4, without compiling\n\nAdapters on queries and values, at most 256 tokens per row.",
    "8b": "### Llama 3.1 8B's shape\n\nbf16, adapters on all linear layers, at most 1,024 tokens per row, eight rows "
    "per update, activations recomputed. Unsloth has the settings of its notebooks. Both allocate expandable segments "
    "(`PYTORCH_CUDA_ALLOC_CONF`), as Unsloth does by itself.",
}


def tables() -> str:
    """The published recipe, larger batches, fp16, an 8B shape, and evaluations."""
    speed = _read("speed")
    script, *_ = speed["groups"]["recipe"]
    return page_parts.join(
        f"Random weights, NF4 with double quantization, r=16, {speed['device']['name']} limited to "
        f"{speed['limit_gib']} GiB. Tokens without padding, median of three windows. Except in the first table, this "
        "package sorts rows by length (`sampling=group_by_length`), and the others take them in random order, their "
        "default. Each table was measured in one go. What waits for Python depends on the processor beside the GPU: "
        f"the speed of the same published script differs by a factor of {_spread(speed):.1f} between tables. "
        "Command: `python benchmarks/gpu_speed.py TOKENIZER ROWS.jsonl`. "
        f"{page_parts.packages(speed)}.",
        "### The published recipe",
        f"TinyLlama's shape, bf16, adapters on queries and values, four rows of at most 256 tokens in each of "
        f"{script['steps']} updates; `train()` includes capturing and compiling.",
        _recipe(speed["groups"]["recipe"]),
        _same_losses(*speed["groups"]["losses"]),
        *(
            part
            for name, text in GROUPS.items()
            if name in speed["groups"]
            for part in (*text.split("\n\n"), _beside(speed["groups"][name]))
        ),
        *_evaluation(),
    )


def pass_seconds() -> dict[str, float]:
    """Seconds of a pass of four rows on each path."""
    timed = {line["fast"]: line["path"]["seconds"] for line in _read("speed")["groups"]["recipe"] if line["path"]}
    return {**timed["graphs"], "compiled": timed["compiled"]["compiled"]}


def _read(name: str) -> dict[str, Any]:
    return dict(json.loads((RESULTS / f"{name}.json").read_text("utf-8")))


def _spread(speed: dict[str, Any]) -> float:
    lines = [line for group in speed["groups"].values() for line in group if line["name"] == REPORT]
    rates = [line["tokens_per_second"] for line in lines]
    return float(max(rates) / min(rates))


def _name(line: dict[str, Any]) -> str:
    return f"{line['name']}, fast={line['fast']}" if line["fast"] else line["name"]


def _recipe(lines: list[dict[str, Any]]) -> str:
    script, rows = lines[0], []
    for line in lines:
        whole = line["steps"] == script["steps"]
        cells = [
            _name(line),
            f"{line['tokens_per_second']:,.0f} tokens/s",
            f"{line['tokens_per_second'] / script['tokens_per_second']:.1f}",
            f"{line['peak_gib']:.1f} GiB",
            f"{line['train_seconds']:.1f} s" if whole else "",
            f"{script['train_seconds'] / line['train_seconds']:.1f}" if whole else "",
        ]
        rows.append(cells)
    return markdown_table(["trainer", "speed", "ratio", "memory", "`train()`", "ratio"], rows)


def _same_losses(plain: dict[str, Any], *replayed: dict[str, Any]) -> str:
    apart = max(abs(a / b - 1) for line in replayed for a, b in zip(line["losses"], plain["losses"], strict=True))
    return (
        f"Without dropout, the losses of {len(plain['losses'])} steps from graphs and from compiled blocks are within "
        f"{100 * apart:.2g}% of the library's."
    )


def _beside(lines: list[dict[str, Any]]) -> str:
    """Contenders of a group, and how many times the fastest other tool's speed each has."""
    lines = [line for line in lines if "failed" not in line]
    best = max(line["tokens_per_second"] for line in lines if line["name"] not in (OURS, REPORT))
    rows = [
        [
            _name(line),
            f"{line['batch']} × {line['accumulation']}",
            f"{line['tokens_per_second']:,.0f} tokens/s",
            f"{line['tokens_per_second'] / best:.2f}",
            f"{line['peak_gib']:.{1 if best > 10_000 else 2}f} GiB",
        ]
        for line in lines
    ]
    return markdown_table(["trainer", "rows × passes", "speed", "of the best other tool", "memory"], rows)


def _evaluation() -> list[str]:
    names = {"generate": "`generate`, at most 8 rows at once", "graph": "graph, as many rows as fit"}
    rows, equal = [], ""
    for found in (_read("evaluation"), _read("evaluation_float32")):
        work = f"{found['rows']} × {found['answer_tokens']}, {found['device']['name'].split()[1]}"
        rows += [
            [names[line["path"]], line["dtype"], work, *(f"{seconds:.1f} s" for seconds in line["seconds"].values()),
             f"{sum(line['seconds'].values()):.1f} s", f"{max(line['peak_gib'].values()):.1f} GiB"]
            for line in found["measured"]
        ]  # fmt: skip
        for pair in found["compared"]:
            share = f"In {pair['dtype']}, graphs take {pair['share_of_time']:.0%} of the time"
            same = f", and {pair['equal_answers']:.0%} of the answers are equal" if pair["dtype"] == "float32" else ""
            equal += f"{share}{same}. "
    return [
        "## Evaluations",
        "TinyLlama's shape: losses of held-out rows of up to 2,048 tokens, answers to their questions, and losses on "
        f"the general questions, limited to {found['limit_gib']} GiB. A batch has as many questions as fit, at most "
        f"{found['measured'][0]['batch_sizes']['questions']}. {equal}With few short answers, graphs save less. "
        "Command: `python benchmarks/gpu_evaluation.py TOKENIZER ROWS.jsonl --out FILE`.",
        markdown_table(
            ["answers from", "dtype", "rows × tokens", "losses", "answers", "general", "together", "memory"], rows
        ),
    ]
