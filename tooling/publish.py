"""Draw figures/ and write every generated part of README.md and docs/: `make figures`.

A page marks such a part with `<!-- NAME: written by make figures -->` and `<!-- end of NAME -->`. All numbers between
the two come from results/, data/ and the package itself.
"""

import contextlib
import dataclasses
import io
import json
import math
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import page_parts
import scale_page
import speed_page

from qlora_helpers import __main__ as command_line
from qlora_helpers import plots
from qlora_helpers.config import Config, load_preset, preset_names
from qlora_helpers.evaluation import comparison, differences, learning_curve, report
from qlora_helpers.evaluation.comparison import FEW_SHOT, Comparison, Summary
from qlora_helpers.evaluation.differences import UNSURE, Difference
from qlora_helpers.evaluation.report import markdown_table
from qlora_helpers.evaluation.row_losses import BASE, IN_16_BITS, OWN_TEMPLATE
from qlora_helpers.files import ROOT
from qlora_helpers.planning import gpus, measurements
from qlora_helpers.runs import RunFolder

START, END = "<!-- {}: written by make figures -->", "<!-- end of {} -->"
ANSWER = 300  # characters of an answer in the README
STUDY = "h100-smollm2-study"
CLAIMS, EVALUATION = "h100-claims", "h100-evaluation"
FP16, BF16 = "h100-smollm2-fp16/exp1", "h100-smollm2-seeds/100-rows"  # the same rows, seed and steps in both dtypes
CPUS = ("cpu-avx2", "cpu-amx")
TITLES = {
    "h100-smollm2-fp16": "The first two experiments as on a T4: fp16, 14.56 GiB",
    "h100-tinyllama-shape-t4": "TinyLlama's shape with random weights, as on a T4 (its losses mean nothing)",
}
FIRST, SMALL, LARGE = "100 rows", "200 rows, 500 steps", "400 rows"  # the last two have the same number of steps
SIZES = {"5 epochs": ("n100", "n200", "n400", "n800", "n1600"), "500 steps": ("n100-epochs20", "n200-epochs10", "n400")}
DRAWN = (FIRST, "100 rows, 500 steps", LARGE, "1600 rows")  # their loss curves
PLAN = "plan --preset llama31-8b --memory 16"


def pages() -> dict[str, str]:
    """Every page with generated parts, by its path, as it should be now."""
    written = {name: fill(name, (ROOT / name).read_text("utf-8")) for name in PARTS}
    figures = [page_parts.figure(name) for name in ("sizes", "differences", "loss_curves")]
    return written | {"docs/study.md": report.markdown(_read(STUDY), figures, speed=False)}


def fill(page: str, text: str) -> str:
    """The page's text with its generated parts made anew. Stops if the page lacks a pair of markers."""
    for name, render in PARTS[page].items():
        start, end = START.format(name), END.format(name)
        if text.count(start) != 1 or text.count(end) != 1:
            raise SystemExit(f"error: {page} needs the markers of '{name}', once each. Fix: {start} and {end}.")
        before, after = text.split(start)[0], text.split(end)[1]
        text = f"{before}{start}\n\n{render()}\n\n{end}{after}"
    return text


# README.md


def _badge() -> str:
    return _head(_notebook_paths()[0])[1]


def _answer() -> str:
    """The first of the study's questions, answered by the base model and by the last experiment."""
    result = _read(STUDY)
    entry, line = result.answers[0], result.table[-1]
    run = RunFolder(ROOT / "results" / STUDY / line.run)
    used, metrics = run.read("config.json")["config"], run.read("metrics.json")
    said = {"base model in 4 bits": entry[BASE], "fine-tuned": entry[line.name]}
    cells = [[name, _code(textwrap.shorten(text, ANSWER, placeholder=" …"))] for name, text in said.items()]
    return page_parts.join(
        markdown_table(["", entry["prompt"]], cells),
        page_parts.wrap(
            f"Model `{used['model']}`, preset `{used['preset_name']}` on {metrics['train_rows']:,} rows, "
            f"{result.device['name']}, {result.device['dtype']}, seed {used['seed']}; greedy decoding, at "
            f"most {used['max_new_tokens']} new tokens, of which the beginning is shown. This is the first of the "
            f"{len(result.answers)} recorded questions, not a selected one."
        ),
    )


def _notebooks() -> str:
    """Every notebook with its title and badge, and its time in the CPU series."""
    series = [json.loads((ROOT / "results" / name / "series.json").read_text("utf-8")) for name in CPUS]
    rows = []
    for path in _notebook_paths():
        title, badge = _head(path)
        times = [_clock(run["seconds"].get(path.stem)) for run in series]
        rows.append([f"[{path.stem[:2]}](notebooks/{path.name})", title, *times, badge])
    rows.append(["", "the series that `make run` executes", *(_clock(run["total"]) for run in series), ""])
    return markdown_table(["", "notebook", *(run["device"]["name"] for run in series), ""], rows)


def _notebook_paths() -> list[Path]:
    return sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def _head(path: Path) -> tuple[str, str]:
    """A notebook's title without its number, and its badge, which names the repository."""
    source = "".join(json.loads(path.read_text("utf-8"))["cells"][0]["source"])
    title = re.search(r"^# \d\d · (.+)$", source, re.MULTILINE)
    badge = re.search(r"^\[!\[.*colab-badge.*$", source, re.MULTILINE)
    if title is None or badge is None:
        raise SystemExit(f"error: {path.name} has no title or no badge. Fix: see CONTRIBUTING.md.")
    return title[1], badge[0]


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _findings() -> str:
    """What the study found, and its table."""
    result = _read(STUDY)
    rows = []
    for line in result.table:
        cells = ["–"] * 3
        if line.seeds:
            best = _difference(result, result.best_rival[line.name], line.name)
            against = f"{best.value:+.4f} ({best.low:+.4f} to {best.high:+.4f}): {best.verdict}"
            cells = [f"{line.steps:,.0f}", f"{line.train_loss:.4f}", against]
        rows.append([line.name, *cells[:2], f"{line.heldout_loss:.4f}", cells[2]])
    heads = ["", "steps", "training loss", "held-out loss", "difference from the best rival (95% interval)"]
    draws = f"{', '.join(f'{line.name}: {line.draws} draws' for line in result.table if line.seeds)}."
    return page_parts.join(" ".join(_sentences(result)), markdown_table(heads, rows), f"{_made(result)} {draws}")


def _sentences(result: Comparison) -> list[str]:
    """What the study found. Each sentence is checked against the verdicts: results that say otherwise stop this."""
    lines = {line.name: line for line in result.table}
    trained = [line for line in result.table if line.seeds]
    best = min(trained, key=lambda line: line.heldout_loss)
    lowest = min(trained, key=lambda line: line.train_loss)
    (rival,) = set(result.best_rival.values())
    data, cost = _difference(result, SMALL, LARGE), result.quantizing
    ends = {name: lines[name].text["ends by itself"].value for name in (BASE, FEW_SHOT, best.name)}
    _require(_difference(result, BASE, FIRST).verdict == "better", "fine-tuning lowers the loss of the 4-bit model")
    _require(cost is not None and cost.verdict == "worse", "quantizing costs something")
    _require(rival == OWN_TEMPLATE[IN_16_BITS], "the model as downloaded is the best rival")
    _require(data.verdict == "better" and lines[SMALL].steps == lines[LARGE].steps, "more data helps")
    _require(lowest.heldout_loss == max(line.heldout_loss for line in trained), "the training loss misleads")
    _require(not any(change.verdict == "worse" for change in result.forgetting), "no loss on general questions rises")
    return [
        f"Fine-tuning `{result.model['name']}` in 4 bits on {lines[FIRST].train_rows:.0f} rows lowered its held-out "
        f"loss from {lines[BASE].heldout_loss:.4f} to {lines[FIRST].heldout_loss:.4f}. But quantizing had raised it by "
        f"{cost.value:.4f}, and the model as downloaded, in 16 bits and in its own chat template, has "
        f"{lines[rival].heldout_loss:.4f}. {_pays(result, trained)}",
        f"More data helped beyond more steps: after {lines[LARGE].steps:.0f} steps each, {LARGE} beat "
        f"{SMALL.partition(',')[0]} by {-data.value:.4f} (95% interval {-data.high:.4f} to {-data.low:.4f}).",
        f"The training loss points to the wrong run: it is lowest for {lowest.name.replace(', ', ' and ')}, which "
        "has the highest held-out loss of all adapters.",
        f"On {result.forgetting[0].rows} general questions, no mean loss rose distinguishably "
        f"({_range(result.forgetting)}). Of the answers, {ends[best.name]:.0%} ended within the token limit for "
        f"{best.name} (base model: {ends[BASE]:.0%}; with three examples: {ends[FEW_SHOT]:.0%}).",
    ]


def _pays(result: Comparison, trained: list[Summary]) -> str:
    """At which number of rows an adapter of the recipe's own epochs is better than every rival."""
    against = {line.name: _difference(result, result.best_rival[line.name], line.name) for line in trained}
    plain = [line for line in trained if "," not in line.name]
    by_verdict = {
        verdict: [f"{line.train_rows:,.0f}" for line in plain if against[line.name].verdict == verdict]
        for verdict in ("worse", UNSURE, "better")
    }
    _require(all(by_verdict.values()), "an adapter is worse, then not distinguishable, then better")
    worse, unsure, better = (" and ".join(rows) for rows in by_verdict.values())
    last = against[plain[-1].name]
    return (
        f"Against that model, adapters of {worse} rows are worse, those of {unsure} rows are not distinguishable, and "
        f"with {better} rows fine-tuning pays: {-last.value:.4f} lower (95% interval {-last.high:.4f} to "
        f"{-last.low:.4f})."
    )


def _range(changes: list[Difference]) -> str:
    """The smallest and the largest change, and how far up the intervals reach."""
    values = sorted(change.value for change in changes)
    highest = max(change.high for change in changes)
    return f"changes of {values[0]:+.4f} to {values[-1]:+.4f}, 95% intervals up to {highest:+.4f}"


def _difference(result: Comparison, a: str, b: str) -> Difference:
    return next(change for change in result.differences if (change.a, change.b) == (a, b))


def _require(holds: bool, claim: str) -> None:
    if not holds:
        raise SystemExit(
            f"error: results/ no longer say that {claim}. Fix: rewrite that sentence in tooling/publish.py."
        )


def _plan_answer() -> str:
    """What the plan concludes, without its table and times."""
    return f"```text\n{_plan_printed().split(chr(10) * 2)[1]}\n```"


# docs/


def _results() -> str:
    sections = [_section(name, title) for name, title in TITLES.items()]
    return "\n\n".join([_recipe(), _study(), *sections, _claims(), _evaluation(), _memory(), _cpu()])


def _recipe() -> str:
    """What was trained, from the preset and the study's own runs."""
    used = RunFolder(ROOT / "results" / BF16).read("config.json")["config"]
    trained = [line for line in _read(STUDY).table if line.seeds]
    sizes = [f"{line.train_rows:,.0f}" for line in trained if "," not in line.name]
    longer = [f"{line.train_rows:.0f}" for line in trained if "," in line.name]
    spread = json.loads((ROOT / "results" / STUDY / "spread.json").read_text("utf-8"))
    return page_parts.wrap(
        f"The recipe is that of the preset [`{used['preset_name']}`](presets.md): r = {used['rank']} on "
        f"{' and '.join(f'`{name}`' for name in used['target_modules'])}, {used['max_length']} tokens, effective batch "
        f"{used['batch_size'] * used['gradient_accumulation']}, {used['epochs']} epochs. It is trained on "
        f"{', '.join(sizes[:-1])} and {sizes[-1]} rows of real conversations, and on {' and '.join(longer)} for as "
        f"many steps as {LARGE}; each number of rows in several draws, each with its own training seed. The two "
        f"standard deviations of the held-out loss: {spread['draws and seeds']:.4f} nats over draws of {FIRST} with "
        f"their seeds, {spread['seeds']:.4f} over seeds of one draw. Command: `python benchmarks/study.py FILE --out "
        "DIR --larger-draws 5`"
    )


def _study() -> str:
    result = _read(STUDY)
    parts = [
        "## SmolLM2-135M-Instruct, bf16: when does a fine-tune pay?",
        report.table_markdown(result, speed=False),
        f"![Held-out loss against the number of training rows]({page_parts.figure('sizes')})",
        report.verdicts_markdown(result),
        f"![Differences in held-out loss with 95% intervals]({page_parts.figure('differences')})",
        f"![Training and held-out loss of each experiment]({page_parts.figure('loss_curves')})",
        "Greedy answers to the held-out questions, with 95% intervals (first seed):",
        report.text_table_markdown(result),
        report.bullets(report.forgetting(result)),
        _made(result),
    ]
    return page_parts.join(*parts)


def _section(name: str, title: str) -> str:
    result = _read(name)
    more = _arithmetic() if FP16.startswith(name) else []
    return page_parts.join(f"## {title}", report.table_markdown(result), _made(result), *more)


def _arithmetic() -> list[str]:
    """The training losses of both dtypes, step beside step."""
    losses = [[line["loss"] for line in _log(run) if "loss" in line] for run in (FP16, BF16)]
    apart = [abs(a - b) for a, b in zip(*losses, strict=True)]
    skipped = sum("loss" in line and not math.isfinite(line["grad_norm"]) for line in _log(FP16))
    return [
        f"Step by step, the {len(apart)} training losses of 100 rows in fp16 differ from those in bf16 by "
        f"{sum(apart) / len(apart):.4f} on average and by {max(apart):.4f} at most; {skipped} steps were skipped:",
        f"![Losses of the same run in bf16 and in fp16]({page_parts.figure('arithmetic')})",
    ]


def _claims() -> str:
    """Claims of a published report beside what was measured."""
    folder = ROOT / "results" / CLAIMS
    judged = json.loads((folder / "claims.json").read_text("utf-8"))
    run = RunFolder(folder / "rank-14")
    recipe, rows = run.config(), run.read("metrics.json")["train_rows"]
    return page_parts.join(
        "## Claims of the BLOOM report, tested",
        f"The recipe of the report on BLOOM (alpha {recipe.alpha}, {recipe.epochs} epochs; here on {rows} rows), "
        "applied to SmolLM2-135M-Instruct because BLOOM's weights were not available. SmolLM2 has no biases, so "
        "zero biases were added. The smaller model is SmolLM2 without the three blocks whose removal raises the "
        "loss on training rows least. Command: `python benchmarks/claims.py FILE --out DIR`",
        markdown_table(["claim", "measured", "the claim is"], [[f["claim"], f["text"], f["claim_is"]] for f in judged]),
        f"{judged[0]['rows']} held-out rows, {judged[0]['seeds']} seeds. {_where(run.read('manifest.json'))}.",
    )


def _evaluation() -> str:
    """What the evaluation of a run costs beside its training."""
    run = RunFolder(ROOT / "results" / EVALUATION)
    metrics, used = run.read("metrics.json"), run.read("config.json")["config"]
    return page_parts.join(
        "## What evaluation costs",
        f"Training SmolLM2-135M-Instruct on {metrics['train_rows']} rows for {metrics['steps']} steps: "
        f"{metrics['seconds']:.0f} s and {metrics['peak_memory_gib']:.2f} GiB. Evaluation, that is the losses of "
        f"{used['n_heldout']} held-out rows, {used['n_answers']} answers to their questions, and the general "
        f"questions: {metrics['eval_seconds']:.0f} s and {metrics['eval_peak_memory_gib']:.2f} GiB. "
        f"{_where(run.read('manifest.json'))}.",
    )


def _memory() -> str:
    """How far the memory plan was off, moment by moment, on what it was fitted to and on what it was not."""
    lines = measurements.read("settings")
    rows = []
    for scored, words in ((False, "used for fitting"), (True, "held back for scoring")):
        chosen = [line for line in lines if line["scored_only"] == scored]
        scores = [
            measurements.score(chosen, moments)
            for moments in (measurements.MOMENTS, *((m,) for m in measurements.MOMENTS))
        ]
        rows.append([f"{len(chosen)} {words}", *(f"{f['median']:.1%}, {f['worst']:.1%}" for f in scores)])
    return page_parts.join(
        "## Planned and measured peak memory",
        "Error of the plan against the peak memory that torch reserved, median and worst:",
        markdown_table(["settings", "peak of the run", "training", "held-out losses", "answers"], rows),
        f"{len({line['model'] for line in lines})} models' shapes with random weights, {lines[0]['device']}; "
        f"{page_parts.packages(lines[0])}.",
        f"![Planned and measured memory]({page_parts.figure('memory')})",
    )


def _cpu() -> str:
    """Two kinds of CPU: minutes of the series, and training beside TRL's."""
    speeds = [json.loads((ROOT / "results" / name / "speed.json").read_text("utf-8")) for name in CPUS]
    rows = []
    for name, speed in zip(CPUS, speeds, strict=True):
        series = json.loads((ROOT / "results" / name / "series.json").read_text("utf-8"))
        rates, dtype, gflops = speed["tokens_per_second"], speed["device"]["dtype"], speed["gflops"]
        trl = max(rate for contender, rate in rates.items() if contender in [f"TRL, {known}" for known in gflops])
        cells = [
            series["device"]["name"],
            dtype,
            ", ".join(f"{value:.0f}" for value in gflops.values()),
            _clock(series["total"]),
            f"{rates[f'this package, {dtype}']:.0f} tokens/s",
            f"{trl:.0f} tokens/s",
            f"{speed['times_trl']:.2f}",
            f"{speed['times_trl_without_checkpointing']:.2f}",
        ]
        rows.append(cells)
    heads = ["CPU", "dtype", "GFLOP/s float32, bfloat16", "notebooks 01–07", "this package", "TRL", "ratio", "ratio*"]
    return page_parts.join(
        "## On a CPU",
        "SmolLM2-135M in NF4 on 24 sample rows, in batches of 4 and with at most 256 tokens, compared with TRL's "
        "`SFTTrainer`: tokens per second without padding, medians of three interleaved rounds. TRL runs with "
        "`use_cpu=True, bf16=False`, otherwise with its defaults, and with the faster dtype; \\*: without its "
        "gradient checkpointing. Command: `python benchmarks/cpu_speed.py --out FILE`",
        markdown_table(heads, rows),
        f"{' '.join(map(_same_losses, speeds))} {'; '.join(dict.fromkeys(map(page_parts.packages, speeds)))}.",
    )


def _same_losses(speed: dict[str, Any]) -> str:
    """How far the losses of a step are from those on padded batches, and how much of it is rounding."""
    dtype = speed["device"]["dtype"]
    most = f"{100 * speed['largest_relative_difference_of_losses']:.2g}%"
    text = f"In {dtype}, every step's loss is within {most} of the loss on padded batches."
    if dtype == "float32":
        return text
    eager, ours, padded = (f"{100 * value:.2g}%" for value in speed["rounding"].values())
    return (
        f"{text} That is rounding: eager attention instead of SDPA changes the padded losses by up to {eager}; "
        f"compared with float32, ours differ by up to {ours} and the padded ones by up to {padded}."
    )


def _presets() -> str:
    rows = []
    for name in preset_names():
        p = load_preset(name)
        rows.append(
            [
                f"[`{name}`](../qlora_helpers/presets/{name}.yaml)",
                p["model"],
                f"{p['n_samples'] or 'all'}",
                f"{p['max_length']}",
                {"none": "16-bit"}.get(p["quantization"], p["quantization"]),
                f"{p['rank']}, {p['alpha']}",
                ", ".join(p["target_modules"]),
                p["bias"],
                f"{p['epochs']}",
                f"{p['batch_size']} × {p['gradient_accumulation']}",
                f"{p['learning_rate']:g}",
            ]
        )
    heads = ["preset", "model", "rows", "tokens", "base", "r, alpha", "layers", "biases", "epochs", "batch × passes"]
    return markdown_table([*heads, "learning rate"], rows)


def _settings() -> str:
    rows = []
    for field in dataclasses.fields(Config):
        if field.name == "preset_name":
            continue
        limits, value = field.metadata, field.default
        low, high = (f"{limits[end]:g}" if limits[end] is not None else "" for end in ("low", "high"))
        allowed = ", ".join(limits["choices"] or []) or (
            f"{low} to {high}" if high else f"{low} or more" if low else ""
        )
        shown = ", ".join(value) if isinstance(value, tuple) else str(value).replace("True", "true")
        rows.append([f"`--{field.name.replace('_', '-')}`", shown.replace("False", "false"), allowed, limits["help"]])
    return markdown_table(["option", "default", "allowed", "meaning"], rows)


def _known() -> str:
    models = sorted(path.stem for path in (ROOT / "qlora_helpers" / "known_models").glob("*.json"))
    return page_parts.join(
        f"{len(models)} models are known offline: {', '.join(f'`{name}`' for name in models)}.",
        markdown_table(
            ["GPU", "memory, GiB", "16-bit TFLOP/s (data sheet)"],
            [[f"`{name}`", f"{gpu.memory:g}", f"{gpu.tflops:g}"] for name, gpu in gpus.GPUS.items()],
        ),
    )


def _plan_output() -> str:
    return f"```text\n{_plan_printed()}\n```"


def _plan_printed() -> str:
    """What the command of the README prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        command_line.main(PLAN.split())
    return "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines())


# Shared


def _code(text: str) -> str:
    """A model's words in a table cell, as they are: no Markdown or HTML of their own takes effect."""
    return f"`{' '.join(text.split()).replace('`', chr(39)).replace('|', '/')}`"


def _made(result: Comparison) -> str:
    device = result.device
    seeds = ", ".join(map(str, max((line.seeds for line in result.table), key=len)))
    rows = f"{result.heldout_rows} held-out rows with {result.heldout_tokens:,} scored tokens."
    return f"{rows} {device['name']}, {device['dtype']}, seeds {seeds}; {page_parts.packages(vars(result))}."


def _where(manifest: dict[str, Any]) -> str:
    return f"{manifest['device']['name']}, {manifest['device']['dtype']}; {page_parts.packages(manifest)}"


def _log(run: str) -> list[dict[str, Any]]:
    return RunFolder(ROOT / "results" / run).log()


def _read(name: str) -> Comparison:
    return comparison.read(ROOT / "results" / name)


PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "badge": _badge,
        "answer": _answer,
        "notebooks": _notebooks,
        "findings": _findings,
        "plan": _plan_answer,
    },
    "docs/results.md": {"results": _results},
    "docs/presets.md": {"presets": _presets},
    "docs/settings.md": {"settings": _settings},
    "docs/speed.md": {"speed": speed_page.tables},
    "docs/scale.md": {"scale": scale_page.table, "killed": scale_page.killed},
    "docs/memory.md": {"plan": _plan_output, "known": _known},
}


def _curve(folder: Path, name: str) -> learning_curve.Curve:
    """The study's sizes with the same epochs or the same steps."""
    trained = {key: [RunFolder(run) for run in sorted(folder.glob(f"{key}-seed*"))] for key in SIZES[name]}
    return learning_curve.build(name, trained)


def main() -> None:
    """All figures, then all pages."""
    result = _read(STUDY)
    runs = {line.name: line.run for line in result.table if line.name in DRAWN}
    logs = {name: _log(f"{STUDY}/{run}") for name, run in runs.items()}
    folder = ROOT / "results" / STUDY
    figures = {
        "passes": plots.pass_seconds(speed_page.pass_seconds()),
        "sizes": learning_curve.figure([_curve(folder, name) for name in SIZES]),
        "differences": differences.figure(result.headlines),
        "loss_curves": plots.loss_curves(logs),
        "memory": plots.planned_and_measured(measurements.read("settings")),
        "arithmetic": plots.loss_curves({"bf16": _log(BF16), "fp16, as on a T4": _log(FP16)}),
    }
    for name, figure in figures.items():
        plots.save(figure, ROOT / "figures" / f"{name}.png")
    for page, text in pages().items():
        (ROOT / page).write_text(text, "utf-8")


if __name__ == "__main__":
    main()
