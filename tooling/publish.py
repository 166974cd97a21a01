"""Draw figures/ and docs/, and write the README's result tables from results/: no number there is typed by hand."""

import json
import math
from pathlib import Path
from typing import Any

from qlora_helpers import plots, runs
from qlora_helpers.evaluation import report
from qlora_helpers.planning import measurements
from qlora_helpers.runs import RunFolder

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- results: written by make figures -->", "<!-- end of results -->"
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes")
STUDY = "h100-smollm2-study"
CLAIMS, EVALUATION = "h100-claims", "h100-evaluation"
FP16, BF16 = "h100-smollm2-fp16/exp1", f"{STUDY}/100-rows"  # the same rows, seed and steps in both arithmetics
CPUS = ("cpu-avx2", "cpu-amx")
TITLES = {
    "h100-smollm2-fp16": "The first two as on a T4: fp16, 14.56 GiB",
    "h100-tinyllama-shape-t4": "TinyLlama's shape with random weights, as on a T4 (its losses mean nothing)",
}


def render() -> str:
    """The README's part between the markers."""
    sections = [_section(name, title) for name, title in TITLES.items()]
    return "\n\n".join([START, _study(), *sections, _claims(), _evaluation(), _memory(), _cpu(), END])


def _cpu() -> str:
    """Two kinds of CPU: minutes of the series, and training beside TRL's."""
    columns = ("CPU", "dtype", "GFLOP/s float32, bfloat16", "notebooks 01–07", "this package", "TRL", "ratio", "ratio*")
    table = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    speeds = [json.loads((ROOT / "results" / name / "speed.json").read_text("utf-8")) for name in CPUS]
    for name, speed in zip(CPUS, speeds, strict=True):
        series = json.loads((ROOT / "results" / name / "series.json").read_text("utf-8"))
        rates, dtype, gflops = speed["tokens_per_second"], speed["device"]["dtype"], speed["gflops"]
        trl = max(rate for contender, rate in rates.items() if contender in [f"TRL, {known}" for known in gflops])
        cells = [
            series["device"]["name"],
            dtype,
            ", ".join(f"{value:.0f}" for value in gflops.values()),
            "{} min {} s".format(*divmod(round(series["total"]), 60)),
            f"{rates[f'this package, {dtype}']:.0f} tokens/s",
            f"{trl:.0f} tokens/s",
            f"{speed['times_trl']:.2f}",
            f"{speed['times_trl_without_checkpointing']:.2f}",
        ]
        table.append(f"| {' | '.join(cells)} |")
    return "\n\n".join(
        [
            "### On a CPU",
            "SmolLM2-135M in NF4, 24 sample rows, 4 at a time, 256 tokens at most, beside TRL's `SFTTrainer`: tokens a "
            "second without padding, medians of three rounds in which the contenders took turns. TRL runs with "
            "`use_cpu=True, bf16=False`, its defaults and the faster dtype; \\*: without its gradient checkpointing. "
            "`python benchmarks/cpu_speed.py`",
            "\n".join(table),
            f"{' '.join(map(_same_losses, speeds))} {'; '.join(dict.fromkeys(map(_packages, speeds)))}.",
        ]
    )


def _same_losses(speed: dict[str, Any]) -> str:
    """How far the losses of a step are from those on padded batches, and how much of it is rounding."""
    dtype = speed["device"]["dtype"]
    text = f"In {dtype}, no step's loss differs from that on padded batches by more than "
    text += f"{_percent(speed['largest_relative_difference_of_losses'])} of it"
    if dtype == "float32":
        return f"{text}."
    eager, ours, padded = (_percent(value) for value in speed["rounding"].values())
    return (
        f"{text}; eager attention instead of SDPA changes the padded ones by {eager}, and from float32 ours differ by "
        f"{ours}, the padded ones by {padded}: this is rounding."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%"


def _claims() -> str:
    """Claims of a published report beside what was measured."""
    folder = ROOT / "results" / CLAIMS
    judged = json.loads((folder / "claims.json").read_text("utf-8"))
    table = ["| claim | measured | so it is |", "| --- | --- | --- |"]
    run = RunFolder(folder / "rank-14")
    recipe, rows = run.config(), run.read("metrics.json")["train_rows"]
    table += [f"| {found['claim']} | {found['text']} | {found['claim_is']} |" for found in judged]
    return "\n\n".join(
        [
            "### Four claims of the second report, tried again",
            f"Its recipe (alpha {recipe.alpha}, {recipe.epochs} epochs, on {rows} rows here) on SmolLM2-135M-Instruct, "
            "since BLOOM could not be had. "
            "SmolLM2 has no biases, so zero ones were added. The smaller model lacks the three blocks that are missed "
            "least. `python benchmarks/claims.py FILE --out DIR`",
            "\n".join(table),
            f"{judged[0]['rows']} held-out rows, {judged[0]['seeds']} seeds. {_where(run.read('manifest.json'))}.",
        ]
    )


def _evaluation() -> str:
    """What the evaluation of a run costs beside its training."""
    run = RunFolder(ROOT / "results" / EVALUATION)
    metrics, config = run.read("metrics.json"), run.read("config.json")["config"]
    return "\n\n".join(
        [
            "### What an evaluation costs",
            f"{metrics['train_rows']} rows, {metrics['steps']} steps of SmolLM2-135M-Instruct: "
            f"{metrics['seconds']:.0f} s and {metrics['peak_memory_gib']:.2f} GiB. Held-out losses of "
            f"{config['n_heldout']} rows, {config['n_answers']} answers to their questions and the general questions: "
            f"{metrics['eval_seconds']:.0f} s and {metrics['eval_peak_memory_gib']:.2f} GiB. "
            f"{_where(run.read('manifest.json'))}.",
        ]
    )


def _where(manifest: dict[str, Any]) -> str:
    return f"{manifest['device']['name']}, {manifest['device']['dtype']}; {_packages(manifest)}"


def _packages(made: dict[str, Any]) -> str:
    return ", ".join(f"{package} {made['versions'][package]}" for package in PACKAGES)


def _memory() -> str:
    """How far the memory plan was off, moment by moment, on what it was fitted to and on what it was not."""
    lines = measurements.read("settings")
    table = ["| settings | peak of the run | training | held-out losses | answers |", "| --- | --- | --- | --- | --- |"]
    for scored, words in ((False, "fitted to"), (True, "kept for the score")):
        chosen = [line for line in lines if line["scored_only"] == scored]
        scores = [
            measurements.score(chosen, moments)
            for moments in (measurements.MOMENTS, *((m,) for m in measurements.MOMENTS))
        ]
        cells = [f"{found['median']:.1%}, {found['worst']:.1%}" for found in scores]
        table.append(f"| {len(chosen)} {words} | {' | '.join(cells)} |")
    return "\n\n".join(
        [
            "### Planned against measured peak memory",
            "How far the plan was off what torch reserved, at the median and at the worst:",
            "\n".join(table),
            f"Seven models' shapes with random weights, {lines[0]['device']}; {_packages(lines[0])}.",
        ]
    )


def _arithmetic() -> str:
    """The training losses of both arithmetics, step beside step."""
    losses = [[line["loss"] for line in _log(run) if "loss" in line] for run in (FP16, BF16)]
    apart = [abs(a - b) for a, b in zip(*losses, strict=True)]
    skipped = sum("loss" in line and not math.isfinite(line["grad_norm"]) for line in _log(FP16))
    return (
        f"Step by step, the {len(apart)} training losses of 100 rows in fp16 differ from those in bf16 by "
        f"{sum(apart) / len(apart):.4f} on average and {max(apart):.4f} at most; {skipped} steps were skipped:\n\n"
        "![Losses of the same run in bf16 and in fp16](figures/arithmetic.png)"
    )


def _log(run: str) -> list[dict[str, Any]]:
    return RunFolder(ROOT / "results" / run).log()


def _read(name: str) -> dict[str, Any]:
    return RunFolder(ROOT / "results" / name).read("comparison.json")


def _study() -> str:
    result = _read(STUDY)
    parts = [
        "### SmolLM2-135M-Instruct, bf16: is it the data or the steps?",
        report.table_markdown(result, speed=False),
        report.bullets(report.verdicts(result)),
        report.scope(result),
        "Greedy answers to the held-out questions, with 95% intervals (of the first seed):",
        report.text_table_markdown(result),
        report.bullets(report.forgetting(result)),
        _made(result),
    ]
    return "\n\n".join(parts)


def _section(name: str, title: str) -> str:
    result = _read(name)
    more = [_arithmetic()] if FP16.startswith(name) else []
    return "\n\n".join([f"### {title}", report.table_markdown(result), _made(result), *more])


def _made(result: dict[str, Any]) -> str:
    device = result["device"]
    seeds = ", ".join(map(str, result["table"][-1]["seeds"]))
    rows = f"{result['heldout_rows']} held-out rows with {result['heldout_tokens']:,} trained tokens."
    return f"{rows} {device['name']}, {device['dtype']}, seeds {seeds}; {_packages(result)}."


def main() -> None:
    """Figures of the study, its whole report in docs/, and the tables of all."""
    folder = ROOT / "results" / STUDY
    result = _read(STUDY)
    logs = {line["name"]: RunFolder(folder / line["run"]).log() for line in result["table"] if line["seeds"]}
    figures = {
        "differences": plots.differences(result),
        "loss_curves": plots.loss_curves(logs),
        "memory": plots.planned_and_measured(measurements.read("settings")),
        "arithmetic": plots.loss_curves({"bf16": _log(BF16), "fp16, as on a T4": _log(FP16)}),
    }
    for name, figure in figures.items():
        plots.save(figure, ROOT / "figures" / f"{name}.png")
    text = report.markdown(result, ["../figures/differences.png", "../figures/loss_curves.png"])
    runs.write_text(ROOT / "docs" / "study.md", text)
    readme = (ROOT / "README.md").read_text("utf-8")
    before, after = readme.split(START)[0], readme.split(END)[1]
    runs.write_text(ROOT / "README.md", before + render() + after)


if __name__ == "__main__":
    main()
