"""Figures have titles and labels, overfitting is marked where it occurs, and the live curve stays in one display."""

import builtins
import dataclasses
import io
import json
import subprocess
import sys
from types import SimpleNamespace
from typing import cast

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from qlora_helpers import plots
from qlora_helpers.data.cleaning import Cleaned, Data
from qlora_helpers.data.prompts import Example
from qlora_helpers.data.schema import Row
from qlora_helpers.evaluation import differences, learning_curve
from qlora_helpers.evaluation.differences import Arm, Difference
from qlora_helpers.evaluation.learning_curve import Curve
from qlora_helpers.evaluation.row_losses import RowLoss
from qlora_helpers.files import ROOT
from qlora_helpers.runs import RunFolder
from qlora_helpers.training import callbacks


def example(tokens: int, cut: int = 0) -> Example:
    return Example(Row((), "here:1"), "", [1] * tokens, [1] * tokens, [], cut)


DATA = Data([example(20), example(64, cut=30), example(40), example(64, cut=1)], [example(33)], cast(Cleaned, None))


def log(heldout: list[float]) -> list[dict[str, float]]:
    """Return a log with held-out losses at steps 0, 10, 20 and so on, as `callbacks.LogWriter` writes it."""
    lines = [{"step": 0, "epoch": 0.0, "eval_loss": heldout[0]}]
    for number, loss in enumerate(heldout[1:]):
        lines += [{"step": 10 * number + step, "loss": 2 - 0.01 * step} for step in range(1, 11)]
        lines.append({"step": 10 * number + 10, "eval_loss": loss})
    return lines


def gap(a: str, b: str, value: float, low: float, high: float) -> Difference:
    return Difference(a, b, value, low, high, rows=6, seeds=1)


GAPS = [
    gap("base", "exp1", -0.4, -0.45, -0.35),
    gap("base", "exp2", 0.3, 0.2, 0.4),
    gap("exp1", "exp2", -0.01, -0.03, 0.02),
]
TABLES = {
    "16-bit": [
        {"module": "Linear", "parameters": 100 * 2**20, "bytes": 200 * 2**20},
        {"module": "RMSNorm", "parameters": 8, "bytes": 16},
    ],
    "NF4": [
        {"module": "Linear4bit", "parameters": 100 * 2**20, "bytes": 50 * 2**20},
        {"module": "RMSNorm", "parameters": 8, "bytes": 16},
    ],
}


def arm(loss: float, spread: float = 0.0) -> Arm:
    """Return an arm with four rows of ten tokens whose losses are spread around `loss`."""
    return Arm("", [[RowLoss(str(i), 10 * (loss + spread * (i - 1.5)), 10, 0) for i in range(4)]])


def curve(name: str, losses: dict[int, float]) -> Curve:
    return Curve(name, arm(3.0), {rows: arm(loss, 0.02) for rows, loss in losses.items()})


CURVES = [curve("equal epochs", {25: 2.5, 50: 2.4, 800: 2.0}), curve("equal steps", {25: 2.2, 50: 2.1, 800: 2.0})]
RIVALS = {"base, 16 bits": 2.6, "base, 16 bits, own template": 2.3, "base + 3 examples": 3.1}
FIGURES = {
    "token_lengths": lambda: plots.token_lengths(DATA, 64),
    "levels": lambda: plots.levels(
        {"q_proj": torch.randn(64, 100, dtype=torch.bfloat16)}, np.linspace(-1, 1, 16).tolist()
    ),
    "levels of seven layers": lambda: plots.levels(
        {f"{name}_proj": torch.randn(2, 64) for name in ("q", "k", "v", "o", "gate", "up", "down")}, [-1.0, 0.0, 1.0]
    ),
    "round_trip_errors": lambda: plots.round_trip_errors({"NF4": 9.3, "FP4": 12.1}),
    "weights_by_module": lambda: plots.weights_by_module(TABLES),
    "pass_seconds": lambda: plots.pass_seconds({"off": 0.1279, "graphs": 0.023, "compiled": 0.0148}),
    "trainable_per_layer": lambda: plots.trainable_per_layer({"q_proj": 500_000, "v_proj": 300_000}),
    "loss_curves": lambda: plots.loss_curves({"exp1": log([2.0, 1.9]), "exp2": log([2.0, 1.8, 1.7])}),
    "loss_curves of three": lambda: plots.loss_curves({name: log([2.0, 1.9]) for name in "abc"}),
    "loss_curves with a minimum": lambda: plots.loss_curves({"exp1": log([2.0, 1.8, 1.9])}),
    "differences": lambda: differences.figure(GAPS),
    "differences of long names": lambda: differences.figure(
        [gap("base, 16 bits, own template", name, 0.1, -0.1, 0.3) for name in ("200 rows, 500 steps", "1600 rows")]
    ),
    "learning_curves": lambda: learning_curve.figure(CURVES),
    "learning_curves of close losses": lambda: learning_curve.figure([curve("equal epochs", {25: 2.9999, 50: 2.9998})]),
    "learning_curves with a rival": lambda: learning_curve.figure([dataclasses.replace(CURVES[0], rivals=RIVALS)]),
}


def words(figure: Figure) -> list[str]:
    """Return every text in the panels and the legends."""
    texts = [text for axes in figure.axes for text in axes.texts]
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    return [text.get_text() for text in texts]


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_has_a_title_and_named_axes(name: str) -> None:
    figure = FIGURES[name]()
    assert isinstance(figure, Figure)
    assert figure.get_suptitle()
    assert figure.axes[-1].get_xlabel()
    assert figure.axes[0].get_ylabel() or figure.get_supylabel()


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_cut_off_at_the_edge(name: str) -> None:
    png, size = FIGURES[name]()._repr_png_()
    image = pixels(png)
    assert size["width"] == 480
    frame = np.concatenate([image[:4].ravel(), image[-4:].ravel(), image[:, :4].ravel(), image[:, -4:].ravel()])
    assert (frame == 255).all()


@pytest.mark.parametrize("name", FIGURES)
def test_a_reader_s_dark_style_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    plain = FIGURES[name]()._repr_png_()[0]
    with matplotlib.style.context(["dark_background", {"savefig.facecolor": "black"}]):
        torch.manual_seed(0)
        dark = FIGURES[name]()._repr_png_()[0]
        assert matplotlib.rcParams["text.color"] == "white"
    assert np.array_equal(pixels(plain), pixels(dark))


def test_importing_and_drawing_needs_neither_pyplot_nor_transformers() -> None:
    code = (
        "import sys; from qlora_helpers import plots; plots.round_trip_errors({'NF4': 9.0})._repr_png_(); "
        "print([name for name in ('matplotlib.pyplot', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_legend_says_how_many_rows_are_cut() -> None:
    assert words(plots.token_lengths(DATA, 64)) == [
        "train: 4 rows, 50% cut",
        "held-out: 1 row, 0% cut",
        "limit: 64 tokens",
    ]


def test_a_row_counts_with_the_tokens_that_were_cut() -> None:
    train = plots.token_lengths(DATA, 64).axes[0].patches[0].get_xy()[:, 0]
    assert train.max() == 94


def test_levels_divides_each_block_by_its_own_largest_weight() -> None:
    block = torch.linspace(-1, 1, 64)
    both = plots.levels({"w": torch.cat([block, 1000 * block])}, [-1.0, 0.0, 1.0])
    one = plots.levels({"w": block}, [-1.0, 0.0, 1.0])
    heights = [figure.axes[0].patches[0].get_data().values for figure in (both, one)]
    assert heights[0] == pytest.approx(heights[1])


def test_levels_takes_a_block_of_zeros() -> None:
    heights = plots.levels({"w": torch.zeros(128)}, [0.0]).axes[0].patches[0].get_data().values
    assert np.isfinite(heights).all()


def test_totals_stand_beside_the_bars_and_thin_classes_not_in_the_legend() -> None:
    assert words(plots.weights_by_module(TABLES)) == ["200 MiB", "50 MiB", "Linear", "Linear4bit"]


@pytest.mark.parametrize(
    ("seconds", "title"),
    [
        ({"off": 0.1334, "graphs": 0.023}, "Graphs make a pass 5.8 times as fast"),
        ({"off": 0.12, "graphs": 0.024, "compiled": 0.015}, "Compiled graphs make a pass 8.0 times as fast"),
        ({"off": 0.12, "graphs": 0.024, "compiled": 0.04}, "Graphs make a pass 5.0 times as fast"),
        ({"off": 0.5, "graphs": 0.6}, "Graphs are not faster here"),
    ],
)
def test_the_title_says_what_graphs_bought_and_the_bars_are_milliseconds(seconds: dict[str, float], title: str) -> None:
    figure = plots.pass_seconds(seconds)
    assert figure.get_suptitle() == title
    assert words(figure) == [f"{1000 * each:.0f} ms" for each in seconds.values()]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(seconds)
    assert [bar.get_width() for bar in figure.axes[0].patches] == pytest.approx([1000 * x for x in seconds.values()])


@pytest.mark.parametrize(
    ("seconds", "reason", "line", "drawn"),
    [
        ({}, "CUDA graphs need a GPU", "fast=off (CUDA graphs need a GPU).\n", False),
        ({"off": 0.12}, "capturing failed: no", "fast=off (capturing failed: no; off 120 ms a pass).\n", False),
        ({"off": 0.1, "graphs": 0.2}, "slow", "fast=off (slow; off 100 ms, graphs 200 ms a pass).\n", True),
    ],
)
def test_the_notebook_draws_passes_if_several_were_timed(capsys, seconds, reason, line, drawn) -> None:
    cells = json.loads((ROOT / "notebooks" / "05_train_exp1.ipynb").read_text("utf-8"))["cells"]
    (source,) = ("".join(cell["source"]) for cell in cells if "pass_seconds" in "".join(cell["source"]))
    *setup, last = source.splitlines()
    run = SimpleNamespace(training_path=lambda: {"path": "off", "reason": reason, "seconds": seconds})
    names = {"run": run, "plots": plots}
    exec("\n".join([*setup, f"shown = {last}"]), names)
    assert capsys.readouterr().out == line
    assert isinstance(names["shown"], Figure) == drawn


@pytest.mark.parametrize(
    ("heldout", "marked"),
    [
        ([2.0, 1.8, 1.6, 1.5], False),
        ([2.0, 1.8, 1.5, 1.7], True),
        ([2.0, 2.1], True),
        ([2.0, 1.5, 1.504], False),
        ([2.0, 1.5, 1.9, 1.4], False),
        ([2.0], False),
    ],
)
def test_overfitting_is_marked_where_the_heldout_loss_turns_up(heldout: list[float], marked: bool) -> None:
    figure = plots.loss_curves({"run": log(heldout)})
    assert ("overfitting" in words(figure)) is marked
    assert ("lowest" in words(figure)) is marked
    assert len(figure.axes[0].patches) == marked


def test_the_shade_goes_from_the_lowest_loss_to_the_last() -> None:
    shade = plots.loss_curves({"run": log([2.0, 1.5, 1.6, 1.8])}).axes[0].patches[0]
    assert (shade.get_x(), shade.get_width()) == (10, 20)


def test_only_the_run_that_overfits_is_marked() -> None:
    figure = plots.loss_curves({"a": log([2.0, 1.5]), "b": log([3.0, 2.5, 2.9])})
    assert [len(axes.patches) for axes in figure.axes] == [0, 1]
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()


def test_the_weights_that_keep_best_went_back_to_do_not_hide_overfitting() -> None:
    lines = [*log([2.0, 1.5, 1.9]), {"step": 20, "eval_loss": 1.5}]
    assert "overfitting" in words(plots.loss_curves({"run": lines}))


def test_two_runs_stand_side_by_side_and_three_in_a_column() -> None:
    def corners(n: int) -> list[tuple[float, float]]:
        axes = plots.loss_curves({str(i): log([2.0, 1.9]) for i in range(n)}).axes
        return [(round(a.get_position().x0, 3), round(a.get_position().y0, 3)) for a in axes]

    assert len({y for _, y in corners(2)}) == 1
    assert len({x for x, _ in corners(3)}) == 1


def test_of_many_runs_the_first_are_drawn_and_the_title_says_so() -> None:
    figure = plots.loss_curves({str(i): log([2.0, 1.9]) for i in range(plots.PANELS + 5)})
    assert [axes.get_title() for axes in figure.axes] == [str(i) for i in range(plots.PANELS)]
    said = f"The held-out loss fell in every run,\nthe first {plots.PANELS} of {plots.PANELS + 5} runs"
    assert figure.get_suptitle() == said


@pytest.mark.parametrize(
    ("heldout", "title"),
    [
        ([[2.0]], "Loss during training"),
        ([[2.0, 1.5], [2.0, 2.001]], "Loss during training"),
        ([[2.0, 1.5]], "The held-out loss fell"),
        ([[2.0, 1.5, 1.8], [2.0, 1.9]], "Overfitting: the held-out loss rises again\nin 1 of 2 runs"),
        ([[2.0, 2.2]], "Overfitting: the held-out loss rises again"),
    ],
)
def test_the_title_says_what_the_heldout_losses_did(heldout: list[list[float]], title: str) -> None:
    assert plots.loss_curves({str(i): log(one) for i, one in enumerate(heldout)}).get_suptitle() == title


@pytest.mark.parametrize(("steps", "label"), [(plots.SMOOTHED - 1, "training"), (plots.SMOOTHED, "training, smoothed")])
def test_a_short_run_is_not_smoothed_and_not_called_so(steps: int, label: str) -> None:
    losses = [2 + number % 3 for number in range(steps)]
    lines = [{"step": number, "loss": loss} for number, loss in enumerate(losses)]
    drawn = {line.get_label(): line for line in plots.loss_curves({"run": lines}).axes[0].lines}[label]
    assert (list(drawn.get_ydata()) == losses) is (label == "training")


@pytest.mark.parametrize(("levels", "share"), [([-1.0, -0.25, 0.25, 1.0], 0.25), ([-1.0, -0.5, 0.5, 1.0], 0.5)])
def test_the_title_says_which_share_of_the_weights_the_inner_levels_cover(levels: list[float], share: float) -> None:
    figure = plots.levels({"w": torch.linspace(-1, 1, 64)}, levels)
    assert figure.get_suptitle() == f"The inner half of the levels\ncovers {share:.0%} of the weights"


def test_titles_of_sizes_and_errors_are_computed() -> None:
    assert plots.weights_by_module(TABLES).get_suptitle() == "{}: 75% less memory than {}".format(*reversed(TABLES))
    assert plots.round_trip_errors({"NF4": 9.3, "FP4": 12.1}).get_suptitle() == "NF4 changes the weights least"
    assert plots.token_lengths(DATA, 64).get_suptitle() == "2 of 4 training rows over the limit"


def test_one_wild_step_does_not_flatten_the_curves() -> None:
    lines = [*log([2.0, 1.9, 1.8, 1.7, 1.6, 1.5]), {"step": 51, "loss": 90.0}]
    low, high = plots.loss_curves({"run": lines}).axes[0].get_ylim()
    assert low < 1.5
    assert high < 40


def test_differences_names_the_sides_and_the_verdicts() -> None:
    figure = differences.figure(GAPS)
    assert words(figure) == [
        *("exp1", "vs base: better", "exp2", "vs base: worse", "vs exp1: not distinguishable"),
        *("← better", "worse →"),
    ]
    heights = {text.get_text(): text.get_position()[1] for text in figure.axes[0].texts}
    assert [heights["exp1"], heights["exp2"]] == [0, 2]
    marks = [line.get_ydata()[0] for line in figure.axes[0].lines[:3]]
    assert marks == [pytest.approx(heights[words(figure)[i]] + 0.45) for i in (1, 3, 4)]
    assert figure.get_suptitle() == "Comparisons:\n1 better, 1 not distinguishable, 1 worse"
    assert words(differences.figure(GAPS[:2]))[:3] == ["vs base", "exp1: better", "exp2: worse"]
    assert differences.figure(GAPS[:1]).get_suptitle() == "The comparison:\n1 better"
    left, right = figure.axes[0].get_xlim()
    assert left < -0.45
    assert right > 0.4


def test_differences_takes_an_interval_without_end() -> None:
    gaps = [gap("base", "exp1", -0.4, -np.inf, np.inf), gap("a", "b", 0, 0, 0)]
    left, right = differences.figure(gaps).axes[0].get_xlim()
    assert left < -0.4 < 0 < right < np.inf


def test_learning_curves_show_losses_below_the_base_model_s() -> None:
    figure = learning_curve.figure(CURVES)
    axes = figure.axes[0]
    assert words(figure) == ["base model", "equal epochs", "equal steps"]
    assert list(axes.lines[0].get_ydata()) == [3.0, 3.0]
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["25", "50", "800"]
    for bars, points in zip(axes.containers, CURVES, strict=True):
        x, y = bars[0].get_data()
        assert dict(zip(x, y, strict=True)) == pytest.approx({n: 3 + d.value for n, d in points.points.items()})
        (ends,) = bars[2]
        assert [s[:, 1] for s in ends.get_segments()] == [
            pytest.approx([3 + d.low, 3 + d.high]) for d in points.points.values()
        ]
    wedge = axes.collections[1].get_paths()[0].vertices  # after the first curve's bars
    last, outlook = 3 + CURVES[0].points[800].value, CURVES[0].next_doubling
    assert outlook is not None
    assert {round(y, 9) for x, y in wedge if x == 1600} == {round(last + outlook.low, 9), round(last, 9)}
    assert {round(y, 9) for x, y in wedge if x == 800} == {round(last, 9)}


def test_four_sizes_show_the_law_and_its_band_up_to_the_next_doubling() -> None:
    four = curve("four", {100: 2.5, 200: 2.4, 400: 2.33, 800: 2.28})
    band = learning_curve.figure([four]).axes[0].collections[1].get_paths()[0].vertices
    assert four.law is not None
    ends = four.law.at(1600)
    assert min(y for x, y in band if x > 1599.9) == pytest.approx(3 + ends.low)
    assert max(y for x, y in band if x > 1599.9) == pytest.approx(3 + ends.high)


def test_save_writes_300_dpi_and_leaves_nothing_else(tmp_path) -> None:
    path = tmp_path / "new" / "figures" / "errors.png"
    for _ in range(2):
        assert plots.save(plots.round_trip_errors({"NF4": 9.3}), path) == path
    image = Image.open(path)
    assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
    assert image.size[0] == 1440
    assert list(path.parent.iterdir()) == [path]


def test_save_keeps_the_old_file_when_drawing_fails(tmp_path) -> None:
    path = plots.save(plots.round_trip_errors({"NF4": 9.3}), tmp_path / "errors.png")
    before = path.read_bytes()
    drawn = plots.round_trip_errors({"NF4": 9.3})
    with pytest.raises(ValueError, match="Parse"):
        plots.save(drawn.suptitle("$\\nonsense{$", parse_math=True).get_figure(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


class FakeNotebook:
    """A stand-in for IPython's display that records each figure and how it was shown."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Figure]] = []
        self.now = 100.0

    def display(self, figure: Figure, display_id: bool) -> "FakeNotebook":
        assert display_id
        self.calls.append(("display", figure))
        return self

    def update(self, figure: Figure) -> None:
        self.calls.append(("update", figure))


@pytest.fixture
def notebook(monkeypatch) -> FakeNotebook:
    fake = FakeNotebook()
    shell = SimpleNamespace(kernel=object())
    ipython = SimpleNamespace(get_ipython=lambda: shell, version_info=(9, 0))  # Matplotlib reads the version
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=fake.display))
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: fake.now))
    return fake


def state(lines: list[dict[str, float]], steps: int = 30) -> SimpleNamespace:
    return SimpleNamespace(log_history=lines, global_step=lines[-1]["step"], max_steps=steps)


def drawn(figure: Figure) -> tuple[list[float], list[float]]:
    """Return the steps of the training losses and of the held-out line."""
    training, *_, heldout = (line for line in figure.axes[0].lines if line.get_label() != "lowest")
    return list(training.get_xdata()), list(heldout.get_xdata())


def test_live_loss_is_a_trainer_callback(tmp_path) -> None:
    from transformers import TrainerCallback

    assert isinstance(callbacks.LiveLoss(RunFolder(tmp_path)), TrainerCallback)


def test_live_loss_keeps_to_one_display_and_to_two_seconds(tmp_path, notebook) -> None:
    callback, lines = callbacks.LiveLoss(RunFolder(tmp_path)), log([2.0, 1.9, 1.8, 1.7])[1:]
    callback.on_log(None, state(lines[:1]), None)
    notebook.now += 1.9
    callback.on_log(None, state(lines[:2]), None)
    assert [how for how, _ in notebook.calls] == ["display"]
    notebook.now += 0.2
    callback.on_evaluate(None, state(lines[:11]), None)
    callback.on_train_end(None, state(lines), None)
    assert [how for how, _ in notebook.calls] == ["display", "update", "update"]
    assert drawn(notebook.calls[-1][1]) == (list(range(1, 31)), [10, 20, 30])


def test_live_loss_shows_an_evaluation_after_the_end(tmp_path, notebook) -> None:
    callback, lines = callbacks.LiveLoss(RunFolder(tmp_path)), log([2.0, 1.9, 1.8, 1.7])[1:]
    callback.on_train_end(None, state(lines[:-1]), None)
    callback.on_evaluate(None, state(lines), None)
    assert drawn(notebook.calls[-1][1])[1] == [10, 20, 30]


def test_live_loss_starts_from_the_loss_before_training(tmp_path, notebook) -> None:
    lines = log([2.0, 1.9])
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:4]))
    callbacks.LiveLoss(RunFolder(tmp_path)).on_log(None, state(lines[1:5]), None)
    assert drawn(notebook.calls[0][1]) == ([1, 2, 3, 4], [0])


@pytest.mark.parametrize("shell", [None, SimpleNamespace()])
def test_live_loss_is_silent_without_a_kernel(tmp_path, notebook, monkeypatch, shell) -> None:
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: shell)
    callback = callbacks.LiveLoss(RunFolder(tmp_path))
    for event in (callback.on_log, callback.on_evaluate, callback.on_train_end):
        event(None, state(log([2.0, 1.9])), None)
    assert notebook.calls == []


def test_live_loss_does_not_import_ipython(tmp_path, monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    real = builtins.__import__

    def refuse(name: str, *args: object, **kwargs: object) -> object:
        assert not name.startswith("IPython")
        return real(name, *args, **kwargs)

    callback = callbacks.LiveLoss(RunFolder(tmp_path))
    monkeypatch.setattr(builtins, "__import__", refuse)
    callback.on_train_end(None, state(log([2.0, 1.9])), None)


def test_live_loss_takes_a_small_share_of_the_time(tmp_path, notebook, monkeypatch) -> None:
    """A drawing of 3 s, as of 100,000 steps, is not repeated every 2 s."""
    draw = callbacks.plots.loss_curves

    def slowly(logs: dict[str, list[dict[str, float]]]) -> Figure:
        notebook.now += 3
        return draw(logs)

    monkeypatch.setattr(callbacks.plots, "loss_curves", slowly)
    callback, lines = callbacks.LiveLoss(RunFolder(tmp_path)), log([2.0, 1.9])[1:]
    began = notebook.now
    for _ in range(1000):
        notebook.now += 1
        callback.on_log(None, state(lines), None)
    assert 2 <= len(notebook.calls) <= 7
    assert 3 * (len(notebook.calls) - 1) < 0.02 * (notebook.now - began)
    callback.on_train_end(None, state(lines), None)
    assert len(notebook.calls) <= 8


def test_live_loss_reads_the_log_once_and_survives_a_damaged_one(tmp_path, notebook) -> None:
    lines = log([2.0, 1.9])
    (tmp_path / "log.jsonl").write_text('{"step": 0, "eval_')
    callback = callbacks.LiveLoss(RunFolder(tmp_path))
    callback.on_train_end(None, state(lines[1:5]), None)
    (tmp_path / "log.jsonl").write_text(json.dumps(lines[0]) + "\n")
    callback.on_train_end(None, state(lines[1:5]), None)
    (tmp_path / "log.jsonl").unlink()
    callback.on_train_end(None, state(lines[1:5]), None)
    assert [drawn(figure)[1] for _, figure in notebook.calls] == [[], [0], [0]]


@pytest.mark.parametrize(
    ("rivals", "drawn"), [(RIVALS, "best rival:\nbase, 16 bits, own template"), ({"few": 3.1}, "")]
)
def test_the_curve_shows_the_best_rival_if_it_beats_the_base_model(rivals: dict[str, float], drawn: str) -> None:
    figure = learning_curve.figure([dataclasses.replace(CURVES[0], rivals=rivals)])
    assert [text for text in words(figure) if "rival" in text] == [drawn] * bool(drawn)
    assert any(list(line.get_ydata()) == [2.3, 2.3] for line in figure.axes[0].lines) == bool(drawn)
