"""Figures, drawn from run folders and tables without pyplot, readable on phones and on dark pages."""

import functools
import io
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qlora_helpers import files
from qlora_helpers.planning import measurements
from qlora_helpers.wording import counted

if TYPE_CHECKING:
    import torch

    from qlora_helpers.data.cleaning import Data
    from qlora_helpers.planning.plan import Plan

# Okabe and Ito's palette, which works with any kind of color vision.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PALETTE = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", VERMILION, "#F0E442")
GRAY = "#666666"
WIDTH = 4.8  # inches: on a phone, which has about 3, the text of 12 points still takes 10 pixels
BLOCK = 64  # weights that share one scale in NF4
BINS = np.linspace(-1, 1, 82).tolist()  # an odd number of bins, so that one is centered on zero
PANELS = 6  # runs in one figure: more take long to draw, and a page of many megabytes
SMOOTHED = 20  # steps, from which on the training loss is smoothed
TURN = 0.005  # nats by which the held-out loss must rise above its minimum to be called overfitting
STYLE = {
    "font.size": 12,
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "figure.labelsize": 12,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#DDDDDD",
    "legend.frameon": False,
    "legend.handlelength": 1.5,
    "legend.columnspacing": 1.2,
    "text.parse_math": False,  # a name may hold dollar signs
}
Arguments = ParamSpec("Arguments")


class NotebookFigure(Figure):
    """A figure that a notebook shows even if pyplot, which registers figures with IPython, was never imported."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        png = io.BytesIO()
        self.savefig(png, format="png", dpi=150, facecolor="white")
        width, height = self.get_size_inches() * 100
        return png.getvalue(), {"width": round(width), "height": round(height)}


def styled(draw: Callable[Arguments, Figure]) -> Callable[Arguments, Figure]:
    """Draw with this module's style, whatever matplotlib's settings are, and leave those unchanged."""

    @functools.wraps(draw)
    def styled(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Figure:
        with style.context(["default", STYLE]):
            return draw(*args, **kwargs)

    return styled


def new_figure(title: str, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """Return a figure with a title and its axes as a flat array. `height` is in inches."""
    figure = NotebookFigure(figsize=(WIDTH, height), facecolor="white", layout="constrained")
    figure.suptitle(title, wrap=True)
    return figure, np.ravel(figure.subplots(rows, columns, sharey=True))


@styled
def token_lengths(data: "Data", limit: int) -> Figure:
    """Plot histograms of the full length of training and held-out rows in tokens, and the limit for truncation."""
    cut = sum(e.cut > 0 for e in data.train)
    figure, (axes,) = new_figure(f"{cut} of {counted(len(data.train), 'training row')} over the limit", 4.0)
    sets = {"train": data.train, "held-out": data.heldout}
    lengths = {name: [len(e.input_ids) + e.cut for e in rows] for name, rows in sets.items()}
    bins = np.linspace(0, max([limit, *lengths["train"], *lengths["held-out"]]), 31).tolist()
    for (name, rows), color in zip(sets.items(), (BLUE, ORANGE), strict=True):
        label = f"{name}: {counted(len(rows), 'row')}, {sum(e.cut > 0 for e in rows) / max(len(rows), 1):.0%} cut"
        axes.hist(lengths[name], bins, histtype="stepfilled", fc=(color, 0.3), ec=color, lw=2, label=label)
    axes.axvline(limit, color="black", linestyle="--", linewidth=1.5, label=f"limit: {limit} tokens")
    axes.set(xlabel="length (tokens)", ylabel="number of rows")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@styled
def levels(weights: "dict[str, torch.Tensor]", levels: list[float]) -> Figure:
    """Plot the density of weights, divided by the largest in their block, and the 4-bit levels.

    `weights` are tensors of any shape by name. Each is a thin line, and their mean a thick one. The title gives the
    share of the weights that lie among the inner half of the levels.
    """
    figure, (axes,) = new_figure("", 4.4)
    densities, inner = [], sorted(map(abs, levels))[len(levels) // 2 - 1]
    within = []
    for weight in weights.values():
        flat = weight.detach().float().cpu().flatten().numpy()
        blocks = flat[: len(flat) // BLOCK * BLOCK].reshape(-1, BLOCK)
        largest = np.abs(blocks).max(axis=1, keepdims=True)
        scaled = blocks / np.where(largest == 0, 1, largest)
        densities.append(np.histogram(scaled, BINS, density=True)[0])
        within.append(float((np.abs(scaled) <= inner).mean()))
        label = "one layer" if len(densities) == 1 else None
        axes.stairs(densities[-1], BINS, color=GRAY, linewidth=0.8, alpha=0.6, label=label)
    axes.stairs(np.mean(densities, axis=0), BINS, color=BLUE, linewidth=2.5, label="mean of the layers")
    figure.suptitle(f"The inner half of the levels\ncovers {np.mean(within):.0%} of the weights")
    top = axes.get_ylim()[1]
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= top])
    axes.vlines(levels, -0.16 * top, -0.03 * top, color="black", label=f"{len(levels)} levels")
    axes.set(xlabel=f"weight ÷ largest weight in its block of {BLOCK}", ylabel="density")
    axes.set(ylim=(-0.19 * top, top), xticks=(-1, -0.5, 0, 0.5, 1))
    figure.legend(loc="outside lower center", ncols=3)
    return figure


@styled
def round_trip_errors(errors: dict[str, float]) -> Figure:
    """Plot the relative error in percent of weights after quantization and dequantization, by storage."""
    least = min(errors, key=errors.__getitem__)
    figure, (axes,) = new_figure(f"{least} changes the weights least", 1.3 + 0.5 * len(errors))
    _stack(axes, list(errors), {"": list(errors.values())}, [f"{error:.2f}%" for error in errors.values()])
    axes.set(xlabel="relative error of the weights (%)", ylabel="storage")
    return figure


@styled
def trainable_per_layer(counts: dict[str, int]) -> Figure:
    """Plot the number of trainable parameters by adapted layer."""
    figure, (axes,) = new_figure(f"{sum(counts.values()):,} trainable parameters", 1.3 + 0.5 * len(counts))
    _stack(axes, list(counts), {"": [n / 1000 for n in counts.values()]}, [f"{n:,}" for n in counts.values()])
    axes.set(xlabel="trainable parameters (thousands)", ylabel="layer")
    return figure


@styled
def weights_by_module(tables: dict[str, list[dict[str, Any]]]) -> Figure:
    """Plot the memory of the weights by module class, one bar per storage, from rows of `qlora.weight_table`."""
    figure, (axes,) = new_figure("", 1.9 + 0.6 * len(tables))
    mib = {name: {row["module"]: row["bytes"] / 2**20 for row in rows} for name, rows in tables.items()}
    totals = {name: sum(sizes.values()) for name, sizes in mib.items()}
    modules = sorted({module for sizes in mib.values() for module in sizes})
    widths = {module: [sizes.get(module, 0.0) for sizes in mib.values()] for module in modules}
    whole = max(totals.values())
    first, last = next(iter(totals)), list(totals)[-1]
    figure.suptitle(f"{last}: {1 - totals[last] / totals[first]:.0%} less memory than {first}")
    stacks = {  # classes too small to see are left out of the legend
        module if max(sizes) > whole / 100 else f"_{module}": sizes for module, sizes in widths.items()
    }
    _stack(axes, list(mib), stacks, [f"{total:,.0f} MiB" for total in totals.values()])
    axes.set(xlabel="memory (MiB)", ylabel="storage")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@styled
def pass_seconds(seconds: dict[str, float]) -> Figure:
    """Plot the seconds of a forward and backward pass by value of `fast`, as `training.paths` timed them.

    `seconds` includes off. The title says how many times as fast the fastest one is.
    """
    fastest = min(seconds, key=seconds.__getitem__)
    title = "Graphs are not faster here"
    if fastest != "off":
        name = "Compiled graphs" if fastest == "compiled" else "Graphs"
        title = f"{name} make a pass {seconds['off'] / seconds[fastest]:.1f} times as fast"
    figure, (axes,) = new_figure(title, 1.3 + 0.5 * len(seconds))
    milliseconds = [1000 * each for each in seconds.values()]
    _stack(axes, list(seconds), {"": milliseconds}, [f"{each:.0f} ms" for each in milliseconds])
    axes.set(xlabel="forward and backward pass (ms)", ylabel="value of fast")
    return figure


def _stack(axes: Axes, names: list[str], parts: dict[str, list[float]], totals: list[str]) -> None:
    """Draw one bar per name, with its parts from left to right and its total after them."""
    left = np.zeros(len(names))
    colors = (*PALETTE, GRAY, "#A6761D", "#4B3B8F", "#BBBBBB") * len(parts)
    for (part, widths), color in zip(parts.items(), colors, strict=False):
        bars = axes.barh(names, widths, left=left, color=color, height=0.6, label=part)
        left += np.array(widths)
    axes.bar_label(bars, totals, padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.2)


@styled
def loss_curves(logs: dict[str, list[dict[str, Any]]]) -> Figure:
    """Plot held-out and training loss by step, one panel per run, on one scale, from the lines of `log.jsonl`.

    The training loss of a long run is smoothed; single steps are dots, of which those far from the curve are outside
    the panel. If the held-out loss rises at the end, its minimum is marked and the steps after it are shaded. The title
    says what the held-out losses did. Of more than `PANELS` runs, the first ones are shown, and the title says so.
    """
    shown = {name: _losses(lines) for name, lines in islice(logs.items(), PANELS)}
    title = _outcome([heldout for _, heldout in shown.values()])
    title += f",\nthe first {PANELS} of {len(logs)} runs" if len(logs) > PANELS else ""
    rows, columns = (1, len(shown)) if len(shown) <= 2 else (len(shown), 1)
    figure, panels = new_figure(title, 1.6 + 2.4 * rows, rows, columns)
    for axes, (name, (train, heldout)) in zip(panels, shown.items(), strict=True):
        axes.set_title(name)
        axes.xaxis.set_major_locator(MaxNLocator(6 // columns, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
        axes.grid(axis="y")
        _draw_losses(axes, train, heldout)
    drawn = [loss for train, heldout in shown.values() for loss in (*_smooth(train), *heldout.values())]
    room = 0.25 * (np.ptp(drawn) or 1) if drawn else 0.0
    for axes in panels[:1] if drawn else []:  # all panels share its scale
        axes.set_ylim(min(drawn) - room, max(drawn) + room)
    for axes in panels[-columns:]:
        axes.set_xlabel("training step")
    figure.supylabel("loss (nats per token)")
    legends = [axes.get_legend_handles_labels() for axes in panels]
    marks = {label: mark for marks, labels in legends for mark, label in zip(marks, labels, strict=True)}
    figure.legend(list(marks.values()), list(marks), loc="outside lower center", ncols=2)
    return figure


def _losses(lines: list[dict[str, Any]]) -> tuple[dict[int, float], dict[int, float]]:
    """Training and held-out losses by step."""
    heldout: dict[int, float] = {}
    for line in lines:
        if "eval_loss" in line:  # a second one for a step is that of the weights that keep_best restored
            heldout.setdefault(line["step"], line["eval_loss"])
    return {line["step"]: line["loss"] for line in lines if "loss" in line}, heldout


def _smooth(train: dict[int, float]) -> list[float]:
    """Means over neighboring steps, a tenth of all; at the ends, over those that are there."""
    losses, reach = np.array(list(train.values())), len(train) // SMOOTHED
    return [float(losses[max(0, i - reach) : i + reach + 1].mean()) for i in range(len(losses))]


def _outcome(runs: list[dict[int, float]]) -> str:
    """What the held-out losses did, as a title."""
    turned = sum(_turning_point(heldout) is not None for heldout in runs)
    fell = sum(heldout[max(heldout)] < heldout[min(heldout)] - TURN for heldout in runs if heldout)
    if turned:
        return "Overfitting: the held-out loss rises again" + f"\nin {turned} of {len(runs)} runs" * (len(runs) > 1)
    if runs and fell == len(runs):
        return "The held-out loss fell" + " in every run" * (len(runs) > 1)
    return "Loss during training"


def _draw_losses(axes: Axes, train: dict[int, float], heldout: dict[int, float]) -> None:
    axes.plot(list(train), list(train.values()), ".", color=BLUE, markersize=3, alpha=0.35)
    if len(train) > 1:  # a single step makes no line
        label = "training" if len(train) < SMOOTHED else "training, smoothed"
        axes.plot(list(train), _smooth(train), color=BLUE, linewidth=1.5, label=label)
    losses = list(heldout.values())
    axes.plot(list(heldout), losses, "o-", color=VERMILION, linewidth=2.8, markersize=5, label="not trained on")
    turn = _turning_point(heldout)
    if turn is None:
        return
    axes.axvspan(turn, max(heldout), color=ORANGE, alpha=0.2, linewidth=0)
    axes.plot(turn, heldout[turn], "o", markersize=12, color="black", fillstyle="none", label="lowest")
    edge = axes.get_xaxis_transform()
    axes.text(max(heldout), 0.98, "overfitting", transform=edge, ha="right", va="top", fontweight="bold")


def _turning_point(heldout: dict[int, float]) -> int | None:
    """Return the step of the lowest held-out loss if the last loss is clearly above it, else None."""
    best = min(heldout, key=heldout.__getitem__, default=None)
    return best if best is not None and heldout[max(heldout)] - heldout[best] > TURN else None


@styled
def memory_parts(plans: "dict[str, Plan]", gpu: float | None) -> Figure:
    """Plot the planned peak memory in training by part, one bar per method, and the memory of the GPU in GiB."""
    figure, (axes,) = new_figure("Peak memory by part", 2.6 + 0.6 * len(plans))
    whole = max(plan.total for plan in plans.values())
    every = [{**plan.training, "CUDA context": plan.context} for plan in plans.values()]
    names = [part for part in every[0] if max(parts.get(part, 0.0) for parts in every) > whole / 50]
    sizes = {part: [parts.get(part, 0.0) for parts in every] for part in names}
    sizes["other"] = [sum(size for part, size in parts.items() if part not in names) for parts in every]
    _stack(axes, list(plans), sizes, [f"{sum(parts.values()):.1f}" for parts in every])
    if gpu is not None:
        axes.axvline(gpu, color="black", linestyle="--", linewidth=1.5, label=f"GPU: {gpu:.1f} GiB")
    axes.set(xlabel="peak memory in training (GiB)", ylabel="method")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@styled
def planned_and_measured(lines: list[dict[str, Any]]) -> Figure:
    """Plot planned against measured peak memory, one mark per setting, with a band of ±10%.

    Settings used for fitting and settings held back for scoring have different marks.
    """
    planned, measured = zip(*map(measurements.peaks, lines), strict=True)
    figure, (axes,) = new_figure("Planned and measured peak memory", 4.6)
    reach = np.array([min(measured) * 0.8, max(measured) * 1.25])
    axes.fill_between(reach, reach * 0.9, reach * 1.1, color=GRAY, alpha=0.2, linewidth=0, label="within 10%")
    axes.plot(reach, reach, color="black", linewidth=1)
    for scored, color, mark, label in ((False, BLUE, "o", "used for fitting"), (True, VERMILION, "D", "held back")):
        chosen = [i for i, line in enumerate(lines) if line["scored_only"] == scored]
        points = [measured[i] for i in chosen], [planned[i] for i in chosen]
        axes.plot(*points, mark, color=color, label=label, markersize=6)
    axes.set(xscale="log", yscale="log", xlabel="measured (GiB reserved)", ylabel="planned (GiB)")
    ticks = [tick for tick in (1, 2, 4, 8, 16, 32) if reach[0] <= tick <= reach[1]]
    axes.set_xticks(ticks, map(str, ticks))
    axes.set_yticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.grid()
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write `figure` atomically as a PNG with 300 dpi, and return `path`."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=300, facecolor="white")
    files.write_bytes(path, png.getvalue())
    return path
