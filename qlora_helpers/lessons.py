"""Figures that explain how QLoRA works, each with something to change. They are computed on the spot, in a moment."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from qlora_helpers.config import Config
from qlora_helpers.errors import UserError
from qlora_helpers.planning import memory, step_time
from qlora_helpers.planning.gpus import GPUS
from qlora_helpers.plots import BLUE, GRAY, ORANGE, PALETTE, VERMILION, new_figure, styled

LENGTHS = (128, 256, 512, 1024, 2048)  # tokens of a row
WIDE = 32  # inputs and outputs of the layer in `alpha`
SCALE = 1024  # of the loss
HIGHEST = 1.5  # loss that `alpha` shows: with steps that go too far, it has no limit
SMALLEST, LARGEST = 2.0**-24, 65504.0  # of the positive numbers of fp16, IEEE 754


@styled
def loss_scaling(scale: float) -> Figure:
    """Plot sizes of gradients in fp16, as they are and with the loss multiplied by `scale`.

    The gradients are drawn: their logarithms are normal. Those that fp16 turns into zero or infinity are marked.
    """
    sizes = 10 ** np.random.default_rng(0).normal(-7, 1.3, 50_000)
    figure, panels = new_figure("", 4.2, rows=1, columns=2)
    lost = []
    for axes, factor, name in zip(panels, (1, scale), ("as they are", f"loss × {scale:,.0f}"), strict=True):
        scaled = sizes * factor
        with np.errstate(over="ignore"):
            half = scaled.astype(np.float16)
        kinds = {"zero": half == 0, "kept": (half > 0) & np.isfinite(half), "infinite": ~np.isfinite(half)}
        for (kind, chosen), color in zip(kinds.items(), (VERMILION, BLUE, ORANGE), strict=True):
            counts, bins = np.histogram(np.log10(scaled[chosen]), np.arange(-14, 14, 0.5))
            if chosen.any():
                axes.stairs(counts, bins, fill=True, color=color, label=kind)
        for edge, label in ((SMALLEST, "fp16's smallest and largest"), (LARGEST, None)):
            axes.axvline(math.log10(edge), color="black", linestyle="--", linewidth=1, label=label)
        axes.set(title=name, xlim=(-13, 9), xlabel="size of a gradient", ylabel="gradients" if factor == 1 else "")
        axes.set_xticks(range(-12, 7, 6), [f"1e{power}" for power in range(-12, 7, 6)])
        lost.append(1 - kinds["kept"].mean())
    figure.suptitle(f"fp16 loses {lost[0]:.1%} of these gradients;\nwith scaling, {lost[1]:.1%}")
    marks = {label: mark for axes in panels for mark, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(marks.values()), list(marks), title="in fp16", loc="outside lower center", ncols=2)
    return figure


@styled
def low_rank(model: Any, batch: Any, layer: str) -> Figure:
    """Plot how much of a layer's gradient its largest directions hold, for the tokens in `batch`.

    The gradient of a weight matrix is the sum, over tokens, of the gradient of the output times the input. Shares are
    of the squared norm: the squared singular values, added up. For comparison: the same with random vectors. `model`
    has an adapter, and is in evaluation mode afterwards. Of the layers named `layer`, the middle one is shown. Raises
    `UserError` if none has an adapter.
    """
    found = [m for path, m in model.named_modules() if path.endswith(f".{layer}") and hasattr(m, "base_layer")]
    if not found:
        raise UserError(f"layer: {layer} has no adapter. Fix: choose one of the names in target_modules.")
    adapter = found[len(found) // 2]
    adapted, (rank,) = adapter.base_layer, adapter.r.values()
    left, right = _factors(model, batch, adapted)
    draw = torch.Generator().manual_seed(0)
    chance = _shares(torch.randn(left.shape, generator=draw), torch.randn(right.shape, generator=draw))
    real, width = _shares(left, right), min(adapted.in_features, adapted.out_features)
    most = int(np.argmax(real >= 0.99)) + 1
    figure, (axes,) = new_figure(f"99% of the gradient lies in {most} of {width} directions", 3.8)
    for shares, color, label in ((real, BLUE, "gradient"), (chance, GRAY, "random vectors")):
        axes.plot(range(1, len(shares) + 1), 100 * shares, color=color, linewidth=2.5, label=label)
    axes.axvline(rank, color="black", linestyle="--", linewidth=1, label=f"rank {rank}")
    axes.set(xlabel=f"largest directions, of {width}", ylabel="share of the gradient (%)", ylim=(0, 102))
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _factors(model: Any, batch: Any, layer: torch.nn.Module) -> list[torch.Tensor]:
    """Gradient of the output and input of `layer`, tokens × width, for `SCALE` times the loss on `batch`."""
    kept: list[torch.Tensor] = []

    def keep(_: Any, inputs: Any, output: torch.Tensor) -> None:
        output.requires_grad_(True).retain_grad()
        kept.extend((output, inputs[0].detach()))

    hook = layer.register_forward_hook(keep)
    loss = model.eval()(**batch, labels=batch["input_ids"]).loss
    (SCALE * loss).backward()  # or fp16 would lose a part; shares do not depend on it
    hook.remove()
    model.zero_grad()
    gradient = kept[0].grad
    assert gradient is not None
    return [tensor.flatten(0, -2).float().cpu() for tensor in (gradient, kept[1])]


def _shares(left: torch.Tensor, right: torch.Tensor) -> np.ndarray:
    """Cumulative shares of the squared singular values of leftᵀ·right, from small matrices (tokens × tokens)."""
    small = torch.linalg.qr(left.T).R @ torch.linalg.qr(right.T).R.T
    squares = torch.linalg.svdvals(small).square()
    return (squares.cumsum(0) / squares.sum()).numpy()


@styled
def alpha(alphas: Sequence[float], rank: int, dropout: float) -> Figure:
    """Plot the loss of small adapters in training that differ in alpha only, all with the same learning rate.

    Each fits a random change of rank 4 to a layer, by B·A scaled by alpha / rank. `dropout` is the
    probability with which an input of A is set to zero.
    """
    figure, (axes,) = new_figure("The same learning rate:\nalpha decides how far a step goes", 4.2)
    for value, color in zip(alphas, PALETTE, strict=False):
        losses = _trained(value / rank, rank, dropout)
        axes.plot(range(len(losses)), losses, color=color, linewidth=2, label=f"alpha {value:g} = {value / rank:g} r")
    axes.set(xlabel="step", ylabel="loss (mean squared error)")
    axes.set_ylim(0, min(axes.get_ylim()[1], HIGHEST))
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _trained(scale: float, rank: int, dropout: float) -> list[float]:
    """Losses of 100 steps on A and B, which start as in LoRA: A random, B zero."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        inputs = torch.randn(128, WIDE)
        outputs = inputs @ torch.randn(WIDE, 4) @ torch.randn(4, WIDE) / math.sqrt(4 * WIDE)
        weights = [torch.randn(WIDE, rank) / math.sqrt(WIDE), torch.zeros(rank, WIDE)]
        losses = []
        for _ in range(100):
            a, b = (weight.requires_grad_() for weight in weights)
            change = torch.nn.functional.dropout(inputs, dropout) @ a @ b
            loss = torch.nn.functional.mse_loss(scale * change, outputs)
            weights = sign_step([a, b], loss, 0.01)
            losses.append(loss.item())
    return losses


def sign_step(weights: Sequence[torch.Tensor], loss: torch.Tensor, rate: float) -> list[torch.Tensor]:
    """Return the weights, each moved by `rate` against the sign of its gradient.

    This is signSGD (Bernstein et al. 2018, arXiv 1802.04434), Adam without its averages. `torch.optim` imports torch's
    compiler, which takes longer than all steps of a lesson.
    """
    slopes = torch.autograd.grad(loss, weights)
    return [weight.detach() - rate * slope.sign() for weight, slope in zip(weights, slopes, strict=True)]


@styled
def optimizer_states(config: Config) -> Figure:
    """Plot the planned memory of AdamW's two moments, for all weights and for the adapter, in 32, 16 and 8 bits."""
    figure, (axes,) = new_figure("", 3.0)
    sizes = {}
    for method, trained in (("full", "all weights"), (None, "adapter")):
        for optimizer, name in (("adamw_torch", "AdamW"), ("adamw_8bit", "8-bit AdamW")):
            workload = memory.workload_of(config.replace(optimizer=optimizer), method)
            sizes[f"{name},\n{trained}"] = memory.training_parts(workload)["optimizer states"] / 2**20
    bars = axes.barh(list(sizes), list(sizes.values()), color=[BLUE, BLUE, ORANGE, ORANGE], height=0.6)
    axes.bar_label(bars, [f"{size:,.0f} MiB" for size in sizes.values()], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set(xlabel="memory of the moments (MiB)", ylabel="optimizer, trained")
    moments = sizes["AdamW,\nadapter"]
    figure.suptitle(f"With an adapter, paging can move only {moments:,.0f} MiB")
    return figure


@styled
def checkpointing(config: Config, gpu: str) -> Figure:
    """Plot planned memory in training (GiB) by tokens of a row, with and without gradient checkpointing.

    `gpu` is a name in `GPUS`. The time of a step is that of `step_time`.
    """
    figure, (axes,) = new_figure("", 4.2)
    times = []
    for on, color in ((False, BLUE), (True, ORANGE)):
        configs = [config.replace(gradient_checkpointing=on, max_length=length) for length in LENGTHS]
        peaks = [sum(memory.training_parts(memory.workload_of(c)).values()) / memory.GIB for c in configs]
        times.append(step_time.seconds(config.replace(gradient_checkpointing=on), GPUS[gpu]))
        axes.plot(LENGTHS, peaks, "o-", color=color, linewidth=2.5, label=f"checkpointing {'on' if on else 'off'}")
    axes.axhline(GPUS[gpu].memory, color="black", linestyle="--", linewidth=1, label=f"memory of a {gpu.upper()}")
    axes.set(xlabel="tokens of a row", ylabel="planned peak (GiB)", xticks=LENGTHS[1:], ylim=(0, None))
    axes.grid(axis="y")
    figure.suptitle(f"Checkpointing saves memory;\na step takes {times[1] / times[0]:.1f} times as long")
    figure.legend(loc="outside lower center", ncols=2)
    return figure
