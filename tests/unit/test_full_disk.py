"""Disks that are really full: small ones in memory, which only root can mount."""

import subprocess

import pytest

from qlora_helpers import UserError, drive, files, runs
from qlora_helpers.__main__ import main
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


@pytest.fixture
def command(capfd):
    """Run a command. Returns its exit code and the lines of its errors."""

    def run_it(*argv):
        capfd.readouterr()
        code = main([str(word) for word in argv])
        return code, [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]

    return run_it


@pytest.mark.parametrize("kib", [8, 24, 40, 56])
def test_data_on_a_full_disk_is_one_line_and_leaves_nothing(disk, command, tmp_path, kib):
    rows = [{"question": f"What is {n * 7919}?", "answer": f"{n * 7907} is a number. " * 9} for n in range(300)]
    files.write_jsonl(tmp_path / "rows.jsonl", rows)
    where = disk(kib)
    code, lines = command("data", tmp_path / "rows.jsonl", "--out", where / "out")
    assert code == 2
    assert len(lines) == 1
    assert "full" in lines[0]
    assert not (where / "out").exists()
    disk(20_000)
    assert command("data", tmp_path / "rows.jsonl", "--out", where / "out") == (0, [])
    assert [path.name for path in where.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("kib", [4, 60, 300])
def test_compare_on_a_full_disk_is_one_line_and_writes_no_half_file(disk, command, train, tmp_path, kib):
    run = train(tmp_path / "runs" / "exp1")
    where = disk(kib)
    code, lines = command("compare", run.path, "--out", where / "out")
    assert code == 2
    assert len(lines) == 1
    assert "full" in lines[0]
    assert not (where / "out" / "report.md").exists()  # the last of its files
    disk(20_000)
    assert command("compare", run.path, "--out", where / "out") == (0, [])


@pytest.mark.slow
@pytest.mark.parametrize("kib", [60, 300])
def test_batch_on_a_full_disk_is_one_line_and_goes_on_with_more_space(disk, command, config, kib):
    where = disk(kib)
    small = {"model": config.model, "profile": "cpu", "n-heldout": 6, "max-length": 64, "rank": 4, "n-answers": 1}
    options = [part for name, value in small.items() for part in (f"--{name}", value)]
    batch = ("batch", "--out", where / "out", "--samples", 8, 16, "--seeds", 1, "--max-new-tokens", 4, *options)
    code, lines = command(*batch)
    assert code == 2
    assert len(lines) == 1
    assert "full" in lines[0]
    disk(50_000)
    assert command(*batch) == (0, [])
    assert len(list((where / "out").glob("*/metrics.json"))) == 2


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
