"""Notebooks alone in an empty work folder, and killed runs that resume. Each test takes minutes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jupyter_client
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
SMALL = {"profile": "cpu", "n_heldout": 4, "epochs": 1}
SAMPLES = {
    "07_compare": {"n_samples_1": 4, "n_samples_2": 8},
    "09_how_much_data": {"sample_counts": [4, 8]},
    "13_libraries_alone": {"n_samples": 4, "dataset": ROOT / "data" / "conversations.jsonl"},
}


def papermill(name, folder, **params):
    words = [sys.executable, "-m", "papermill", str(ROOT / "notebooks" / f"{name}.ipynb"), str(folder / "out.ipynb")]
    for key, value in params.items():
        words += ["-y", f"{key}: {value}"] if isinstance(value, list) else ["-p", key, str(value)]
    env = {key: value for key, value in os.environ.items() if key != "QLORA_WORKDIR"}
    return subprocess.Popen(
        [*words, "-k", "python3"], cwd=folder, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def test_the_bundled_model_learns_from_one_step(tmp_path):
    """As `make run` trains it, on fewer rows. Its loss is far below that of random weights, 10.8."""
    run = papermill("05_train_exp1", tmp_path, **SMALL, n_samples=4, workdir=tmp_path / "work")
    _, stderr = run.communicate()
    assert run.returncode == 0, stderr[-2000:]
    metrics = json.loads((tmp_path / "work" / "exp1" / "metrics.json").read_text())
    assert metrics["steps"] == 1
    assert 1 < metrics["eval_loss"] < metrics["base_eval_loss"] < 5


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")))
def test_each_notebook_runs_alone(tmp_path, name):
    params = SMALL | SAMPLES.get(name, {"n_samples": 4}) | {"workdir": tmp_path / "work"}
    run = papermill(name, tmp_path, **params)
    _, stderr = run.communicate()
    assert run.returncode == 0, stderr[-2000:]


@pytest.mark.slow
def test_notebook_07_shows_the_recorded_study_without_runs_of_its_own(tmp_path):
    run = papermill("07_compare", tmp_path, profile="cpu", which_runs="recorded", workdir=tmp_path / "work")
    _, stderr = run.communicate()
    assert run.returncode == 0, stderr[-2000:]
    assert "1600 rows" in (tmp_path / "out.ipynb").read_text("utf-8")
    assert not list((tmp_path / "work").glob("exp*"))


@pytest.mark.slow
def test_killed_run_resumes_and_ends_with_the_same_adapter(tmp_path):
    adapters = []
    for kill in (False, True):
        folder = tmp_path / f"kill-{kill}"
        folder.mkdir()
        params = SMALL | {"n_samples": 16, "save_steps": 1, "workdir": folder / "work"}
        run = papermill("05_train_exp1", folder, **params)
        if kill:
            while not (folder / "work" / "exp1" / "checkpoints" / "checkpoint-2" / "complete.json").exists():
                assert run.poll() is None
                time.sleep(0.05)
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            assert not (folder / "work" / "exp1" / "metrics.json").exists()
            time.sleep(2)  # the kernel, in its own process group, notices that its parent is gone
            run = papermill("05_train_exp1", folder, **params)
        _, stderr = run.communicate()
        assert run.returncode == 0, stderr[-2000:]
        adapters.append((folder / "work" / "exp1" / "adapter" / "adapter_model.safetensors").read_bytes())
        steps = [json.loads(line) for line in (folder / "work" / "exp1" / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in steps if "loss" in line] == [1, 2, 3, 4]
    assert adapters[0] == adapters[1]


def cells_up_to_training(**params):
    """Return notebook 05's code cells up to the one that trains, with changed parameters."""
    cells = [c for c in nbformat.read(ROOT / "notebooks" / "05_train_exp1.ipynb", 4).cells if c.cell_type == "code"]
    last = next(number for number, cell in enumerate(cells) if "trainer.train(" in cell.source)
    changed = "\n".join(f"{name} = {value!r}" for name, value in params.items())
    return [cell.source + ("\n" + changed if "Parameters" in cell.source else "") for cell in cells[: last + 1]]


@pytest.mark.slow
def test_run_resumes_after_a_kernel_restart(tmp_path, model_folder):
    """The kernel is restarted midway and all cells run again. The adapter must be the same."""
    params = {"profile": "cpu", "model": str(model_folder), "n_samples": 48, "n_heldout": 4, "epochs": 8}
    adapters = []
    for restart in (False, True):
        work = tmp_path / f"restart-{restart}"
        cells = cells_up_to_training(**params, save_steps=4, workdir=str(work))
        kernel = jupyter_client.KernelManager(kernel_name="python3")
        kernel.start_kernel(cwd=str(tmp_path))
        try:
            if restart:
                client = ready(kernel)
                for cell in cells:
                    client.execute(cell)
                while not (work / "exp1" / "checkpoints" / "checkpoint-8" / "complete.json").exists():
                    assert kernel.is_alive()
                    time.sleep(0.01)
                client.stop_channels()
                kernel.restart_kernel(now=True)
                assert not (work / "exp1" / "metrics.json").exists()
            client, messages = ready(kernel), []
            for cell in cells:
                reply = client.execute_interactive(cell, output_hook=messages.append, timeout=600)
                assert reply["content"]["status"] == "ok", reply["content"]
            client.stop_channels()
            output = "".join(message["content"].get("text", "") for message in messages)
            assert ("Resuming from checkpoint-" in output) == restart
        finally:
            kernel.shutdown_kernel(now=True)
        adapters.append((work / "exp1" / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


def ready(kernel):
    """Return a client of the kernel, once the kernel answers."""
    client = kernel.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    return client
