"""Draw figures/ and docs/, and write the README's result tables from results/: no number there is typed by hand."""

from pathlib import Path
from typing import Any

from qlora_helpers import plots, report, runs
from qlora_helpers.runs import RunFolder

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- results: written by make figures -->", "<!-- end of results -->"
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes")
STUDY = "h100-smollm2-study"
TITLES = {
    "h100-smollm2-fp16": "The first two as on a T4: fp16, 14.56 GiB",
    "h100-tinyllama-shape-t4": "TinyLlama's shape with random weights, as on a T4 (its losses mean nothing)",
}


def render() -> str:
    """The README's part between the markers."""
    return "\n\n".join([START, _study(), *(_section(name, title) for name, title in TITLES.items()), END])


def _read(name: str) -> dict[str, Any]:
    return RunFolder(ROOT / "results" / name).read("comparison.json")


def _study() -> str:
    result = _read(STUDY)
    parts = [
        "### SmolLM2-135M-Instruct, bf16: is it the data or the steps?",
        report.table_markdown(result),
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
    return "\n\n".join([f"### {title}", report.table_markdown(result), _made(result)])


def _made(result: dict[str, Any]) -> str:
    device, versions = result["device"], result["versions"]
    packages = ", ".join(f"{package} {versions[package]}" for package in PACKAGES)
    seeds = ", ".join(map(str, result["table"][-1]["seeds"]))
    rows = f"{result['heldout_rows']} held-out rows with {result['heldout_tokens']:,} trained tokens."
    return f"{rows} {device['name']}, {device['dtype']}, seeds {seeds}; {packages}."


def main() -> None:
    """Figures of the study, its whole report in docs/, and the tables of all."""
    folder = ROOT / "results" / STUDY
    result = _read(STUDY)
    logs = {line["name"]: RunFolder(folder / line["run"]).log() for line in result["table"] if line["seeds"]}
    for name, figure in {"differences": plots.differences(result), "loss_curves": plots.loss_curves(logs)}.items():
        plots.save(figure, ROOT / "figures" / f"{name}.png")
    text = report.markdown(result, ["../figures/differences.png", "../figures/loss_curves.png"])
    runs.write_text(ROOT / "docs" / "study.md", text)
    readme = (ROOT / "README.md").read_text("utf-8")
    before, after = readme.split(START)[0], readme.split(END)[1]
    runs.write_text(ROOT / "README.md", before + render() + after)


if __name__ == "__main__":
    main()
