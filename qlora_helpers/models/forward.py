"""The model's own forward pass: without the logits that nobody reads, and of single tokens as a CUDA graph."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, StaticCache, StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "sdpa_without_copied_keys"
CACHE_MULTIPLE = 8  # attention on a GPU copies masks whose length is no multiple of this, in every layer


def inner(model: Any) -> Any:
    """Return the base model of an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def accepts(model: Any, argument: str) -> bool:
    """Whether the forward pass of a model, or of the base model of an adapter, has an argument of this name."""
    return argument in inspect.signature(inner(model).forward).parameters


def recomputes(model: Any) -> bool:
    """Whether a model computes the activations of its blocks again in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def batches_by_length(lengths: list[int], rows: int, tokens: float) -> list[list[int]]:
    """Return the indices of rows in batches of at most `rows` rows and `tokens` tokens with padding, or of one row.

    Rows of similar length go together, which saves padding.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not batches or len(batches[-1]) == rows or (len(batches[-1]) + 1) * lengths[i] > tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


def logits_at(model: Any, ids: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return the logits of `ids` (rows, tokens) at some columns: (rows, columns, vocabulary).

    They come from the model's own forward pass, so they include whatever a family does after its output head. Models
    that can leave out logits compute only these.
    """
    # A trainer wraps the forward pass of the adapter's model to return float32, which takes three times the memory.
    model = inner(model)
    options = {"logits_to_keep": columns} if accepts(model, "logits_to_keep") else {}
    logits: torch.Tensor = model(input_ids=ids, use_cache=False, **options).logits
    return logits if logits.shape[1] == len(columns) else logits[:, columns]  # some families ignore the argument


def static_cache(model: Any, tokens: int) -> StaticCache | None:
    """Return a cache of fixed size for this many tokens; None if the family, or one of its layers, needs another kind.

    Layers with a sliding window or a state count their tokens in Python, which a graph would not repeat.
    """
    model = inner(model)
    if not getattr(model, "_can_compile_fullgraph", False):
        return None
    cache = StaticCache(model.config, max_cache_len=-(-tokens // CACHE_MULTIPLE) * CACHE_MULTIPLE)
    return cache if all(type(layer) is StaticLayer for layer in cache.layers) else None


@contextmanager
def single_tokens_replayed(model: Any) -> Iterator[None]:
    """Replay passes of single tokens from a CUDA graph while the body generates once with a static cache on a GPU.

    Such a pass takes as long as Python needs to launch its kernels, however many answers are written at once. Raises
    what the model raises while it is captured.
    """
    model = inner(model)
    own, attention = vars(model).get("forward"), model.config._attn_implementation
    replayed = _Replayed(model.forward)
    model.forward = replayed
    if attention == "sdpa":
        model.set_attn_implementation(GROUPED)
    try:
        yield
    finally:
        if attention == "sdpa":
            model.set_attn_implementation(attention)
        if own is None:
            del model.forward
        else:
            model.forward = own
        if replayed.graph:
            replayed.graph = replayed.output = None
            torch.cuda.empty_cache()  # the memory of a graph is used for nothing else


class _Replayed:
    """A forward pass: plain for the prompts and for the first token, which warms up, then captured and replayed."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward)  # transformers reads the signature
        self.forward, self.calls = forward, 0
        self.graph: Any = None
        self.given: dict[str, Any] = {}
        self.output: Any = None

    def __call__(self, **given: Any) -> Any:
        self.calls += 1
        if self.calls <= 2:
            return self.forward(**given)
        if not self.graph:
            self.given = {name: _copied(value) for name, value in given.items()}
            self.graph, self.output = capture(lambda: self.forward(**self.given))
        for tensor, new in zip(_tensors(self.given), _tensors(given), strict=True):
            tensor.copy_(new)
        self.graph.replay()
        return self.output


def capture(body: Callable[[], Any], pool: Any = None, stream: Any = None) -> tuple[Any, Any]:
    """Return a CUDA graph of what the body computes, and the output that a replay writes.

    Its memory is taken from `pool`, the handle of a pool that graphs share. It is captured on `stream`, or else on one
    for all graphs. Whatever the body raises is passed on, after leaving that stream, on which torch would stay.
    """
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with random_numbers_given_back(), torch.cuda.graph(graph, pool=pool, stream=stream):
            output = body()
    except BaseException:
        torch.cuda.set_stream(current)
        raise
    return graph, output


@contextmanager
def random_numbers_given_back() -> Iterator[None]:
    """Give back the random numbers that the body draws. After a failed capture, the generator works again."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    before = torch.cuda.get_rng_state()
    apart = generator.clone_state()
    try:
        yield
    except BaseException:
        generator.graphsafe_set_state(apart)
        raise
    torch.cuda.set_rng_state(before)


def _copied(value: Any) -> Any:
    """Copy tensors, also those in a dict of masks; anything else stays the same."""
    if isinstance(value, dict):
        return {name: _copied(one) for name, one in value.items()}
    return value.clone(memory_format=torch.contiguous_format) if torch.is_tensor(value) else value


def _tensors(given: dict[str, Any]) -> Iterator[torch.Tensor]:
    for value in given.values():
        if isinstance(value, dict):
            yield from _tensors(value)
        elif torch.is_tensor(value):
            yield value


def _grouped(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> tuple[Any, Any]:
    """Attention of `sdpa`, for one token without copies of the keys that several heads share.

    These heads become rows of one head. With a mask, transformers before 5.24 copied the whole cache in every pass.
    """
    rows, heads, tokens, width = query.shape
    shared = key.shape[1]
    plain = attention_mask is not None and attention_mask.shape[1] == 1 and options.get("position_bias") is None
    if tokens > 1 or heads == shared or not plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    packed = query.reshape(rows, shared, heads // shared, width)
    output = torch.nn.functional.scaled_dot_product_attention(
        packed, key, value, attn_mask=attention_mask, scale=options.get("scaling")
    )
    return output.reshape(rows, 1, heads, -1), None


AttentionInterface.register(GROUPED, _grouped)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
