"""A batch on several GPUs: runs at once see different GPUs, and one that fails leaves the others."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import nbformat
import pytest

from qlora_helpers import __main__
from qlora_helpers.experiments import series

ROOT = Path(__file__).parents[2]
# Stands in for notebook 05. Runs 1 and 2 wait for each other, which only ends if they are trained at once.
WORK = """import os, pathlib, time
folder = pathlib.Path(workdir)
(folder / f"gpu-{n_samples}").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
while not all((folder / f"gpu-{n}").exists() for n in (1, 2)):
    time.sleep(0.05)
if n_samples == 2:
    raise ValueError("two is not allowed")
(folder / run_name / "metrics.json").write_text("{}")"""
# The spawned processes import this file too, and with it the two stand-ins.
BATCH = """
import sys
from pathlib import Path
from types import SimpleNamespace

from qlora_helpers import UserError
from qlora_helpers.experiments import series
from qlora_helpers.runs import RunFolder

folder = Path(sys.argv[1])
series.notebooks_folder = lambda: folder
series.visible_gpus = lambda: ["4", "6"]
if __name__ == "__main__":
    needed = [
        SimpleNamespace(
            experiment=f"n{n}",
            run=RunFolder(folder / f"n{n}"),
            folder=folder,
            config=SimpleNamespace(params={"n_samples": n}),
        )
        for n in (1, 2, 3)
    ]
    try:
        series.train(needed)
    except UserError as error:
        sys.exit(f"UserError: {error}")
"""


def test_runs_at_once_see_different_gpus_and_a_failed_one_leaves_the_others(tmp_path):
    cells = [
        nbformat.v4.new_code_cell("n_samples: int = 0  # rows", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(WORK),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "python3"}
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.write(notebook, tmp_path / "05_train_exp1.ipynb")
    (tmp_path / "batch.py").write_text(textwrap.dedent(BATCH))
    command = [sys.executable, str(tmp_path / "batch.py"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert {path.parent.name for path in tmp_path.glob("*/metrics.json")} == {"n1", "n3"}, done.stdout + done.stderr
    assert {(tmp_path / f"gpu-{n}").read_text() for n in (1, 2)} == {"4", "6"}
    failed = nbformat.read(tmp_path / "n2" / "notebook.ipynb", as_version=4)
    assert any(out.get("ename") == "ValueError" for cell in failed.cells for out in cell.get("outputs", []))
    assert "UserError: batch: 1 of 3 runs failed (n2); the others are finished. Fix: " in done.stderr
    lines = done.stdout.splitlines()
    assert sorted(line.split(" in ")[0] for line in lines if "failed" not in line) == [
        "[1/3] n1: begins", "[1/3] n1: done", "[2/3] n2: begins", "[3/3] n3: begins", "[3/3] n3: done",
    ]  # fmt: skip
    assert sum(line.startswith("[2/3] n2: failed: ") and "two is not allowed" in line for line in lines) == 1


@pytest.mark.parametrize(
    ("named", "number", "gpus"),
    [(None, 0, []), ("", 0, []), (None, 2, ["0", "1"]), ("4,6", 2, ["4", "6"]), ("3,99", 1, ["3"])],
)
def test_the_gpus_of_this_process_are_those_it_was_given(monkeypatch, named, number, gpus):
    import torch

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    assert series.visible_gpus() == gpus


def test_fewer_than_one_run_at_a_time_is_refused(capsys, tmp_path):
    assert __main__.main(["batch", "--samples", "4", "--parallel", "0", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "error: parallel: 0 is too small. Fix: use 1 or more.\n"
    assert not (tmp_path / "out").exists()
