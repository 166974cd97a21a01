"""How the base model is stored: by method, and whether the model allows it. This needs its config, but no weights."""

from typing import Any

from qlora_helpers.config import UNPACKED, Config
from qlora_helpers.errors import UserError, nearest
from qlora_helpers.planning import architectures

METHODS = ("qlora", "lora", "full")


def method_of(config: Config) -> str:
    """Return the method of a config: qlora if the base model is quantized, else lora."""
    return "lora" if config.quantization == "none" else "qlora"


def of_method(config: Config, method: str | None) -> Config:
    """Return the config with the quantization of `method`, None for its own. Raises `UserError` for an unknown one."""
    if method not in (None, *METHODS):
        raise UserError(f"unknown method '{method}'.{nearest(str(method), METHODS)}")
    if (method or method_of(config)) != "qlora":
        return config.replace(quantization="none")
    return config if config.quantization != "none" else config.replace(quantization="nf4")


def check(config: Config) -> None:
    """Raise `UserError` if the config's model cannot be trained in its quantization: see `refusal`."""
    if reason := refusal(config):
        raise UserError(reason)


def refusal(config: Config) -> str | None:
    """Return why the config's model cannot be trained in its quantization, in one line with a fix, or None.

    A checkpoint that is quantized already stays as it is, so the settings have to say the same. Other models need
    linear layers: bitsandbytes leaves everything else in 16 bits. Raises `UserError` if the model's config cannot be
    loaded, or if transformers does not know its model type.
    """
    stored = architectures.read(config.model, config.revision).get("quantization_config")
    if stored:
        return _of_stored(config, stored if isinstance(stored, dict) else {})
    if config.quantization == "none":
        return None
    shape = architectures.load(config.model, config.revision)
    share = 1 - shape.packable / shape.matrices
    if share <= UNPACKED:
        return None
    return (
        f"quantization: {share:.0%} of the weights of {config.model}, embeddings aside, are not in linear layers that "
        f"bitsandbytes packs, such as experts, and would stay in 16 bits. Fix: quantization=none, or another model."
    )


def _of_stored(config: Config, stored: dict[str, Any]) -> str | None:
    method = str(stored.get("quant_method") or "bitsandbytes")
    if method != "bitsandbytes" or not stored.get("load_in_4bit"):
        kind = "8-bit bitsandbytes" if method == "bitsandbytes" else method
        return (
            f"quantization: {config.model} is stored in {kind}, which is not supported here. "
            "Fix: use the 16-bit model that it was made from."
        )
    kind, double = str(stored.get("bnb_4bit_quant_type", "fp4")), bool(stored.get("bnb_4bit_use_double_quant", False))
    if config.quantization == kind and config.double_quant == double:
        return None
    return (
        f"quantization: {config.model} is stored in 4 bits already and stays as it is. "
        f"Fix: quantization={kind}, double_quant={str(double).lower()}."
    )
