"""A power cut at any moment of a run loses at most what came after the last checkpoint.

A recorder notes what a run flushes, renames and deletes. It then builds what the disk would hold if the power failed
before or after each of these operations, in two ways: everything that was not flushed is lost, or the names are there
and what was not flushed reads as zeros, as after a rename on ext4.
"""

import contextlib
import itertools
import os
import shutil
import stat
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback

from qlora_helpers import files, runs
from qlora_helpers.data import cleaning
from qlora_helpers.runs import RunFolder
from qlora_helpers.training import trainer

CUTS = 100  # that are resumed to the end


class Disk:
    """Follows the files below `root`. `cuts` holds pairs: the steps announced as saved, and the files left by a cut."""

    def __init__(self, root, monkeypatch):
        self.root, self.cuts, self.announced = root, [], 0
        self._numbers, self._next = {}, itertools.count()  # by inode: a freed one is used again
        self._content, self._names = {}, {}  # what was flushed, by number
        self._patch(monkeypatch, "fsync", self._flush)
        for name in ("replace", "rename"):
            self._patch(monkeypatch, name, lambda source, target, **kwargs: self._free(target))
        for name in ("unlink", "rmdir"):
            self._patch(monkeypatch, name, self._free)

    def _patch(self, monkeypatch, name, note):
        real = getattr(os, name)

        def patched(*args, **kwargs):
            self.cut()
            note(*args, **kwargs)
            done = real(*args, **kwargs)
            self.cut()
            return done

        monkeypatch.setattr(os, name, patched)

    def _number(self, status):
        return self._numbers.setdefault(status.st_ino, next(self._next))

    def _flush(self, handle):
        status = os.fstat(handle)
        if stat.S_ISDIR(status.st_mode):
            found = {name: os.lstat(name, dir_fd=handle) for name in os.listdir(handle)}
            names = {name: (self._number(s), stat.S_ISDIR(s.st_mode)) for name, s in found.items()}
            self._names[self._number(status)] = names
        else:
            self._content[self._number(status)] = os.pread(handle, status.st_size, 0)

    def _free(self, path, dir_fd=None):
        """The name is gone; what was flushed under it is still there until the folder is flushed."""
        with contextlib.suppress(FileNotFoundError):
            self._numbers.pop(os.lstat(path, dir_fd=dir_fd).st_ino, None)

    def cut(self):
        """Note what would be left by a cut now."""
        for left in (self._flushed(self._number(self.root.stat())), self._named()):
            if not any(left == known and self.announced == steps for steps, known in self.cuts[-2:]):
                self.cuts.append((self.announced, left))

    def _flushed(self, folder, path=""):
        left = {}
        for name, (number, is_folder) in self._names.get(folder, {}).items():
            if is_folder:
                left |= self._flushed(number, f"{path}{name}/")
            else:
                left[path + name] = self._content.get(number, b"")
        return left

    def _named(self):
        found = (file for file in self.root.rglob("*") if file.is_file())
        return {
            file.relative_to(self.root).as_posix(): self._content.get(self._number(s := file.stat()), bytes(s.st_size))
            for file in found
        }


def restore(folder, left, before):
    """Make `folder`, which holds the files `before`, hold the files `left`."""
    for name in before.keys() - left.keys():
        (folder / name).unlink()
    for name, content in left.items():
        if before.get(name) is not content:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


@pytest.fixture(scope="module")
def config(config):
    """Four steps with a checkpoint each, of which the best is kept."""
    return config.replace(eval_steps=1, save_steps=1, keep_best=True, n_selection=6)


@pytest.fixture(scope="module")
def train(config, tokenizer):
    data = cleaning.prepare(config, tokenizer)
    return lambda run, callbacks=(): trainer.train(config, data, tokenizer, run, callbacks)


@pytest.fixture(scope="module")
def recorded(train, tmp_path_factory):
    """A run with all its cuts, and the files that it ended with."""
    root = tmp_path_factory.mktemp("disk")
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(root, patch)

        class Announce(TrainerCallback):
            def on_save(self, args, state, control, **kwargs):
                disk.announced = state.global_step
                disk.cut()

        run = train(RunFolder(root / "run"), [Announce()])
        disk.announced = 10**9
        disk.cut()
    results = {
        file.relative_to(root).as_posix(): file.read_bytes()
        for file in run.path.rglob("*")
        if file.is_file() and file.name != ".lock" and "checkpoints" not in file.parts
    }
    return SimpleNamespace(cuts=disk.cuts, results=results, identity=run.identity(), run=run)


def test_every_cut_leaves_the_last_announced_checkpoint_or_the_whole_result(recorded, tmp_path):
    assert len(recorded.cuts) >= CUTS
    run, before, lost = RunFolder(tmp_path / "run"), {}, []
    for number, (announced, left) in enumerate(recorded.cuts):
        restore(tmp_path, left, before)
        before = left
        if run.finished:
            intact = all(left.get(name) == content for name, content in recorded.results.items())
            lost += [] if intact else [(number, announced, "damaged result")]
            continue
        last = runs.last_checkpoint(run, recorded.identity)
        steps = runs.step(last) if last else 0
        lost += [(number, announced, steps)] if steps < announced else []
    assert lost == []


def test_the_recorder_sees_what_is_not_flushed(tmp_path, monkeypatch):
    """Otherwise the test above could not fail."""
    disk = Disk(tmp_path, monkeypatch)
    (tmp_path / "new").write_bytes(b"text")
    os.replace(tmp_path / "new", tmp_path / "a")
    assert disk.cuts[-1] == (0, {"a": bytes(4)})
    files.flush(tmp_path / "a")
    assert disk.cuts[-2:] == [(0, {}), (0, {"a": b"text"})]  # the name is not flushed yet
    files.flush(tmp_path)
    (tmp_path / "a").unlink()
    disk.announced = 1
    disk.cut()
    assert disk.cuts[-2:] == [(1, {"a": b"text"}), (1, {})]


@pytest.mark.slow
def test_a_run_resumed_after_any_of_100_cuts_ends_like_any_other(recorded, train, tmp_path):
    want = (recorded.run.adapter / "adapter_model.safetensors").read_bytes()
    same = 0
    for number in range(CUTS):
        announced, left = recorded.cuts[number * (len(recorded.cuts) - 1) // (CUTS - 1)]
        folder = tmp_path / "disk"
        folder.mkdir()
        restore(folder, left, {})
        run = train(RunFolder(folder / "run"))
        same += (run.adapter / "adapter_model.safetensors").read_bytes() == want
        assert [line["step"] for line in run.log() if "loss" in line] == [1, 2, 3, 4], (number, announced)
        shutil.rmtree(folder)
    assert same == CUTS
