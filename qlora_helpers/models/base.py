"""The frozen base model, in 4 or 16 bits."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging as hf_logging

from qlora_helpers.config import UNPACKED, Config
from qlora_helpers.device import Device, free_last_error, keep_freed_memory
from qlora_helpers.errors import UserError
from qlora_helpers.models.hub import from_pretrained
from qlora_helpers.models.weights import true_size

hf_logging.disable_progress_bar()  # hides the bar for reading weights; downloads keep theirs


def quantization_config(config: Config, device: Device) -> BitsAndBytesConfig | None:
    """Return how bitsandbytes stores the base model, or None for 16 bits."""
    if config.quantization == "none":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization,
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, device.dtype),
    )


def load_base(config: Config, device: Device, quantization: BitsAndBytesConfig | None = None) -> Any:
    """Load the frozen base model, quantized as `config.quantization` says and computing in the device's dtype.

    `quantization` is that of `quantization_config` unless it is given.

    Weights that are not quantized to 4 bits are stored in 16 bits. If the device computes in float32, as most CPUs do,
    these weights are converted once, here. Their values stay the same, and no conversion is needed at each use.

    Raises `UserError` if the model cannot be loaded, or if it is not stored as the config says.
    """
    free_last_error()
    keep_freed_memory(device)
    dtype = getattr(torch, device.dtype)
    base = from_pretrained(
        AutoModelForCausalLM,
        config,
        dtype=getattr(torch, device.storage_dtype),
        quantization_config=copy.deepcopy(quantization or quantization_config(config, device)),  # it is changed
        device_map={"": 0} if device.kind == "cuda" else None,
        use_safetensors=True,
    )
    check_quantized(base, config)
    _compute_in(base, dtype)
    _check_ids(base, config)
    return base.requires_grad_(False).eval()


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
    excluded = {parameter for module in apart for parameter in module.parameters()}
    counted = [parameter for parameter in base.parameters() if parameter not in excluded]
    packed = sum(true_size(p) for p in counted if getattr(p, "quant_state", None) is not None)
    return packed / max(sum(map(true_size, counted)), 1)


def _check_ids(base: Any, config: Config) -> None:
    """Let every forward pass raise `UserError` for token ids and positions that have no embedding.

    Otherwise a CPU raises IndexError, and a GPU fails in this and in all later operations.
    """
    tokens = base.get_input_embeddings()

    def check(module: Any, inputs: Any) -> None:
        if inputs and inputs[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return  # numbers cannot be read; rows are checked before training: see training/paths.py
        largest, known = int(inputs[0].max()) if inputs and inputs[0].numel() else 0, len(module.weight)
        if largest < known:
            return
        if module is tokens:
            raise UserError(
                f"tokenizer: {config.model} has {known} embeddings, but its tokenizer writes token {largest}. "
                "Fix: use the tokenizer that came with the model."
            )
        raise UserError(f"max_length: {config.model} has {known} positions, fewer than a row. Fix: max_length={known}.")

    for module in base.modules():
        if type(module) is torch.nn.Embedding:
            module.register_forward_pre_hook(check)


@contextmanager
def evaluating_in_float32(model: Any, device: Device) -> Iterator[None]:
    """On a CPU, let a model compute in float32 while the body runs. On a GPU, change nothing.

    bfloat16 rounds what passes between layers, so that each row's loss gets an error of its own. In the difference
    between two models these errors do not cancel: the interval of a small change was 2.5 times as wide as in float32.
    Weights that are stored in 16 bits are copied, which keeps their values. The originals come back afterwards.
    """
    if device.kind != "cpu" or device.dtype == "float32":
        yield
        return
    originals = [(tensor, tensor.data) for tensor in _tensors(model)]
    _compute_in(model, torch.float32)
    try:
        yield
    finally:
        _compute_in(model, getattr(torch, device.dtype))
        for tensor, original in originals:
            tensor.data = original


def _compute_in(base: Any, dtype: torch.dtype) -> None:
    """Convert unquantized weights to `dtype`, make quantized weights dequantize directly to `dtype`, with gradients.

    On CPUs with AVX512_BF16, bitsandbytes repacks 4-bit weights at the first evaluation for a path without gradients.
    Training would then continue without learning anything.
    """
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            packed: Any = module.weight
            packed.quant_state.dtype = module.compute_dtype = dtype
            module.support_avx512bf16_for_cpu = False
    for tensor in _tensors(base):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            tensor.data = tensor.data.to(dtype)


def _tensors(model: Any) -> tuple[torch.Tensor, ...]:
    return (*model.parameters(), *model.buffers())
