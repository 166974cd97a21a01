"""Draw figures/ and write the README's result tables from results/, so that no number there is typed by hand."""

from pathlib import Path

from qlora_helpers import comparison, plots, runs
from qlora_helpers.runs import RunFolder

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- results: written by make figures -->", "<!-- end of results -->"
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes")
TITLES = {
    "h100-smollm2-bf16": "SmolLM2-135M-Instruct, bf16",
    "h100-smollm2-fp16": "The same as on a T4: fp16, 14.56 GiB",
    "h100-tinyllama-shape-t4": "TinyLlama's shape with random weights, as on a T4 (its losses mean nothing)",
}


def render() -> str:
    """The README's part between the markers."""
    return "\n\n".join([START, *(_section(name, title) for name, title in TITLES.items()), END])


def _section(name: str, title: str) -> str:
    result = RunFolder(ROOT / "results" / name).read("comparison.json")
    device, versions = result["device"], result["versions"]
    verdicts = "\n".join(f"- {d['text']}." for d in result["differences"])
    packages = ", ".join(f"{package} {versions[package]}" for package in PACKAGES)
    made = f"{device['name']}, {device['dtype']}, seed {result['table'][1]['seed']}; {packages}."
    rows = f"{result['heldout_rows']} held-out rows with {result['heldout_tokens']:,} trained tokens."
    parts = [f"### {title}", comparison.table_markdown(result), verdicts, f"{rows} {made}"]
    if "random weights" in title:
        parts.remove(verdicts)
    return "\n\n".join(parts)


def main() -> None:
    """Figures of the first result, and the tables of all."""
    folder = ROOT / "results" / "h100-smollm2-bf16"
    plots.save(plots.differences(RunFolder(folder).read("comparison.json")), ROOT / "figures" / "differences.png")
    logs = {name: RunFolder(folder / name).log() for name in ("exp1", "exp2")}
    plots.save(plots.loss_curves(logs), ROOT / "figures" / "loss_curves.png")
    readme = (ROOT / "README.md").read_text("utf-8")
    before, after = readme.split(START)[0], readme.split(END)[1]
    runs.write_text(ROOT / "README.md", before + render() + after)


if __name__ == "__main__":
    main()
