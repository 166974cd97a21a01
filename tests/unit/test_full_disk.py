"""Disks that are really full: small ones in memory, which only root can mount."""

import subprocess

import pytest

from qlora_helpers import UserError, drive, runs
from qlora_helpers.data import cleaning
from qlora_helpers.runs import RunFolder
from qlora_helpers.training import trainer


@pytest.fixture
def disk(tmp_path):
    """Return a function that mounts a disk of the given size in KiB, or grows it when called again."""
    where = tmp_path / "disk"
    where.mkdir()
    mounted = []

    def size(kib):
        options = f"size={kib}k" + (",remount" if mounted else "")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(where)], capture_output=True)
        if done.returncode:
            pytest.skip("only root can mount a small disk")
        mounted.append(kib)
        return where

    yield size
    if mounted:
        subprocess.run(["umount", "-l", str(where)], check=True)


@pytest.fixture
def train(config, tokenizer):
    def run_it(folder):
        settings = config.replace(epochs=2)
        return trainer.train(settings, cleaning.prepare(settings, tokenizer), tokenizer, RunFolder(folder))

    return run_it


@pytest.mark.slow
@pytest.mark.parametrize("kib", [60, 120, 180, 240, 300, 360, 420, 480])
def test_a_full_disk_is_one_line_wherever_it_fills(disk, train, tmp_path, kib):
    """The disk fills up in the first file, in a checkpoint or at the end. With more space, the run resumes and ends
    with the same adapter as any other.
    """
    where = disk(kib)
    with pytest.raises(UserError, match=r"disk: .* is full.*Fix"):
        train(where / "run")
    disk(20_000)
    run, plain = train(where / "run"), train(tmp_path / "plain")
    name = "adapter_model.safetensors"
    assert (run.adapter / name).read_bytes() == (plain.adapter / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("kib", [100, 300, 450])
def test_a_full_drive_does_not_stop_training(disk, train, tmp_path, monkeypatch, capsys, kib):
    monkeypatch.setattr(runs, "DRIVE", disk(kib))
    monkeypatch.setattr(drive, "HERE", tmp_path / "content")
    run = train(runs.DRIVE / "run")
    assert run.path == tmp_path / "content" / "run"
    assert run.finished
    assert "No space left on device" in capsys.readouterr().out
    disk(20_000)
    assert train(runs.DRIVE / "run").path == runs.DRIVE / "run"
