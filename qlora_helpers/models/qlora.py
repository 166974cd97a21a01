"""Attach LoRA adapters to a base model, load saved ones, and switch between them.

What `base` and `weights` do for the base model is available under the name of this module too.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from safetensors.torch import load_file, save_file
from transformers import set_seed
from transformers.pytorch_utils import Conv1D

from qlora_helpers import parse, runs
from qlora_helpers.config import Config
from qlora_helpers.errors import UserError
from qlora_helpers.models import links
from qlora_helpers.models.base import four_bit_share, load_base, quantization_config  # noqa: F401
from qlora_helpers.models.weights import (  # noqa: F401
    four_bit_levels,
    round_trip,
    trainable_per_layer,
    true_size,
    weight_table,
)

ALL_LINEAR = ("all-linear",)
# What `attach_lora` sets, and what PEFT adds. Other settings make PEFT import modules or read files that they name.
OWN_SETTINGS = {
    "peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "bias", "base_model_name_or_path",
    "revision", "inference_mode", "fan_in_fan_out", "peft_version",
}  # fmt: skip


def lora_config(config: Config) -> LoraConfig:
    """Return the shape of the adapter, as PEFT takes it."""
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules="all-linear" if config.target_modules == ALL_LINEAR else list(config.target_modules),
        bias=config.bias,  # type: ignore[arg-type]
        task_type="CAUSAL_LM",
    )


def attach_lora(base: Any, config: Config, lora: LoraConfig | None = None) -> Any:
    """Attach a new LoRA adapter to the base model. The same `config.seed` gives the same initial weights.

    `lora` is that of `lora_config` unless it is given. Raises `UserError` if the model has no linear layer with one of
    the names in `config.target_modules`.
    """
    check_targets(base, config)
    set_seed(config.seed)
    model = get_peft_model(base, copy.deepcopy(lora or lora_config(config)))  # PEFT changes it
    train_in_float32(model)
    if config.bias != "none":
        keep_biases(model)
    return model


def keep_biases(model: Any) -> None:
    """Convert all biases to float32 and keep them there. Otherwise trained biases would be rounded to 16 bits."""
    for module in model.modules():
        if isinstance(getattr(module, "bias", None), torch.nn.Parameter):
            module.bias.data = module.bias.data.float()
            if type(module) is bnb.nn.Linear4bit:
                module.__class__ = TrainedBias


class TrainedBias(bnb.nn.Linear4bit):
    """A 4-bit linear layer with a trainable bias.

    bitsandbytes casts the bias to 16 bits in place at every call. bfloat16 is too coarse for small update steps, and
    the fp16 gradient scaler rejects a 16-bit bias.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply as bitsandbytes does, then add the bias, which stays in float32 until the addition."""
        bias: Any = self.bias
        self.bias = None  # type: ignore[assignment]
        try:
            return super().forward(x) + bias.to(x.dtype)
        finally:
            self.bias = bias


def check_targets(base: Any, config: Config) -> None:
    """Raise `UserError`, with the names that there are, if one in `config.target_modules` is no linear layer's."""
    if config.target_modules == ALL_LINEAR:
        return
    known = {path.rpartition(".")[2] for path in _linear_layers(base)}
    for target in config.target_modules:
        if target not in known:
            raise UserError(
                f"target_modules: {config.model} has no linear layer '{target}'. Fix: choose from "
                f"{', '.join(sorted(known))}, or all-linear; usual: {', '.join(usual_targets(base))}."
            )


def usual_targets(base: Any) -> list[str]:
    """Return the names of the layers that usually get an adapter.

    These are PEFT's for the model type if it has any, else queries and values as in the LoRA paper (Hu et al., 2021),
    else all linear layers of the attention, else all.
    """
    paths = _linear_layers(base)
    known = {path.rpartition(".")[2] for path in paths}
    for usual in (PEFT_TARGETS.get(base.config.model_type), ["q_proj", "v_proj"]):
        if isinstance(usual, list) and known.issuperset(usual):
            return usual
    attention = {name for parent, _, name in (path.rpartition(".") for path in paths) if "att" in parent}
    return sorted(attention or known)


def _linear_layers(base: Any) -> list[str]:
    """Return the paths of the layers that PEFT adapts with all-linear: every linear layer except the output head."""
    head = base.get_output_embeddings()
    layers = ((path, module) for path, module in base.named_modules() if module is not head)
    return [path for path, module in layers if isinstance(module, torch.nn.Linear | Conv1D)]


def save_biases(model: Any, folder: Path) -> None:
    """Add trained biases that are missing from the adapter just saved in `folder`.

    PEFT up to 0.20 omits the biases of `bias="lora_only"`, because it looks for them under outdated names.
    """
    file = folder / "adapter_model.safetensors"
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    if trained and not trained.keys() <= (saved := load_file(file)).keys():
        save_file({name: p.cpu().contiguous() for name, p in (saved | trained).items()}, file, {"format": "pt"})


def load_adapter(base: Any, adapter: Path) -> Any:
    """Load a saved adapter onto its base model, in evaluation mode. Raises `UserError` if the folder contains none."""
    check_adapter(adapter)
    if LoraConfig.from_pretrained(str(adapter)).bias != "none":
        keep_biases(base)
    return PeftModel.from_pretrained(base, adapter).eval()


@dataclass(frozen=True)
class Adapters:
    """A base model in memory with several adapters, of which at most one is active at a time."""

    model: Any
    names: dict[str, str]  # name of each adapter inside PEFT, which allows no dots in names

    @contextmanager
    def use(self, name: str | None) -> Iterator[Any]:
        """Context manager: activate the adapter `name`, or no adapter if `name` is None, and yield the model."""
        if name is None:
            with self.model.disable_adapter():
                yield self.model
        else:
            self.model.set_adapter(self.names[name])
            yield self.model


def load_adapters(base: Any, adapters: dict[str, Path]) -> Adapters:
    """Load several saved adapters onto the base model they were trained on, in evaluation mode.

    Raises `UserError` if a folder contains no adapter, or if an adapter includes trained biases: these replace the
    base model's biases, so the adapter could not be switched off.
    """
    for path in adapters.values():
        check_adapter(path)
        if (bias := LoraConfig.from_pretrained(str(path)).bias) != "none":
            raise UserError(
                f"adapter: {path} includes trained biases of the base model (bias={bias}), which would stay active "
                "after switching to another adapter. Fix: load it alone, or train it with bias=none."
            )
    names = {name: f"adapter_{number}" for number, name in enumerate(adapters)}
    (first, path), *others = adapters.items()
    model = PeftModel.from_pretrained(base, path, adapter_name=names[first])
    for name, path in others:
        model.load_adapter(path, adapter_name=names[name])
    return Adapters(model.eval(), names)


def check_adapter(adapter: Path) -> None:
    """Raise `UserError` if the folder contains no adapter, or one that is not as this package wrote it.

    Only plain LoRA with the settings of `attach_lora` is loaded, because PEFT 0.19 imports the module that
    `megatron_core` names. PEFT ignores keys that it does not know.
    """
    if not (adapter / "adapter_model.safetensors").exists():
        raise UserError(f"adapter: {adapter} holds none. Fix: run the notebook that trains it to the end.")
    links.check(adapter.iterdir(), adapter.parent)
    saved = parse.json_object(adapter / "adapter_config.json", "adapter", fix="Fix: train again.")
    plain = LoraConfig().to_dict()
    other = [key for key in plain if key not in OWN_SETTINGS and saved.get(key) and saved[key] != plain[key]]
    other += ["another peft_type"] if saved.get("peft_type") != "LORA" else []
    other += ["a pattern as target_modules"] if not isinstance(saved.get("target_modules"), list) else []
    if other:
        raise UserError(
            f"adapter: {adapter} sets {other[0]}, which is not supported. Fix: if you trust it, use PEFT itself."
        )
    runs.check_adapter(adapter)


def train_in_float32(model: Any) -> None:
    """Convert trainable weights to float32: TRL casts them to bfloat16, for which the fp16 scaler has no kernel."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
