"""Progress of a run: a bar where someone watches, a few lines where nobody does."""

import io
import sys
from types import SimpleNamespace

import pytest

from qlora_helpers.data import cleaning
from qlora_helpers.planning import step_time
from qlora_helpers.runs import RunFolder
from qlora_helpers.training import callbacks, trainer

STEPS = range(21, 101)


class Screen(io.StringIO):
    """Standard output, as a terminal or as a file."""

    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.fixture
def clock(monkeypatch):
    """The time, which a test can set."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


@pytest.fixture
def show(clock, monkeypatch):
    """Return a function that shows a run of 100 steps from step 20 on, 2 s each, on a terminal or in a file."""

    def run_it(terminal, steps=STEPS):
        screen = Screen(terminal)
        monkeypatch.setattr(sys, "stdout", screen)
        callback, state = callbacks.Progress(), SimpleNamespace(global_step=20, max_steps=100)
        callback.on_train_begin(None, state, None)
        for step in steps:
            clock.seconds += 2
            state.global_step = step
            callback.on_log(None, state, None, logs={"loss": 3 - step / 100, "grad_norm": 1.0})
            if step % 50 == 0:
                callback.on_log(None, state, None, logs={"eval_loss": 2.5})
        callback.on_train_end(None, state, None)
        callback.on_log(None, state, None, logs={"eval_loss": 2.4})
        return screen.getvalue()

    return run_it


def test_a_file_gets_a_line_now_and_then(show):
    lines = show(terminal=False).splitlines()
    assert lines == [
        "step 35 of 100, loss 2.650, about 2 min left",
        "step 50 of 100, loss 2.500, about 2 min left",
        "step 65 of 100, loss 2.350, held-out 2.500, about 70 s left",
        "step 80 of 100, loss 2.200, held-out 2.500, about 40 s left",
        "step 95 of 100, loss 2.050, held-out 2.500, about 10 s left",
        "step 100 of 100, loss 2.000, held-out 2.500",
    ]


def test_a_terminal_gets_one_line_that_changes(show):
    text = show(terminal=True)
    assert text.count("\n") == 1
    assert text.endswith("step 100 of 100, loss 2.000, held-out 2.500\n")
    assert text.count("\r") > 50


def test_a_notebook_gets_one_bar_that_moves(show, monkeypatch):
    bars = []
    handle = SimpleNamespace(update=bars.append)

    def display(bar, display_id):
        assert display_id
        bars.append(bar)
        return handle

    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object())))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    assert show(terminal=False) == ""
    assert 'value="21" max="100"' in bars[0]._repr_html_()
    assert "about 3 min left" in bars[0]._repr_html_()
    assert repr(bars[-1]) == "step 100 of 100, loss 2.000, held-out 2.500"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "1 s"), (89, "89 s"), (91, "2 min"), (5300, "88 min"), (9000, "2.5 h")]
)
def test_durations(seconds, words):
    assert step_time.in_words(seconds) == words


def test_a_run_without_a_screen_prints_one_line_of_progress(config, tokenizer, tmp_path, capfd):
    short = config.replace(epochs=1)
    data = cleaning.prepare(short, tokenizer)
    capfd.readouterr()
    trainer.train(short, data, tokenizer, RunFolder(tmp_path / "run"))
    said = capfd.readouterr()
    assert "it/s" not in said.err
    assert said.out.count("step ") == 1
    rivals, before, bar, after, end = said.out.splitlines()  # slow work besides the steps is announced
    assert rivals.startswith("Measuring the base model in 16 bits")
    assert before.startswith("Measuring the base model, once")
    assert bar.startswith("step 4 of 4, loss ")
    assert after.startswith("Training is done.")
    assert end == "run is finished and saved."
    assert "grad_norm" not in said.out
