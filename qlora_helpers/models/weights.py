"""What the weights of a model are: how many there are, how large they are stored, and what 4 bits make of them."""

from collections import Counter
from typing import Any

import bitsandbytes as bnb
import torch


def trainable_per_layer(model: Any) -> dict[str, int]:
    """Count trainable parameters per layer name, such as `q_proj`, summed over all transformer blocks."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer = name.split(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0]
            counts[layer.rpartition(".")[2]] += parameter.numel()
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
    for name, parameter in model.named_parameters():  # weights that the output head shares come once, as embeddings
        module = model.get_submodule(name.rpartition(".")[0])
        label = "output head" if module is output else type(module).__name__
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
    """Return the 16 values of a 4-bit weight, ascending, relative to the largest absolute one of its block of 64."""
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
