"""The card that lies beside an adapter: what it is, what it was trained on, how it did, from the run's own files."""

from typing import Any

from qlora_helpers.config import Config

MERGED = """A LoRA adapter, merged into the 16-bit base. The layout of training travels along as the chat template: ask
through `apply_chat_template`, or through a server that applies it."""


def render(config: Config, metrics: dict[str, Any], manifest: dict[str, Any], merged: bool = False) -> str:
    """Markdown with the header that the hub reads: of an adapter, or of a model that it was `merged` into."""
    from huggingface_hub import ModelCardData

    header = ModelCardData(
        base_model=config.model,
        library_name="transformers" if merged else "peft",
        datasets=config.dataset if config.dataset and config.dataset.count("/") == 1 else None,
        tags=["lora", "qlora"],
        pipeline_tag="text-generation" if merged else None,
    ).to_yaml()
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    title = f"{config.model}, fine-tuned" if merged else f"LoRA adapter for {config.model}"
    how = f"\n{MERGED}\n" if merged else ""
    change = metrics["eval_loss"] - metrics["base_eval_loss"]
    return f"""---
{header}
---

# {title}
{how}
Trained on {metrics["train_rows"]} conversations for {metrics["epochs"]} epochs ({metrics["steps"]} steps at an
effective batch of {config.effective_batch}) on {metrics["device"]}, in {metrics["compute_dtype"]}, with seed
{metrics["seed"]}. Base stored as {config.quantization}; r = {config.rank}, alpha = {config.alpha}, on
{", ".join(config.target_modules)}: {metrics["trainable_parameters"]:,} trainable parameters.

| | loss per trained token on {len(manifest["data"]["heldout_ids"])} held-out rows |
|---|---|
| base model | {metrics["base_eval_loss"]:.4f} |
| with this adapter | {metrics["eval_loss"]:.4f} ({change:+.4f}) |

Data: {config.dataset} (fingerprint {manifest["data"]["source_fingerprint"]}), rows in the layout `{config.template}`,
at most {config.max_length} tokens; trained tokens: {config.train_on}.

Limits: one seed, one held-out set, loss only. A lower held-out loss says that the answers' wording fits the data
better; it does not say that they are true. The licence is the base model's.

Versions: {versions}.
"""
