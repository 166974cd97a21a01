"""A run on Google Drive is written locally and then copied; if Drive disconnects or fills up, nothing saved is lost."""

import errno
import shutil
import sys
import types
from pathlib import Path

import pytest
from transformers import TrainerCallback

from qlora_helpers import UserError, drive, notebook, runs
from qlora_helpers.data import cleaning
from qlora_helpers.runs import RunFolder
from qlora_helpers.training import trainer


class Interrupt(TrainerCallback):
    """Ends the session when a step begins."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


class NeverTrain(TrainerCallback):
    def on_train_begin(self, *args, **kwargs):
        raise AssertionError("trained again")


@pytest.fixture(scope="module")
def config(config):
    return config.replace(epochs=2, n_answers=1)  # 8 steps, a checkpoint every two


@pytest.fixture(scope="module")
def plain(config, tokenizer, tmp_path_factory):
    """The same run elsewhere than on Drive."""
    run = RunFolder(tmp_path_factory.mktemp("elsewhere") / "exp1")
    return trainer.train(config, cleaning.prepare(config, tokenizer), tokenizer, run)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Drive and the local disk, as temporary folders."""
    monkeypatch.setattr(runs, "DRIVE", tmp_path / "drive" / "MyDrive")
    monkeypatch.setattr(drive, "HERE", tmp_path / "content")
    runs.DRIVE.mkdir(parents=True)
    return tmp_path


@pytest.fixture
def train(machine, config, tokenizer):
    """Return a function that trains into a folder on Drive."""

    def run_it(callbacks=(), folder=None, **changes):
        settings = config.replace(**changes)
        run = RunFolder(folder or runs.DRIVE / "qlora_runs" / "exp1")
        return trainer.train(settings, cleaning.prepare(settings, tokenizer), tokenizer, run, callbacks)

    return run_it


@pytest.fixture
def fail(monkeypatch):
    """Return a function that makes every copy to Drive fail after the first `after`, with half of a file written."""

    def fail_with(number, after=0):
        copies, original = iter(range(after)), shutil.copy2

        def copy(source, target, **kwargs):
            if runs.DRIVE in Path(target).parents and next(copies, None) is None:
                Path(target).write_bytes(Path(source).read_bytes()[: Path(source).stat().st_size // 2])
                raise OSError(number, errno.errorcode[number])
            return original(source, target, **kwargs)

        monkeypatch.setattr(shutil, "copy2", copy)

    return fail_with


def adapter(run):
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def whole_checkpoints(run):
    return sorted(path.parent.name for path in (run / "checkpoints").glob("[!.]*/complete.json"))


def parts():
    """Return the interrupted copies on Drive."""
    return [path for path in runs.DRIVE.rglob("*") if path.name.endswith("-part")]


def test_a_run_on_drive_is_the_run_it_would_be_elsewhere(train, plain):
    run = train()
    assert run.path == runs.DRIVE / "qlora_runs" / "exp1"
    assert run.finished
    assert adapter(run) == adapter(plain)
    names = [{str(f.relative_to(r.path)) for f in r.path.rglob("*") if f.name != ".lock"} for r in (run, plain)]
    assert names[0] == names[1]
    base = run.read("manifest.json")["baseline"]
    assert (run.path.parent / base / "heldout_losses.jsonl").exists()
    assert parts() == []
    assert len(run.log()) == len(plain.log())


def test_another_machine_resumes_where_the_first_one_stopped(train, plain, capsys):
    with pytest.raises(KeyboardInterrupt):
        train([Interrupt()])
    shutil.rmtree(drive.HERE)  # the machine is gone
    run = train()
    assert "Resuming from checkpoint-4" in capsys.readouterr().out
    assert adapter(run) == adapter(plain)


def test_an_interrupted_copy_is_not_used_as_a_checkpoint(train, plain):
    with pytest.raises(KeyboardInterrupt):
        train([Interrupt()])
    shutil.rmtree(drive.HERE)
    checkpoints = runs.DRIVE / "qlora_runs" / "exp1" / "checkpoints"
    shutil.copytree(checkpoints / "checkpoint-4", checkpoints / ".checkpoint-6-part")
    (checkpoints / ".checkpoint-6-part" / "optimizer.pt").unlink()
    run = train()
    assert adapter(run) == adapter(plain)
    assert parts() == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOTCONN])
def test_a_drive_that_fails_during_a_run_loses_nothing(train, fail, capsys, number, monkeypatch):
    """Training continues locally. On a disconnected Drive, partial copies cannot be removed either."""
    fail(number, after=40)
    gone = number == errno.ENOTCONN
    if gone:
        monkeypatch.setattr(drive, "_remove", lambda part: None)
    run = train()
    printed = capsys.readouterr().out
    there = RunFolder(runs.DRIVE / "qlora_runs" / "exp1")
    lines = [line for line in printed.splitlines() if "could not be updated" in line]
    assert lines
    assert all("Fix" in line and str(run.path) in line for line in lines)
    assert run.path == drive.HERE / "qlora_runs" / "exp1"
    assert run.finished
    assert not there.finished
    assert whole_checkpoints(there)
    assert len(whole_checkpoints(there)) == len([*(there / "checkpoints").glob("checkpoint-*")])
    for checkpoint in whole_checkpoints(there):
        assert runs._is_complete(there / "checkpoints" / checkpoint, run.identity())
    assert bool(parts()) == gone


def test_when_drive_is_back_the_run_is_only_copied(train):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drive, "_copy_changed", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        assert train().path == drive.HERE / "qlora_runs" / "exp1"
    run = train([NeverTrain()])
    assert run.path == runs.DRIVE / "qlora_runs" / "exp1"
    assert run.finished
    assert whole_checkpoints(run) == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]


def test_a_run_that_is_only_on_this_machine_is_kept_when_its_name_is_used_again(train, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drive, "_copy_changed", lambda *args: (_ for _ in ()).throw(OSError(errno.EIO, "dropped")))
        lost = train(seed=1)
    before = adapter(lost)
    assert train().path == runs.DRIVE / "qlora_runs" / "exp1"
    (kept,) = drive.HERE.glob("qlora_runs/exp1-*")
    assert str(kept) in capsys.readouterr().out
    assert adapter(RunFolder(kept)) == before
    continued = train([NeverTrain()], folder=runs.DRIVE / "qlora_runs" / kept.name, seed=1)
    assert continued.path == runs.DRIVE / "qlora_runs" / kept.name
    assert adapter(continued) == before


@pytest.fixture
def copied(machine):
    """A local run with three checkpoints, copied to Drive, and its mirror."""
    run = RunFolder(runs.DRIVE / "qlora_runs" / "exp1")
    mirror = drive.mirror(run)
    for step in (2, 4, 6):
        save(mirror.here, step)
    assert mirror.push()
    return mirror


def save(run, step, content=b"weights"):
    folder = run / f"checkpoints/checkpoint-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.bin").write_bytes(content)
    runs.seal(folder, {"config": "a"})


def test_foreign_files_among_the_checkpoints_are_neither_deleted_nor_in_the_way(copied):
    there = copied.there / "checkpoints"
    (there / "desktop.ini").write_text("mine")
    (there / "checkpoint-2 (copy)").mkdir()
    save(copied.here, 8)
    runs.remove_old(copied.here, "checkpoint-8")
    assert copied.push()
    want = ["checkpoint-2 (copy)", "checkpoint-4", "checkpoint-6", "checkpoint-8", "desktop.ini"]
    assert sorted(path.name for path in there.iterdir()) == want
    copied.pull({"config": "a"})
    assert (there / "desktop.ini").read_text() == "mine"


def test_a_checkpoint_saved_again_replaces_its_copy(copied):
    """The copy may be damaged: then the run continued from an older one."""
    save(copied.here, 6, b"other weights")
    assert copied.push()
    assert (copied.there / "checkpoints/checkpoint-6/weights.bin").read_bytes() == b"other weights"


@pytest.mark.parametrize("left", [(), (2,), (2, 4)])
def test_checkpoints_newer_than_those_here_are_not_deleted(copied, left):
    for step in {2, 4, 6} - {*left}:
        shutil.rmtree(copied.here / f"checkpoints/checkpoint-{step}")
    assert copied.push()
    assert whole_checkpoints(copied.there) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_another_configs_run_on_drive_is_refused(train):
    train(epochs=1)
    with pytest.raises(UserError, match="holds another run"):
        train([NeverTrain()], epochs=1, seed=1)


@pytest.fixture
def colab(monkeypatch, machine):
    """A stand-in for Colab's module, which mounts Drive or fails to."""
    asked = []
    module = types.SimpleNamespace(mount=asked.append)
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(drive=module))
    monkeypatch.setattr(drive, "on_colab", lambda: True)
    module.asked = asked
    return module


def resolve(**params):
    """Resolve a notebook's parameters."""
    return notebook.resolve({"__annotations__": dict.fromkeys(params), "profile": "cpu", **params})


def test_drive_is_mounted_when_asked_for_and_holds_the_runs(colab, monkeypatch):
    monkeypatch.delenv("QLORA_WORKDIR", raising=False)
    shutil.rmtree(runs.DRIVE)
    colab.mount = lambda where: (colab.asked.append(where), runs.DRIVE.mkdir())
    assert resolve(use_drive=True).folder == runs.DRIVE / "qlora_runs"
    assert resolve(use_drive=True).folder == runs.DRIVE / "qlora_runs"
    assert colab.asked == [str(runs.DRIVE.parent)]  # once


def test_drive_is_left_alone_where_nobody_asks_for_it(colab, machine):
    shutil.rmtree(runs.DRIVE)
    assert resolve(use_drive=False, workdir=str(machine)).folder == machine
    assert resolve(workdir=str(machine)).folder == machine
    assert colab.asked == []


def test_a_mount_that_fails_is_one_line(colab):
    shutil.rmtree(runs.DRIVE)

    def refuse(where):
        raise ValueError("mount failed")

    colab.mount = refuse
    with pytest.raises(UserError, match=r"could not be mounted \(mount failed\).*Fix"):
        resolve(use_drive=True)


def test_elsewhere_it_says_that_there_is_no_drive(machine, capsys, monkeypatch):
    monkeypatch.setattr(drive, "on_colab", lambda: False)
    assert resolve(use_drive=True, workdir=str(machine)).folder == machine
    assert "not Colab" in capsys.readouterr().out


def test_use_drive_is_true_or_false(machine):
    with pytest.raises(UserError, match="use_drive: expected true or false"):
        resolve(use_drive="yes")
