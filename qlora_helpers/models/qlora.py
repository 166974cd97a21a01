"""Load the base model in 4 or 16 bits, attach LoRA adapters, and report what is trained and how large each part is."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as hf_logging

from qlora_helpers.config import UNPACKED, Config
from qlora_helpers.device import Device, keep_freed_memory
from qlora_helpers.errors import UserError
from qlora_helpers.models.hub import from_pretrained

ALL_LINEAR = ("all-linear",)

hf_logging.disable_progress_bar()  # hides the bar for reading weights; downloads keep theirs


def load_base(config: Config, device: Device) -> Any:
    """Load the frozen base model, quantized as `config.quantization` says and computing in the device's dtype.

    Weights that are not quantized to 4 bits are stored in 16 bits. If the device computes in float32, as most CPUs do,
    these weights are converted once, here. Their values stay the same, and no conversion is needed at each use.

    Raises `UserError` if the model cannot be loaded, or if it is not stored as the config says.
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
    check_quantized(base, config)
    _compute_in(base, dtype)
    _keep_trainable_on_cpu(base)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    return base.eval()


def check_quantized(base: Any, config: Config) -> None:
    """Raise `UserError` unless the model is stored as `config.quantization` says.

    bitsandbytes quantizes linear layers only: experts stored as one three-dimensional tensor stay in 16 bits. A model
    that was saved in 4 bits keeps the type that it was saved with.
    """
    states = (getattr(parameter, "quant_state", None) for parameter in base.parameters())
    types = {state.quant_type for state in states if state is not None}
    wanted = set() if config.quantization == "none" else {config.quantization}
    if types - wanted:
        stored = " and ".join(sorted(types))
        raise UserError(
            f"quantization: {config.model} is stored in {stored}, not {config.quantization}. "
            f"Fix: quantization={stored}."
        )
    share = four_bit_share(base)
    if wanted and 1 - share > UNPACKED:
        raise UserError(
            f"quantization: only {share:.0%} of the weights of {config.model} outside its embeddings can be stored in "
            "4 bits; its other weights are not in linear layers. Fix: quantization=none, or another model."
        )


def four_bit_share(base: Any) -> float:
    """Return the share of the weights stored in 4 bits, among those outside the embeddings and the output head."""
    head = base.get_output_embeddings()
    apart = [m for m in base.modules() if isinstance(m, torch.nn.Embedding) or m is head]
    excluded = {id(parameter) for module in apart for parameter in module.parameters()}
    sizes = {False: 0, True: 0}
    for parameter in base.parameters():
        if id(parameter) not in excluded:
            sizes[getattr(parameter, "quant_state", None) is not None] += true_size(parameter)
    return sizes[True] / max(sum(sizes.values()), 1)


def _compute_in(base: Any, dtype: torch.dtype) -> None:
    """Convert unquantized weights to `dtype`, and make quantized weights dequantize directly to `dtype`."""
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            packed: Any = module.weight
            packed.quant_state.dtype = dtype
    for tensor in (*base.parameters(), *base.buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            tensor.data = tensor.data.to(dtype)


def attach_lora(base: Any, config: Config) -> Any:
    """Attach a new LoRA adapter to the base model. The same `config.seed` gives the same initial weights.

    Raises `UserError` if the model has no linear layer with one of the names in `config.target_modules`.
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
    """Raise `UserError` if a name in `config.target_modules` matches no linear layer.

    The message lists the names of the linear layers, and those that usually get an adapter.
    """
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
    """Load a saved adapter onto the base model it was trained on, in evaluation mode.

    Raises `UserError` if the folder contains no adapter.
    """
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
        bias = getattr(PeftConfig.from_pretrained(str(path)), "bias", "none")
        if bias != "none":
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
    """Raise `UserError` if the folder contains no adapter."""
    if not (adapter / "adapter_model.safetensors").exists():
        raise UserError(f"adapter: {adapter} holds none. Fix: run the notebook that trains it to the end.")


def train_in_float32(model: Any) -> None:
    """Convert trainable weights to float32.

    TRL casts them to bfloat16, for which the fp16 gradient scaler has no kernel.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def trainable_per_layer(model: Any) -> dict[str, int]:
    """Count trainable parameters per layer name, such as `q_proj`, summed over all transformer blocks."""
    counts: dict[str, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer = name.split(".lora_")[0] if ".lora_" in name else name.rsplit(".", 1)[0]
            counts[layer.rsplit(".", 1)[-1]] += parameter.numel()
    return dict(counts)


def weight_table(model: Any) -> list[dict[str, Any]]:
    """Return parameters and stored bytes per module class, largest first.

    Each row has the keys `module`, `parameters` and `bytes`. The bytes of 4-bit weights include their quantization
    constants. Frozen unquantized weights count in the dtype they were loaded in, which can be smaller than the compute
    dtype: see `load_base`.
    """
    itemsize = model.config.dtype.itemsize
    table: dict[str, dict[str, Any]] = {}
    output = model.get_output_embeddings()
    seen: set[int] = set()
    for module in model.modules():
        label = "output head" if module is output else type(module).__name__
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:  # the output head may share the embedding weights
                continue
            seen.add(id(parameter))
            row = table.setdefault(label, {"module": label, "parameters": 0, "bytes": 0})
            row["parameters"] += true_size(parameter)
            row["bytes"] += _stored_bytes(parameter, itemsize)
    return sorted(table.values(), key=lambda row: -row["bytes"])


def round_trip(weight: torch.Tensor, quantization: str, double_quant: bool) -> torch.Tensor:
    """Quantize a weight matrix to 4 bits and dequantize it to float32."""
    packed, state = bnb.functional.quantize_4bit(
        weight.float().contiguous(), quant_type=quantization, compress_statistics=double_quant
    )
    return bnb.functional.dequantize_4bit(packed, state).float()


def four_bit_levels(quantization: str) -> list[float]:
    """Return the 16 values of a 4-bit weight in ascending order, relative to the largest absolute weight in its block.

    A block has 64 weights.
    """
    return sorted(bnb.functional.get_4bit_type(quantization, device="cpu").tolist())


def true_size(parameter: Any) -> int:
    """Return the number of weights in a parameter. A 4-bit tensor stores two of them per byte."""
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
    """Keep bitsandbytes on a code path with gradients.

    On CPUs with AVX512_BF16, bitsandbytes repacks 4-bit weights at the first evaluation for a path without gradients.
    Training would then continue without learning anything.
    """
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
