"""Batches without a front end: a failing notebook is named with its cell, does not stop others, and prints little."""

from types import SimpleNamespace

import nbformat
import pytest

from qlora_helpers import __main__
from qlora_helpers.experiments import series
from qlora_helpers.runs import RunFolder

WORK = """import json, pathlib
from qlora_helpers.errors import UserError
folder = pathlib.Path(workdir) / run_name
if n_samples == 8:
    raise ValueError("a row\\nlike no other")
if n_samples == 9:
    raise UserError("rows: too few. Fix: more.")
(folder / "metrics.json").write_text(json.dumps(RESULT | {"train_rows": n_samples}))"""
RESULT = {"seed": 0, "steps": 1, "base_eval_loss": 2.0, "eval_loss": 1.0, "seconds": 3}


@pytest.fixture
def batch(tmp_path, monkeypatch):
    """Function that runs a batch and returns its exit code.

    A stand-in replaces notebook 05. It fails with 8 and with 9 rows.
    """
    cells = [
        nbformat.v4.new_code_cell("# Parameters\nn_samples: int = 1  # rows", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(f"RESULT = {RESULT!r}"),
        nbformat.v4.new_code_cell(WORK),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "python3"}
    notebook.metadata["language_info"] = {"name": "python"}
    (tmp_path / "notebooks").mkdir()
    nbformat.write(notebook, tmp_path / "notebooks" / "05_train_exp1.ipynb")
    monkeypatch.setattr(series, "notebooks_folder", lambda: tmp_path / "notebooks")

    def run_batch(*samples):
        runs = [RunFolder(tmp_path / "out" / f"n{n}") for n in samples]
        needed = [
            SimpleNamespace(
                experiment=run.name,
                run=run,
                folder=tmp_path / "out",
                config=SimpleNamespace(params={"n_samples": n}),
            )
            for n, run in zip(samples, runs, strict=True)
        ]

        def batch_of_these(**args):
            return [run for group in series.train(needed).values() for run in group]

        monkeypatch.setattr(series, "run_batch", batch_of_these)
        return __main__.main(["batch", "--samples", "4", "--out", str(tmp_path / "out")])

    return run_batch


def test_failures_are_named_and_do_not_stop_other_runs(batch, tmp_path, capsys):
    assert batch(4, 8, 9, 12) == 2
    captured = capsys.readouterr()
    assert [path.parent.name for path in sorted((tmp_path / "out").glob("*/metrics.json"))] == ["n12", "n4"]
    failed = [line for line in captured.out.splitlines() if "failed" in line]
    assert len(failed) == 2
    assert failed[0].startswith("[2/4] n8: failed: notebook 05_train_exp1, cell 4: ValueError: like no other.")
    assert str(tmp_path / "out" / "n8" / "notebook.ipynb") in failed[0]
    assert failed[1] == "[3/4] n9: failed: rows: too few. Fix: more. (Notebook 05_train_exp1, cell 4.)"
    assert captured.err.count("\n") == 1
    assert "2 of 4 runs failed (n8, n9)" in captured.err
    executed = nbformat.read(tmp_path / "out" / "n8" / "notebook.ipynb", as_version=4)
    assert any(output.output_type == "error" for cell in executed.cells for output in cell.get("outputs", []))


def test_unwatched_notebook_prints_two_lines(batch, capsys):
    assert batch(4, 5) == 0
    captured = capsys.readouterr()
    lines = captured.out.split("| run |")[0].strip().splitlines()
    assert [line.split(": ")[0] for line in lines] == ["[1/2] n4", "[1/2] n4", "[2/2] n5", "[2/2] n5"]
    assert [line.split(": ")[1].split(" in ")[0] for line in lines] == ["begins", "done", "begins", "done"]
    assert "\r" not in captured.out + captured.err
