"""The base model, in 4 bits or 16, and the adapter on it: what is frozen, what is trained, what each part weighs."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed
from transformers.utils import logging as hf_logging

from qlora_helpers.config import Config
from qlora_helpers.device import Device, keep_freed_memory
from qlora_helpers.errors import UserError
from qlora_helpers.models.hub import from_pretrained

ALL_LINEAR = ("all-linear",)

hf_logging.disable_progress_bar()  # the bar for reading a file; downloads keep theirs


def load_base(config: Config, device: Device) -> Any:
    """The frozen base, stored as `config.quantization` says, computing in the device's dtype.

    What is not packed in 4 bits is stored in 16. Where products are in float32, as on most CPUs, those weights are
    converted once, here: same values, and no conversion at every use.
    """
    keep_freed_memory(device)
    dtype = getattr(torch, device.dtype)
    quantization = None
    if config.quantization != "none":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.quantization,
            bnb_4bit_use_double_quant=config.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    base = from_pretrained(
        AutoModelForCausalLM,
        config,
        dtype=getattr(torch, device.storage_dtype),
        quantization_config=quantization,
        device_map={"": 0} if device.kind == "cuda" else None,
        use_safetensors=True,
    )
    _compute_in(base, dtype)
    _keep_trainable_on_cpu(base)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    return base.eval()


def _compute_in(base: Any, dtype: torch.dtype) -> None:
    """Convert what is not packed, and let packed weights unpack to `dtype` at once."""
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            packed: Any = module.weight
            packed.quant_state.dtype = dtype
    for tensor in (*base.parameters(), *base.buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            tensor.data = tensor.data.to(dtype)


def attach_lora(base: Any, config: Config) -> Any:
    """Put a fresh adapter on the base. The seed is set first, so equal seeds give equal first weights.

    Raises `UserError` if the model has no layer of an asked-for name.
    """
    check_targets(base, config)
    targets = "all-linear" if config.target_modules == ALL_LINEAR else list(config.target_modules)
    set_seed(config.seed)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        bias=config.bias,  # type: ignore[arg-type]
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, lora)
    train_in_float32(model)
    if config.bias != "none":
        keep_biases(model)
    return model


def keep_biases(model: Any) -> None:
    """Biases to float32, and to stay there: those of an adapter that has some would else be rounded to 16 bits."""
    for module in model.modules():
        if isinstance(getattr(module, "bias", None), torch.nn.Parameter):
            module.bias.data = module.bias.data.float()
            if type(module) is bnb.nn.Linear4bit:
                module.__class__ = TrainedBias


class TrainedBias(bnb.nn.Linear4bit):
    """A 4-bit layer whose bias is trained. The library's own casts the bias to 16 bits in place at every call: bf16 is
    too coarse for small steps, and the fp16 gradient scaler refuses it.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The library's product, and the bias in float32 until it is added."""
        bias: Any = self.bias
        self.bias = None  # type: ignore[assignment]
        try:
            return super().forward(x) + bias.to(x.dtype)
        finally:
            self.bias = bias


def check_targets(base: Any, config: Config) -> None:
    """Raise `UserError` if the model has no linear layer of an asked-for name; lists those it has."""
    if config.target_modules == ALL_LINEAR:
        return
    head = base.get_output_embeddings()
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    for target in config.target_modules:
        if target not in linear:
            raise UserError(
                f"target_modules: {config.model} has no linear layer '{target}'. "
                f"Fix: choose from {', '.join(sorted(linear))}, or all-linear."
            )


def save_biases(model: Any, folder: Path) -> None:
    """Put trained biases into the adapter that was saved in `folder` a moment ago, where they are missing: PEFT up to
    0.20 looks for those of `lora_only` under a name that they no longer have.
    """
    file = folder / "adapter_model.safetensors"
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    if trained and not trained.keys() <= (saved := load_file(file)).keys():
        save_file({name: p.cpu().contiguous() for name, p in (saved | trained).items()}, file, {"format": "pt"})


def load_adapter(base: Any, adapter: Path) -> Any:
    """A saved adapter on the base it was trained on, ready for answers and losses."""
    check_saved(adapter)
    if LoraConfig.from_pretrained(str(adapter)).bias != "none":
        keep_biases(base)
    return PeftModel.from_pretrained(base, adapter).eval()


@dataclass(frozen=True)
class Adapters:
    """One base in memory with several adapters on it, of which one at a time works, or none."""

    model: Any
    names: dict[str, str]  # what PEFT calls each: its own names may hold no dot

    @contextmanager
    def use(self, name: str | None) -> Iterator[Any]:
        """The model with the adapter `name`, or the base alone for None, for the length of a `with`."""
        if name is None:
            with self.model.disable_adapter():
                yield self.model
        else:
            self.model.set_adapter(self.names[name])
            yield self.model


def load_adapters(base: Any, adapters: dict[str, Path]) -> Adapters:
    """Saved adapters by name on the one base they were trained on, ready for answers and losses.

    Raises `UserError` for one that also trained biases: they are the base's own, so it could not be switched off.
    """
    for path in adapters.values():
        check_saved(path)
        bias = getattr(PeftConfig.from_pretrained(str(path)), "bias", "none")
        if bias != "none":
            raise UserError(
                f"adapter: {path} holds biases of the base too (bias={bias}), which stay when another adapter is "
                "switched on. Fix: ask it alone, or train it with bias=none."
            )
    names = {name: f"adapter_{number}" for number, name in enumerate(adapters)}
    (first, path), *others = adapters.items()
    model = PeftModel.from_pretrained(base, path, adapter_name=names[first])
    for name, path in others:
        model.load_adapter(path, adapter_name=names[name])
    return Adapters(model.eval(), names)


def check_saved(adapter: Path) -> None:
    """Raise `UserError` if the folder holds no adapter."""
    if not (adapter / "adapter_model.safetensors").exists():
        raise UserError(f"adapter: {adapter} holds none. Fix: run the notebook that trains it to its end.")


def train_in_float32(model: Any) -> None:
    """Trainable weights to float32. The fp16 gradient scaler has no kernel for bf16, to which TRL casts them."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def trainable_per_layer(model: Any) -> dict[str, int]:
    """Trainable parameters by the layer they sit on, such as `q_proj`, summed over the blocks."""
    counts: dict[str, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            owner = name.split(".lora_")[0] if ".lora_" in name else name.rsplit(".", 1)[0]
            counts[owner.rsplit(".", 1)[-1]] += parameter.numel()
    return dict(counts)


def weight_table(model: Any) -> list[dict[str, Any]]:
    """Parameters and bytes as stored, by module class; 4-bit weights count with their quantization constants.

    Frozen weights that are not packed count in the dtype they were loaded in, not in that of the products: see
    `load_base`.
    """
    stored = model.config.dtype.itemsize
    table: dict[str, dict[str, Any]] = {}
    output = model.get_output_embeddings()
    seen: set[int] = set()
    for module in model.modules():
        label = "output head" if module is output else type(module).__name__
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:  # an output head may share the embeddings' weights
                continue
            seen.add(id(parameter))
            row = table.setdefault(label, {"module": label, "parameters": 0, "bytes": 0})
            row["parameters"] += true_size(parameter)
            row["bytes"] += _stored_bytes(parameter, stored)
    return sorted(table.values(), key=lambda row: -row["bytes"])


def round_trip(weight: torch.Tensor, quantization: str, double_quant: bool) -> torch.Tensor:
    """A weight matrix after going to 4 bits and back, in float32."""
    packed, state = bnb.functional.quantize_4bit(
        weight.float().contiguous(), quant_type=quantization, compress_statistics=double_quant
    )
    return bnb.functional.dequantize_4bit(packed, state).float()


def four_bit_levels(quantization: str) -> list[float]:
    """The 16 values a 4-bit weight can take, as shares of the largest weight in its block of 64."""
    return sorted(bnb.functional.get_4bit_type(quantization, device="cpu").tolist())


def true_size(parameter: Any) -> int:
    """Number of weights: a 4-bit tensor packs two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else parameter.numel()


def _stored_bytes(parameter: Any, itemsize: int) -> int:
    state = getattr(parameter, "quant_state", None)
    frozen = state is None and not parameter.requires_grad
    size = parameter.numel() * (itemsize if frozen else parameter.element_size())
    if state is not None:
        size += state.absmax.numel() * state.absmax.element_size()
        if state.nested:
            size += state.state2.absmax.numel() * state.state2.absmax.element_size()
    return size


def _keep_trainable_on_cpu(base: Any) -> None:
    """On CPUs with AVX512_BF16, bitsandbytes repacks 4-bit weights at the first evaluation, on a path without
    gradients: training would go on without learning. This keeps the path that has them.
    """
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
