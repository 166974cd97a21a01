"""The series and the batch, executed for real through the command line; on the bundled model in slow tests."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_helpers.experiments.series import SERIES

ROOT = Path(__file__).parents[2]
METRICS = {
    "train_rows", "steps", "epochs", "train_loss", "eval_loss", "base_eval_loss", "trainable_parameters", "seconds",
    "tokens_per_second", "peak_memory_gib", "seed", "device",
}  # fmt: skip


def command(*words, cwd, **env):
    environment = {key: value for key, value in os.environ.items() if key != "QLORA_WORKDIR"} | env
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)], cwd=cwd, capture_output=True, text=True, env=environment
    )


def read(path):
    return json.loads(Path(path).read_text("utf-8"))


@pytest.fixture(scope="module", params=["tiny", pytest.param("bundled", marks=pytest.mark.slow)])
def series(request, tmp_path_factory):
    """All seven notebooks with 8 and 16 rows, run from a folder outside the project."""
    out = tmp_path_factory.mktemp("series") / "out"
    words = ["qlora_helpers", "run", "--profile", "cpu", "--samples", 8, 16, "--epochs", 1, "--n-heldout", 6]
    words += ["--max-length", 128, "--heldout-max-length", 256, "--n-answers", 2]
    if request.param == "tiny":
        words += ["--model", request.getfixturevalue("model_folder")]
    done = command(*words, "--out", out, cwd=out.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, words, done.stdout


def test_run_folders_are_complete(series):
    out, _, _ = series
    for name, rows, steps in (("exp1", 8, 2), ("exp2", 16, 4)):
        metrics = read(out / name / "metrics.json")
        assert set(metrics) >= METRICS
        assert (metrics["train_rows"], metrics["steps"], metrics["epochs"]) == (rows, steps, 1)
        log = [json.loads(line) for line in (out / name / "log.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in log if "loss" in line]
        assert metrics["train_loss"] == pytest.approx(sum(losses) / steps)
        for file in ("adapter/adapter_model.safetensors", "adapter/README.md", "manifest.json", "notebook.ipynb",
                     "answers.jsonl", "figures/loss.png"):  # fmt: skip
            assert (out / name / file).stat().st_size > 0


def test_metrics_differ_and_training_rows_are_nested(series):
    out, _, _ = series
    first, second = (read(out / name / "metrics.json") for name in ("exp1", "exp2"))
    assert first["eval_loss"] != second["eval_loss"]
    assert first["base_eval_loss"] == second["base_eval_loss"]
    data = [read(out / name / "manifest.json")["data"] for name in ("exp1", "exp2")]
    assert data[0]["heldout_ids"] == data[1]["heldout_ids"]
    assert data[0]["train_ids"] == data[1]["train_ids"][:8]
    assert not set(data[1]["train_ids"]) & set(data[1]["heldout_ids"])


def test_comparison_and_report(series):
    out, _, stdout = series
    result = read(out / "comparison.json")
    rivals = ["base", "base, own template", "base, 16 bits", "base, 16 bits, own template"]
    assert [row["name"] for row in result["table"]] == [*rivals, "exp1", "exp2"]
    assert result["best_rival"]["exp2"] in rivals
    assert "| base | – | – |" in stdout
    assert "these adapters only" in stdout
    assert (out / "report.html").stat().st_size > 10_000
    assert str(out / "report.md") in stdout
    report = (out / "report.md").read_text("utf-8")
    for figure in ("figures/differences.png", "figures/loss_curves.png"):
        assert figure in report
        assert (out / figure).exists()
    for prompt in ("Explain what is a variable in programming.", "How do computers store data?"):
        assert prompt in report


def test_notebook_03_evaluates_the_base_model_for_later_notebooks(series):
    """Two ways to store it have losses in two prompt formats, a third in one. The one that is trained on also has
    answers. Nothing is computed twice.
    """
    out, _, _ = series
    bases = sorted(out.glob("base-*"))
    assert len([base for base in bases if (base / "heldout_losses.jsonl").exists()]) == len(bases) == 5
    (trained_on,) = [base for base in bases if (base / "answers.jsonl").exists()]
    assert {read(out / name / "manifest.json")["baseline"] for name in ("exp1", "exp2")} == {trained_on.name}
    losses, run = trained_on / "heldout_losses.jsonl", out / "exp1" / "config.json"
    assert losses.stat().st_mtime_ns < run.stat().st_mtime_ns


def test_series_reports_its_duration(series):
    out, _, stdout = series
    recorded = read(out / "series.json")
    assert list(recorded["seconds"]) == list(SERIES)
    assert recorded["total"] == pytest.approx(sum(recorded["seconds"].values()), abs=0.1)
    assert f"Notebooks: 7 done in {recorded['total']:.0f} s on {recorded['device']['name']}" in stdout


def test_another_config_is_refused_and_the_run_is_kept(series):
    out, words, _ = series
    before = (out / "exp1" / "metrics.json").stat().st_mtime_ns
    refused = command(*words[:5], 12, 16, *words[7:], "--out", out, cwd=out.parent)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "n_samples 8 there, 12 here" in refused.stderr
    assert (out / "exp1" / "metrics.json").stat().st_mtime_ns == before


def test_batch_reuses_a_finished_run_of_the_series(series, tmp_path):
    out = shutil.copytree(series[0], tmp_path / "out")
    before = (out / "exp1" / "metrics.json").read_bytes()
    words = ["qlora_helpers", "batch", *series[1][2:4], "--samples", 4, 8, "--seeds", 0, *series[1][7:]]
    done = command(*words, "--out", out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "exp1: complete, not run again" in done.stdout
    assert (out / "exp1" / "metrics.json").read_bytes() == before
    small, large = (read(out / name / "metrics.json") for name in ("n4-seed0", "exp1"))
    assert (small["steps"], large["steps"]) == (1, 2)
    assert small["eval_loss"] != large["eval_loss"]
    assert small["base_eval_loss"] == large["base_eval_loss"]


@pytest.mark.slow
def test_killed_batch_resumes(tmp_path, model_folder):
    """papermill and kernels on the tiny model, with a SIGKILL during the second of three runs."""
    out = tmp_path / "batch"
    words = [sys.executable, "-m", "qlora_helpers", "batch", "--profile", "cpu", "--model", model_folder, "--out", out]
    words += ["--samples", 4, 24, "--learning-rates", 0.001, "--epochs", 10, "--save-steps", 5, "--n-heldout", 8]
    words = [str(word) for word in words]
    killed = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True)
    while not (out / "n24-seed0" / "checkpoints" / "checkpoint-10" / "complete.json").exists():
        assert killed.poll() is None
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (out / "n24-seed0" / "metrics.json").exists()
    stamp = (out / "n4-seed0" / "metrics.json").stat().st_mtime_ns
    time.sleep(2)  # the kernel, in its own process group, notices that its parent is gone
    done = command(*words[2:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "n4-seed0: complete, not run again" in done.stdout
    assert (out / "n4-seed0" / "metrics.json").stat().st_mtime_ns == stamp
    assert "Resuming from checkpoint-" in (out / "n24-seed0" / "notebook.ipynb").read_text("utf-8")
    for name in ("n24-seed0", "n24-lr0.001-seed0"):
        log = [json.loads(line) for line in (out / name / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in log if "loss" in line] == list(range(1, 61))
    rates = [read(out / name / "config.json")["config"]["learning_rate"] for name in ("n24-seed0", "n24-lr0.001-seed0")]
    assert rates == [2e-4, 1e-3]


def test_papermill_checks_names_and_types_of_parameters(tmp_path):
    notebook = ROOT / "notebooks" / "02_load_data.ipynb"
    for wrong, named in ((["-p", "n_sampels", "8"], "Did you mean 'n_samples'?"),
                         (["-r", "learning_rate", "2e-4"], "write 2.0e-4")):  # fmt: skip
        done = command(
            "papermill", notebook, tmp_path / "out.ipynb", "-k", "python3", "-p", "profile", "cpu", *wrong, cwd=tmp_path
        )
        assert done.returncode != 0
        assert named in done.stderr
