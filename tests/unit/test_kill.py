"""A run that is killed at any point resumes when it is started again, and ends with the same adapter, bit for bit.

The runs are real processes, killed as a process group. A fork server that has imported everything starts them, so that
thirty of them take only minutes.
"""

import contextlib
import multiprocessing
import os
import random
import signal
import time

import pytest

from qlora_helpers.runs import RunFolder

KILLS = 30
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["qlora_helpers.training.trainer"])


def work(config, tokenizer_folder, folder, said):
    """Train into `folder` as the leader of a new process group, with all output in the file `said`."""
    os.setsid()
    with open(said, "w", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        import torch
        from transformers import AutoTokenizer

        from qlora_helpers import UserError
        from qlora_helpers.data import cleaning
        from qlora_helpers.training import trainer

        torch.set_num_threads(1)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        try:
            trainer.train(config, cleaning.prepare(config, tokenizer), tokenizer, RunFolder(folder))
        except UserError as error:
            print(error)
            os._exit(2)


@pytest.fixture(scope="module")
def start(config, tmp_path_factory):
    """Return a function that starts a run of 24 steps, each with a checkpoint, and returns its process and output."""
    config = config.replace(epochs=6, eval_steps=24, save_steps=1)
    number = iter(range(1000))

    def start_it(folder):
        said = tmp_path_factory.getbasetemp() / f"said-{next(number)}"
        process = SERVER.Process(target=work, args=(config, config.model, folder, said))
        process.start()
        return process, said

    return start_it


def finish(start, folder):
    """Run to the end and return the output."""
    process, said = start(folder)
    process.join(300)
    assert process.exitcode == 0, said.read_text()
    return said.read_text()


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The adapter of an undisturbed run, and the seconds from the first line of its log to its end."""
    run = RunFolder(tmp_path_factory.mktemp("whole") / "run")
    process, said = start(run.path)
    while not (run / "log.jsonl").exists():
        assert process.is_alive(), said.read_text()
        time.sleep(0.001)
    began = time.monotonic()
    process.join()
    assert process.exitcode == 0, said.read_text()
    return adapter(run), time.monotonic() - began


def adapter(run):
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def kill(start, run, wait):
    """Start a run and kill its group `wait` seconds after training began. Returns whether that interrupted it."""
    process, said = start(run.path)
    while not (run / "log.jsonl").exists():
        assert process.is_alive(), said.read_text()
        time.sleep(0.001)
    time.sleep(wait)
    alive = process.is_alive()
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return alive and not run.finished


@pytest.mark.slow
def test_thirty_kills(start, whole, tmp_path):
    """Kill runs at random moments, from the first step to the last file."""
    want, seconds = whole
    moments, killed, past_zero, while_saving = random.Random(0), 0, 0, 0
    for number in range(10 * KILLS):
        run = RunFolder(tmp_path / f"run{number}")
        if not kill(start, run, moments.uniform(0, seconds)):
            continue  # the run finished before the kill
        killed += 1
        sealed = {path.parent.name for path in (run / "checkpoints").glob("*/complete.json")}
        half = {path.name for path in (run / "checkpoints").glob("checkpoint-*")} - sealed
        words = finish(start, run.path)
        assert adapter(run) == want
        assert len([line for line in run.log() if "loss" in line]) == 24
        past_zero += "Resuming from checkpoint-" in words
        newest = max(half, key=lambda name: int(name.split("-")[1]), default="checkpoint-0")
        if all(int(newest.split("-")[1]) > int(name.split("-")[1]) for name in sealed) and half:
            while_saving += 1
            assert f"{newest} is incomplete" in words
        if killed == KILLS:
            break
    print(f"{killed} kills, {past_zero} went on past step 0, {while_saving} while a checkpoint was written")
    assert killed == KILLS
    assert past_zero >= 20
    assert while_saving >= 3


@pytest.mark.slow
def test_one_run_killed_again_and_again(start, whole, tmp_path):
    """Four kills in a row, also while checkpoints are rotated: one to resume from always remains."""
    want, seconds = whole
    run = RunFolder(tmp_path / "run")
    for _ in range(4):
        kill(start, run, seconds / 5)
    finish(start, run.path)
    assert adapter(run) == want


@pytest.mark.slow
def test_sigterm(start, whole, tmp_path):
    """SIGTERM is what a machine sends first when it is taken away."""
    want, _ = whole
    run = RunFolder(tmp_path / "run")
    process, said = start(run.path)
    while not any((run / "checkpoints").glob("*/complete.json")):  # the first of 24
        assert process.is_alive(), said.read_text()
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGTERM)
    process.join()
    assert not run.finished
    assert "Resuming from checkpoint-" in finish(start, run.path)
    assert adapter(run) == want


@pytest.mark.slow
def test_two_processes_never_write_one_folder(start, tmp_path):
    """Of five processes at once, one trains; the others stop with a one-line error and change nothing."""
    processes = [start(tmp_path / "run") for _ in range(5)]
    for process, _ in processes:
        process.join(300)
    codes = sorted(process.exitcode for process, _ in processes)
    words = [said.read_text() for process, said in processes]
    done = sum("is in use by another process" in text for text in words)
    assert codes == [0] * (5 - done) + [2] * done
    assert done >= 1
    losses = [line["step"] for line in RunFolder(tmp_path / "run").log() if "loss" in line]
    assert losses == list(range(1, 25))
