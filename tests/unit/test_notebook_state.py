"""What cells leave in a notebook: after an interrupt, when run twice, and out of order."""

import gc
import json
import sys
import weakref

import pytest
from transformers import TrainerCallback

from qlora_helpers import UserError, device
from qlora_helpers.experiments import series
from qlora_helpers.runs import RunFolder
from qlora_helpers.training import trainer


@pytest.fixture
def shell(monkeypatch, tmp_path):
    """IPython's own shell, which keeps errors as it does in a notebook."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    settings = Config()
    settings.HistoryManager.enabled = False
    yield InteractiveShell(config=settings)
    for name in ("last_type", "last_value", "last_traceback", "last_exc"):
        vars(sys).pop(name, None)


class Watch(TrainerCallback):
    """Keeps weak references to the models that are trained, and notes how many are left when a run begins."""

    def __init__(self):
        self.models, self.left = [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        gc.collect()
        self.left.append(sum(known() is not None for known in self.models))
        self.models.append(weakref.ref(model))


class Interrupt(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        raise KeyboardInterrupt


def test_the_model_of_an_interrupted_cell_is_freed_before_the_next_run(
    shell, config, data, tokenizer, tmp_path, capsys
):
    watch = Watch()

    def train(*callbacks):
        own = config.replace(max_new_tokens=1)
        return trainer.train(own, data, tokenizer, RunFolder(tmp_path / "run"), [watch, *callbacks])

    shell.user_ns |= {"train": train, "stop": Interrupt()}
    assert isinstance(shell.run_cell("train(stop)").error_in_exec, KeyboardInterrupt)
    gc.collect()
    assert watch.models[0]() is not None  # the fault: IPython keeps it
    assert shell.run_cell("run = train()").success
    assert watch.left == [0, 0]
    assert shell.user_ns["run"].finished


CHAINED = """
def fill():
    large = Large()
    kept.append(weakref.ref(large))
    raise KeyError

def fail(again):
    try:
        again()
    except KeyError:
        fill()

fail(lambda: fail(fill))
"""


def test_frames_of_errors_behind_the_last_one_are_freed_too(shell, capsys):
    shell.user_ns |= {"Large": type("Large", (), {}), "kept": [], "weakref": weakref}
    assert isinstance(shell.run_cell(CHAINED).error_in_exec, KeyError)
    kept = shell.user_ns["kept"]
    assert [known() is None for known in kept] == [False] * 3
    device.free_last_error()
    assert [known() is None for known in kept] == [True] * 3


def test_freeing_the_last_error_changes_no_variable_of_the_notebook(shell, capsys):
    shell.run_cell("kept = [1]\n1 / 0")
    device.free_last_error()
    assert shell.user_ns["kept"] == [1]
    assert isinstance(sys.last_value, ZeroDivisionError)


def test_an_error_that_causes_itself_ends_the_search(monkeypatch):
    error = ValueError()
    error.__cause__ = error
    monkeypatch.setattr(sys, "last_value", error, raising=False)
    device.free_last_error()


@pytest.mark.slow
def test_cells_run_twice_or_out_of_order_end_in_the_same_run(shell, model_folder, tmp_path, capsys):
    """Notebook 05: first from the bottom up, where cells fail on a missing name, then each cell twice."""
    notebook = json.loads((series.notebooks_folder() / "05_train_exp1.ipynb").read_text("utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    own = {"profile": "cpu", "model": str(model_folder), "workdir": str(tmp_path), "n_samples": 8, "n_heldout": 4}
    place = next(number for number, cell in enumerate(cells) if cell.startswith("# Parameters"))
    cells.insert(place + 1, "# Parameters\n" + "".join(f"{name} = {value!r}\n" for name, value in own.items()))
    for cell in reversed(cells):
        error = shell.run_cell(cell, store_history=True).error_in_exec
        assert error is None or isinstance(error, NameError | UserError)
    assert not list(tmp_path.glob("*/config.json"))
    noted = []
    for cell in cells:
        for _ in range(2):
            assert shell.run_cell(cell, store_history=True).success, capsys.readouterr().out
            run = shell.user_ns.get("run")
            noted += [(run / "metrics.json").stat().st_mtime_ns] if run and run.finished else []
    assert len(set(noted)) == 1
    assert [path.parent.name for path in tmp_path.glob("*/metrics.json")] == ["exp1"]
