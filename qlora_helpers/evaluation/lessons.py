"""Figures that explain: the learning rate, early stopping, draws of training rows, and what an interval means."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter

from qlora_helpers import plots
from qlora_helpers.evaluation.intervals import Interval
from qlora_helpers.lessons import sign_step
from qlora_helpers.wording import counted


def tiny_losses(text: str, rate: float, steps: int = 60) -> list[float]:
    """Train a tiny model to predict the next byte of `text`; return the loss of each step in nats per byte.

    It is two matrices that turn a byte into 32 numbers and these into the logits of the next byte. The steps are those
    of `sign_step`. Fixed random seed.
    """
    generator = torch.Generator().manual_seed(0)
    content = torch.tensor(list(text.encode()))
    first, last = (torch.normal(0.0, 0.2, shape, generator=generator) for shape in ((256, 32), (32, 256)))
    losses = []
    for _ in range(steps):
        places = torch.randint(len(content) - 1, (512,), generator=generator)
        weights = first.requires_grad_(), last.requires_grad_()
        loss = torch.nn.functional.cross_entropy(first[content[places]] @ last, content[places + 1])
        first, last = sign_step(weights, loss, rate)
        losses.append(loss.item())
    return losses


@plots.styled
def learning_rates(losses: Mapping[float, Sequence[float]]) -> Figure:
    """Plot the loss of each step, one line per learning rate. The title names the rate with the lowest last losses."""
    best = min(losses, key=lambda rate: np.mean(losses[rate][-10:]))
    figure, (axes,) = plots.new_figure(f"Of these learning rates, {best:g} ends lowest", 4.0)
    for (rate, line), color in zip(losses.items(), plots.PALETTE * len(losses), strict=False):
        axes.plot(range(1, len(line) + 1), line, color=color, linewidth=2, label=f"{rate:g}")
    axes.set(yscale="log", xlabel="training step", ylabel="loss (nats per byte, log scale)")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 5, 7)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.minorticks_off()
    axes.grid(axis="y")
    figure.legend(title="learning rate", loc="outside lower center", ncols=4)
    return figure


def stopped(losses: Sequence[float], patience: int | None) -> int | None:
    """Return the position at which training stops, or None if it goes on to the end.

    It stops at the evaluation that is the `patience`-th in a row without a new low, as `EarlyStoppingCallback` of
    transformers does.
    """
    lowest, waited = float("inf"), 0
    for position, loss in enumerate(losses):
        waited = 0 if loss < lowest else waited + 1
        lowest = min(lowest, loss)
        if waited == patience:
            return position
    return None


@plots.styled
def early_stopping(log: Sequence[Mapping[str, Any]], patience: int) -> Figure:
    """Plot both losses of a `log.jsonl` by epoch, the lowest, and where early stopping would have ended the run."""
    training = {line["epoch"]: line["loss"] for line in log if "loss" in line}
    measured = {line["epoch"]: line["eval_loss"] for line in log if line.get("eval_loss") and line["epoch"] > 0}
    epochs, losses = list(measured), list(measured.values())
    best, stop = int(np.argmin(losses)), stopped(losses, patience)
    figure, (axes,) = plots.new_figure(f"Held-out loss: lowest after epoch {epochs[best]:g} of {epochs[-1]:g}", 4.2)
    spans = list(pairwise([0, *epochs]))
    means = [np.mean([loss for epoch, loss in training.items() if low < epoch <= high]) for low, high in spans]
    axes.plot(epochs, means, color=plots.BLUE, linewidth=1.5, label="training")
    axes.plot(epochs, losses, "o-", color=plots.VERMILION, linewidth=2.8, markersize=5, label="not trained on")
    axes.plot(epochs[best], losses[best], "o", markersize=13, color="black", fillstyle="none", label="lowest: kept")
    if stop is not None:
        axes.axvline(epochs[stop], color="black", linestyle="--", label=f"patience {patience}: stop")
        axes.axvspan(epochs[stop], epochs[-1], color=plots.ORANGE, alpha=0.2, linewidth=0, label="saved time")
    axes.set(xlabel="epoch", ylabel="loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@plots.styled
def draws(losses: Mapping[str, Sequence[float]]) -> Figure:
    """Plot the held-out loss of each draw and seed, one line per recipe. The title gives the widest range."""
    widest = max(max(line) - min(line) for line in losses.values())
    title = f"Other rows and another seed move the loss\nby up to {widest:.3f}"
    figure, (axes,) = plots.new_figure(title, 1.6 + 0.5 * len(losses))
    for place, line in enumerate(losses.values()):
        axes.plot(line, [place] * len(line), "o", color=plots.BLUE, markersize=9, alpha=0.6, markeredgecolor="white")
    axes.set_yticks(range(len(losses)), [f"{name}\n{counted(len(line), 'draw')}" for name, line in losses.items()])
    axes.set(ylim=(len(losses) - 0.5, -0.5), ylabel="recipe")
    axes.set(xlabel="held-out loss (nats per token),\none dot per draw")
    axes.grid(axis="x")
    return figure


@plots.styled
def coverage(found: Sequence[Interval], truth: float) -> Figure:
    """Plot intervals of repeated comparisons, sorted by value, and the truth. Those that miss it stand out."""
    hits = [interval.low <= truth <= interval.high for interval in found]
    figure, (axes,) = plots.new_figure(f"{sum(hits)} of {len(found)} intervals contain the truth", 4.6)
    for color, label, wanted in ((plots.BLUE, "contains it", True), (plots.VERMILION, "misses it", False)):
        order = sorted(zip(found, hits, strict=True), key=lambda pair: pair[0].value)
        rows = [(row, interval) for row, (interval, hit) in enumerate(order) if hit == wanted]
        axes.hlines([r for r, _ in rows], [i.low for _, i in rows], [i.high for _, i in rows], color=color, linewidth=3)
        axes.plot([i.value for _, i in rows], [r for r, _ in rows], "o", color=color, markersize=5, label=label)
    axes.axvline(truth, color="black", linewidth=1.5, label=f"truth: {truth:g}")
    axes.axvline(0, color=plots.GRAY, linestyle=":", linewidth=1.5, label="no difference")
    axes.set(xlabel="difference in held-out loss (nats per token)", ylabel="comparison", yticks=[])
    figure.legend(loc="outside lower center", ncols=2)
    return figure
