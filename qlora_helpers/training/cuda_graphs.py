"""Training steps on a GPU as CUDA graphs, with or without compiled blocks.

A step with few tokens takes as long as Python needs to launch its kernels, however fast the GPU is. A CUDA graph
records the kernels of a forward and a backward pass once for every shape and launches them together
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). Rows are padded on the right, where causal attention
needs no mask, so that a shape is a length; an incomplete batch is filled with empty rows. The training loop, optimizer,
gradient clipping and fp16 scaler stay the library's: only the forward and backward pass is replaced.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_helpers.data.prompts import IGNORE
from qlora_helpers.device import Device, autocast
from qlora_helpers.models import forward
from qlora_helpers.planning import graphs
from qlora_helpers.training.batches import ROUNDING, Batch, Features
from qlora_helpers.training.host_memory import HostMemory

# Lengths are multiples of a width. The longest row of a batch in random order is nearly always a long one, so that more
# lengths would save nothing; batches of rows of like length waste 4% instead of 6% with the smaller width.
WIDTHS = {"random": 64, "group_by_length": 32}
MOST_LENGTHS = 8  # Dynamo compiles at most 8 shapes of a function
CAUSAL = "causal_without_mask"


def _causal(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    return sdpa_attention_forward(module, query, key, value, None, **kwargs)


# While a graph is captured, transformers cannot look at the positions of the rows, and makes a mask for the case that
# they are packed. It makes none for an implementation of attention that has no function for masks.
AttentionInterface.register(CAUSAL, _causal)


def lengths_for(longest: int, sampling: str = "random") -> tuple[int, ...]:
    """Return the lengths that rows of up to `longest` tokens are padded to, at most eight."""
    width = WIDTHS[sampling] * -(-longest // (WIDTHS[sampling] * MOST_LENGTHS))
    return tuple(range(width, longest + width, width))


@dataclass(frozen=True)
class FixedShapes:
    """Collator that pads every batch to `rows` rows of one of the `lengths`."""

    rows: int
    lengths: tuple[int, ...]

    def __call__(self, features: Features) -> Batch:
        """Return ids and labels, (rows, length), and the number of tokens that are not padding."""
        tokens = [len(row["input_ids"]) for row in features]
        length = next(length for length in self.lengths if length >= max(tokens))
        ids = torch.zeros(self.rows, length, dtype=torch.long)
        labels = torch.full((self.rows, length), IGNORE)
        for place, (row, size) in enumerate(zip(features, tokens, strict=True)):
            ids[place, :size] = torch.tensor(row["input_ids"])
            labels[place, :size] = torch.tensor(row["labels"])
        return {"input_ids": ids, "labels": labels, "tokens": sum(tokens)}


class Passes:
    """Forward and backward pass of a padded batch, with the logits of `chunk` tokens at a time."""

    def __init__(self, model: Any, device: Device, backward: Callable[[torch.Tensor], None]) -> None:
        """`backward` is the trainer's, which scales the loss in float16."""
        self.model, self.device, self.backward = forward.inner(model), device, backward
        self.head = self.model.get_output_embeddings()
        short = forward.recomputes(self.model)  # of memory
        shape = self.model.config.get_text_config()
        self.chunk, self.width = graphs.chunk(shape.vocab_size, short), shape.hidden_size
        self.scales = [] if short else _plain_scales(self.model)  # they take 4 bytes per 64 weights
        self.host = HostMemory() if short else None  # for the inputs of the blocks, which are computed again from these
        self.replaced: dict[Any, Callable[..., Any]] = _fused_norms(self.model)  # forward passes of parts of the model
        self.loss_of_chunk = self._loss_sum

    def __call__(self, ids: torch.Tensor, labels: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Add the gradients of a batch, (rows, length), and return its loss: the sum over trained tokens by `items`."""
        with self._as_captured():
            with self.host.saving((*ids.shape, self.width)) if self.host else nullcontext():
                hidden = self._hidden(ids)
            labels = labels[:, 1:].flatten()
            parts = [part.requires_grad_() for part in hidden.detach().split(self.chunk)]
            losses = []
            for part, wanted in zip(parts, labels.split(self.chunk), strict=True):
                whole = len(part) == self.chunk  # the rest has a size of its own, which is not worth compiling
                loss = (self.loss_of_chunk if whole else self._loss_sum)(part, wanted) / items
                self.backward(loss)
                losses.append(loss.detach())
            hidden.backward(torch.cat([part.grad for part in parts]))
        return torch.stack(losses).sum()

    def loss(self, batch: Batch) -> float:
        """Return the mean loss of a batch, without gradients."""
        ids, labels = batch["input_ids"], batch["labels"][:, 1:].flatten()
        with self._as_captured():
            hidden = self._hidden(ids)
            pairs = zip(hidden.split(self.chunk), labels.split(self.chunk), strict=True)
            sums = [self._loss_sum(*pair) for pair in pairs]
        return (torch.stack(sums).sum() / (labels != IGNORE).sum()).item()

    def _hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Last hidden state of every token but the last of a row: (rows x (length - 1), width)."""
        with autocast(self.device):
            state: torch.Tensor = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return state[:, :-1].flatten(0, 1)

    def _loss_sum(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with autocast(self.device):
            logits = self.head(hidden)
        return torch.nn.functional.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")

    def compile(self) -> None:
        """Compile every block of the model and the loss, for these passes only: evaluations call the plain ones."""
        names = self.model._no_split_modules or ()
        options: dict[str, Any] = {"fallback_random": True}  # dropout is drawn as without compiling
        blocks = [block for block in self.model.modules() if type(block).__name__ in names]
        self.replaced = {block: torch.compile(block.forward, dynamic=False, options=options) for block in blocks}
        self.loss_of_chunk = torch.compile(self._loss_sum, dynamic=False, options=options)

    def undo_compile(self) -> None:
        """Compute the passes as before `compile`."""
        self.replaced, self.loss_of_chunk = _fused_norms(self.model), self._loss_sum

    @contextmanager
    def _as_captured(self) -> Iterator[None]:
        """Let the model attend without a mask, read plain scales, and call the replaced forward passes."""
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation(CAUSAL)
        for state, _, plain in self.scales:
            state.absmax, state.nested = plain, False
        for module, compute in self.replaced.items():
            module.forward = compute
        try:
            yield
        finally:
            for module in self.replaced:
                del module.forward
            for state, quantized, _ in self.scales:
                state.absmax, state.nested = quantized, True
            self.model.set_attn_implementation(before)


def _plain_scales(model: Any) -> list[tuple[Any, torch.Tensor, torch.Tensor]]:
    """Return, for double quantized weights, their quantization state and their scales, quantized and in float32.

    bitsandbytes would dequantize them in every pass.
    """
    weights: list[Any] = [module.weight for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    nested = [weight.quant_state for weight in weights if weight.quant_state is not None and weight.quant_state.nested]
    dequantize = bnb.functional.dequantize_blockwise
    return [(state, state.absmax, dequantize(state.absmax, state.state2).float() + state.offset) for state in nested]


def _fused_norms(model: Any) -> dict[Any, Callable[..., Any]]:
    """Return the RMS norms of a model with a forward pass that takes one kernel instead of seven.

    Only those for which `torch.nn.functional.rms_norm` gives the same: some families add 1 to the weights.
    """
    norms: dict[Any, Callable[..., Any]] = {}
    for module in model.modules():
        if "RMSNorm" not in type(module).__name__:
            continue
        eps, weight = getattr(module, "variance_epsilon", getattr(module, "eps", None)), getattr(module, "weight", None)
        if isinstance(eps, float) and isinstance(weight, torch.Tensor) and not weight.requires_grad:
            fused = partial(_rms_norm, module.forward, weight, eps)
            probe = torch.linspace(-1, 2, weight.shape[-1], dtype=weight.dtype, device=weight.device)[None]
            with torch.no_grad():
                if torch.allclose(module(probe), fused(probe), rtol=ROUNDING, atol=0.0):
                    norms[module] = fused
    return norms


def _rms_norm(
    own: Callable[..., torch.Tensor], weight: torch.Tensor, eps: float, hidden: torch.Tensor, *further: Any
) -> torch.Tensor:
    """Return the norm in one kernel where it is called as in the check, else from the module's own forward pass."""
    if further or hidden.dtype != weight.dtype:
        return own(hidden, *further)
    with torch.autocast(hidden.device.type, enabled=False):
        return torch.nn.functional.rms_norm(hidden, weight.shape, weight, eps)


class GraphStep:
    """The forward and backward pass of training, replayed from one graph per length."""

    def __init__(self, passes: Passes, rows: int) -> None:
        self.passes, self.rows = passes, rows
        self.trained = [p for p in passes.model.parameters() if p.requires_grad]
        sizes = [p.numel() for p in self.trained]
        self.gradient = torch.zeros(sum(sizes), dtype=self.trained[0].dtype, device=self.trained[0].device)
        parts = zip(self.gradient.split(sizes), self.trained, strict=True)
        self.gradients = [part.view_as(parameter) for part, parameter in parts]  # the tensors that the graphs add to
        self.graphs: dict[int, tuple[Any, tuple[torch.Tensor, ...], torch.Tensor]] = {}  # graph, its inputs, its loss
        self.warm: set[int] = set()  # lengths whose kernels are chosen, loaded and compiled
        self.full = False  # whether a graph did not fit, so that the passes are computed without graphs from there on
        self._pool: Any = None
        self._stream: Any = None  # of warm-up and capture: cuBLAS keeps memory for every stream

    def __call__(self, ids: torch.Tensor, labels: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Add the gradients of a batch, (rows, length) each, and return its loss."""
        length = ids.shape[1]
        self.attach_gradients()
        if length not in self.graphs and not self.full:
            try:
                if not self.graphs:  # the pool of the longest rows has room for all others
                    self.capture(max(self.warm | {length}))
                if length not in self.graphs:
                    self.capture(length)
            except torch.cuda.OutOfMemoryError:
                self.full = True
                self.release()
        if self.full:
            return self.passes(ids, labels, items)
        graph, inputs, loss = self.graphs[length]
        for tensor, new in zip(inputs, (ids, labels, items), strict=True):
            tensor.copy_(new, non_blocking=True)
        graph.replay()
        return loss.clone()

    def attach_gradients(self) -> None:
        """Put zeroed gradients where the trainer has removed them after an optimizer step."""
        if self.trained[0].grad is not self.gradients[0]:
            self.gradient.zero_()
            for parameter, gradient in zip(self.trained, self.gradients, strict=True):
                parameter.grad = gradient

    def exchange(self, accelerator: Any) -> None:
        """Add up the gradients of all processes, in each of them."""
        self.gradient.copy_(accelerator.reduce(self.gradient, "sum"))

    def warm_up(self, lengths: Iterable[int]) -> None:
        """Compute a pass of each length, in which kernels are chosen, loaded and compiled.

        Before the first capture there is memory for it: later it would need as much again as a graph.
        """
        missing = sorted(set(lengths) - self.warm, reverse=True)
        if not missing:
            return
        torch.cuda.empty_cache()  # what passes on this stream have left free cannot be used on another
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), forward.random_numbers_given_back():
            for length in missing:
                self.passes(*self.untrained(length))
                self.warm.add(length)
        torch.cuda.current_stream().wait_stream(self._stream)

    def untrained(self, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return a batch in which no token is trained: ids, labels and the number of trained tokens."""
        ids = torch.zeros(self.rows, length, dtype=torch.long, device=self.gradients[0].device)
        return ids, torch.full_like(ids, IGNORE), torch.ones((), device=ids.device)

    def capture(self, length: int) -> None:
        """Capture the graph of rows of this length.

        No token is trained while it is captured, so gradients stay as they are; random numbers that are drawn are
        given back.
        """
        self.warm_up([length])
        inputs = self.untrained(length)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph, loss = forward.capture(lambda: self.passes(*inputs), self._pool, self._stream)
        self.graphs[length] = graph, inputs, loss

    def release(self) -> None:
        """Free the memory of the graphs. They are captured again when they are needed."""
        self.graphs, self._pool = {}, None
        torch.cuda.empty_cache()
