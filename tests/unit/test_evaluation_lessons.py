"""The figures that explain show what their text claims, and a reader's changes show in them."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_helpers import notebook
from qlora_helpers.evaluation import comparison, intervals, lessons
from qlora_helpers.evaluation.intervals import Interval

TEXT = "A variable is a name for a value. A list is a row of values. " * 40
FALLING_THEN_RISING = [2.0, 1.8, 1.7, 1.75, 1.72, 1.8, 1.9]


def log(losses: list[float]) -> list[dict[str, float]]:
    """Return a log with two steps in each epoch and a held-out loss at its end."""
    lines = [{"step": 0, "epoch": 0.0, "eval_loss": 9.0}]
    for epoch, loss in enumerate(losses, 1):
        lines += [{"step": 2 * epoch - 1, "epoch": epoch - 0.5, "loss": 1.0}]
        lines += [{"step": 2 * epoch, "epoch": float(epoch), "loss": 3.0}]
        lines += [{"step": 2 * epoch, "epoch": float(epoch), "eval_loss": loss}]
    return lines


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_rate_may_be_too_low_right_or_too_high() -> None:
    low, right, high = (lessons.tiny_losses(TEXT, rate) for rate in (1e-3, 3e-2, 1.0))
    assert low[0] == right[0] == high[0]
    assert low[0] > low[-1] > right[-1] + 1
    assert max(high) > 2 * high[0]


def test_the_title_names_the_rate_that_ends_lowest() -> None:
    figure = lessons.learning_rates({0.5: [1.0] * 10 + [3.0] * 10, 0.25: [4.0] * 10 + [2.0] * 10})
    assert figure.get_suptitle() == "Of these learning rates, 0.25 ends lowest"
    assert legend(figure) == ["0.5", "0.25"]


@pytest.mark.parametrize(("patience", "position"), [(1, 3), (2, 4), (3, 5), (4, 6), (5, None)])
def test_training_stops_after_evaluations_without_a_new_low(patience, position) -> None:
    assert lessons.stopped(FALLING_THEN_RISING, patience) == position


@given(st.lists(st.sampled_from([1.0, 1.5, 2.0, 2.5]), max_size=12), st.integers(1, 4))
def test_it_stops_where_transformers_stops(losses, patience) -> None:
    callback, control = EarlyStoppingCallback(patience), TrainerControl()
    state, found = TrainerState(), None
    arguments = TrainingArguments(metric_for_best_model="loss", greater_is_better=False, use_cpu=True)
    for position, loss in enumerate(losses):
        callback.check_metric_value(arguments, state, control, loss)
        if callback.early_stopping_patience_counter >= patience:
            found = position
            break
        if state.best_metric is None or loss < state.best_metric:  # as the trainer does, after the callback
            state.best_metric = loss
    assert lessons.stopped(losses, patience) == found


def test_early_stopping_marks_the_lowest_loss_and_the_stop() -> None:
    figure = lessons.early_stopping(log(FALLING_THEN_RISING), 2)
    training, measured, lowest, stop = figure.axes[0].lines
    assert figure.get_suptitle() == "Held-out loss: lowest after epoch 3 of 7"
    assert list(training.get_ydata()) == [2.0] * 7
    assert list(measured.get_ydata()) == FALLING_THEN_RISING
    assert (lowest.get_xdata()[0], lowest.get_ydata()[0]) == (3, 1.7)
    assert stop.get_xdata()[0] == 5


def test_a_run_that_never_stops_early_has_no_mark() -> None:
    assert legend(lessons.early_stopping(log([2.0, 1.8, 1.7]), 1)) == ["training", "not trained on", "lowest: kept"]


def test_the_recorded_run_of_many_epochs_overfits_and_the_one_of_many_rows_does_not() -> None:
    """Notebook 09 says so about these two."""
    found = {}
    for name in ("n100-epochs20-seed0", "n1600-seed0"):
        lines = [json.loads(line) for line in (notebook.recorded() / name / "log.jsonl").read_text().splitlines()]
        found[name] = lessons.early_stopping(lines, 3)
    assert "patience 3: stop" in legend(found["n100-epochs20-seed0"])
    assert found["n1600-seed0"].get_suptitle() == "Held-out loss: lowest after epoch 5 of 5"


def test_draws_shows_every_loss_and_the_widest_range() -> None:
    figure = lessons.draws({"a": [1.0, 1.25], "b": [2.0, 2.5, 2.25]})
    assert "0.500" in figure.get_suptitle()
    assert [sorted(line.get_xdata()) for line in figure.axes[0].lines] == [[1.0, 1.25], [2.0, 2.25, 2.5]]


def test_the_recorded_verdicts_turn_from_worse_to_better_with_the_rows() -> None:
    """Notebook 09 says so, and that against three examples in the prompt every adapter looks good."""
    study = comparison.read(notebook.recorded())
    rows = {model.name: model.train_rows for model in study.table if model.epochs == 5}
    turning = [d.verdict for d in sorted(study.headlines, key=lambda d: rows.get(d.b, 0)) if d.b in rows]
    assert (turning[0], turning[-1]) == ("worse", "better")
    order = ["worse", "not distinguishable", "better"]
    assert all(order.index(a) <= order.index(b) for a, b in pairwise(turning))
    assert {d.verdict for d in study.differences if d.a == comparison.FEW_SHOT} == {"better"}


def test_an_interval_that_misses_the_truth_stands_out() -> None:
    figure = lessons.coverage([Interval(0.0, -1, 1), Interval(3.0, 2, 4), Interval(0.5, 0, 1)], 0.25)
    hit, missed, *_ = figure.axes[0].lines
    assert figure.get_suptitle() == "2 of 3 intervals contain the truth"
    assert list(hit.get_xdata()) == [0.0, 0.5]
    assert list(missed.get_xdata()) == [3.0]


@pytest.mark.parametrize("rows", [100, 25])
def test_about_38_of_40_intervals_contain_the_truth(rows) -> None:
    """What notebook 07 shows, with the rows that it has and those that it asks the reader to try."""
    gaps = np.random.default_rng(0).normal(-0.02, 0.1, (40, rows))
    found = [intervals.ratio(gap, np.ones(rows)) for gap in gaps]
    assert 36 <= sum(interval.low <= -0.02 <= interval.high for interval in found) <= 40


@pytest.mark.parametrize(
    "figure",
    [
        lambda: lessons.learning_rates({0.1: [3.0, 2.0], 1.0: [3.0, 5.0]}),
        lambda: lessons.early_stopping(log(FALLING_THEN_RISING), 1),
        lambda: lessons.draws({"100 rows, 500 steps": [1.0, 1.25], "b": [2.0]}),
        lambda: lessons.coverage([Interval(0.0, -1, 1), Interval(3.0, 2, 4)], 0.25),
    ],
)
def test_a_figure_has_a_title_and_named_axes(figure) -> None:
    drawn = figure()
    assert drawn.get_suptitle()
    assert drawn.axes[0].get_xlabel()
    assert drawn.axes[0].get_ylabel()
