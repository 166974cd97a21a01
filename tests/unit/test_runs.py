"""Run folders: damaged files are not trusted, no run overwrites another, and nothing is deleted on an error."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qlora_helpers import Config, UserError, files, runs
from qlora_helpers.runs import RunFolder

ME = {"config": "aaaaaaaaaaaa", "data": "1"}
OTHER = {"config": "bbbbbbbbbbbb", "data": "1"}


def make_run(folder, name, identity, complete=False):
    run = RunFolder(folder / name)
    files.write_json(run / "config.json", {"identity": identity})
    if complete:
        files.write_json(run / "metrics.json", {})
    return run


def make_checkpoint(run, step, identity=ME, best=None):
    path = run / f"checkpoints/checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "weights.bin").write_bytes(b"x" * step)
    runs.seal(path, identity, best)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"new": object()})
    with pytest.raises(ZeroDivisionError):
        files.write_jsonl(path, ({"half": 1 / number} for number in (1, 0)))
    assert json.loads(path.read_text("utf-8")) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


@given(st.lists(st.text()))
@example(["a\u2028b", "\x85", "\x0c", "a\r\nb"])
def test_any_text_comes_back_from_jsonl(tmp_path_factory, texts):
    path = tmp_path_factory.getbasetemp() / "any-text.jsonl"
    rows = [{"answer": text} for text in texts]
    files.write_jsonl(path, rows)
    assert files.read_jsonl(path) == rows


def test_workdir_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_WORKDIR", str(tmp_path / "a" / "b"))
    assert runs.workdir() == tmp_path / "a" / "b"
    assert runs.workdir(str(tmp_path / "given")) == tmp_path / "given"
    assert runs.workdir().is_dir()


def test_workdir_is_on_drive_or_in_the_checkout_or_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("QLORA_WORKDIR", raising=False)
    drive, checkout, here = (tmp_path / name for name in ("drive", "checkout", "here"))
    for folder in (checkout, here):
        folder.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(runs, "DRIVE", drive)
    monkeypatch.setattr(files, "ROOT", checkout)
    assert runs.workdir() == here / "runs"
    (checkout / "pyproject.toml").touch()
    assert runs.workdir() == checkout / "runs"
    drive.mkdir()
    assert runs.workdir() == drive / "qlora_runs"


def test_a_workdir_is_a_path_like_any_other(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert runs.workdir("~/own") == tmp_path / "own"
    with pytest.raises(UserError, match=r"output folder: .* Fix: check the path"):
        runs.workdir("a\0")


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot be written"):
            runs.workdir(str(path))


@pytest.mark.parametrize(
    ("there", "want"),
    [
        ({}, "exp1"),
        ({"exp1": ME}, "exp1"),
        ({"mine": ME}, "exp1"),
        ({"exp1": OTHER, "mine": ME}, "mine"),
        ({"exp1": ME, "mine": ME}, "exp1"),
    ],
)
def test_choose(tmp_path, there, want):
    for folder, identity in there.items():
        make_run(tmp_path, folder, identity)
    assert runs.choose(tmp_path, "exp1", ME).name == want


@pytest.mark.parametrize("other", [OTHER, {**ME, "data": "2"}])
def test_a_name_taken_by_another_run_gets_a_suffix_of_its_own(tmp_path, other):
    make_run(tmp_path, "exp1", other)
    mine = runs.choose(tmp_path, "exp1", ME)
    assert mine.name.startswith("exp1-")
    make_run(tmp_path, mine.name, ME)
    assert runs.choose(tmp_path, "exp1", ME) == mine
    third = runs.choose(tmp_path, "exp1", {**OTHER, "data": "3"})
    assert third.name not in ("exp1", mine.name)


def test_a_folder_asked_for_that_holds_another_configs_run_is_refused(tmp_path):
    config = Config()
    run = RunFolder(tmp_path / "mine")
    runs.check_free(run, config)
    files.write_json(run / "config.json", {"identity": {"config": config.identity}, "config": config.to_dict()})
    runs.check_free(run, config.replace(save_steps=7))
    with pytest.raises(UserError, match="rank 16 there, 8 here"):
        runs.check_free(run, config.replace(rank=8))


def test_a_finished_run_is_found_first(tmp_path):
    make_run(tmp_path, "a", ME)
    make_run(tmp_path, "b", ME, complete=True)
    assert runs.find(tmp_path, ME).name == "b"
    assert runs.find(tmp_path, {**ME, "data": "2"}) is None
    assert runs.find(tmp_path / "none", ME) is None


def test_a_second_process_is_refused(tmp_path):
    run = RunFolder(tmp_path / "run")
    code = (
        "import sys, pathlib; from qlora_helpers import runs, UserError\n"
        "try:\n    with runs.lock(runs.RunFolder(pathlib.Path(sys.argv[1]))): print('in')\n"
        "except UserError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(run.path)]
    with runs.lock(run):
        held = subprocess.run(command, cwd=files.ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    free = subprocess.run(command, cwd=files.ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "in use by another process" in held
    assert free.strip() == "in"


def test_the_lock_is_released_after_an_error(tmp_path):
    run = RunFolder(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt), runs.lock(run):
        raise KeyboardInterrupt
    with runs.lock(run):
        pass


def test_the_newest_checkpoint_counts_by_number(tmp_path):
    run = RunFolder(tmp_path)
    for step in (8, 10, 9):
        make_checkpoint(run, step)
    assert runs.last_checkpoint(run, ME).name == "checkpoint-10"


def test_without_checkpoints_there_is_none(tmp_path):
    assert runs.last_checkpoint(RunFolder(tmp_path), ME) is None


DAMAGES = {
    "no seal": (runs.SEAL, None),
    "empty seal": (runs.SEAL, b""),
    "half a seal": (runs.SEAL, b'{"identity": {"con'),
    "seal of another kind": (runs.SEAL, b'{"files": [1]}'),
    "no file": ("weights.bin", None),
    "short file": ("weights.bin", b"x"),
    "zeros": ("weights.bin", bytes(10)),
    "one flipped bit": ("weights.bin", b"xxxxxxxxxy"),
}


def damage(folder, name):
    file, content = DAMAGES[name]
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_kept(tmp_path, capsys, kind):
    run = RunFolder(tmp_path)
    whole, broken = make_checkpoint(run, 2), make_checkpoint(run, 10)
    damage(broken, kind)
    before = names(broken)
    assert runs.last_checkpoint(run, ME) == whole
    assert names(broken) == before
    assert "checkpoint-10 is incomplete" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["no seal", "one flipped bit"])
def test_a_checkpoint_without_its_best_one_is_passed_over(tmp_path, kind):
    run = RunFolder(tmp_path)
    oldest, best = make_checkpoint(run, 2), make_checkpoint(run, 10)
    newest = make_checkpoint(run, 12, best=best.name)
    assert runs.last_checkpoint(run, ME) == newest
    damage(best, kind)
    assert runs.last_checkpoint(run, ME) == oldest


def test_a_checkpoint_that_is_sealed_again_has_no_seal_until_it_is_on_disk(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    again = make_checkpoint(run, 2)

    def cut(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "flush_all", cut)
    with pytest.raises(KeyboardInterrupt):
        runs.seal(again, ME)
    assert runs.last_checkpoint(run, ME) is None


@pytest.mark.parametrize("name", [runs.SEAL, "weights.bin"])
def test_a_read_error_is_one_line_and_deletes_nothing(tmp_path, monkeypatch, name):
    run = RunFolder(tmp_path)
    for step in (2, 4):
        make_checkpoint(run, step)
    before = sorted(tmp_path.rglob("*"))
    for method in ("open", "read_text"):
        real = getattr(Path, method)

        def fail(self, *args, real=real, **kwargs):
            if self.name == name:
                raise OSError(errno.EIO, "Input/output error")
            return real(self, *args, **kwargs)

        monkeypatch.setattr(Path, method, fail)
    with pytest.raises(UserError, match=r"checkpoint-4 cannot be read \(Input/output error\).*Fix"):
        runs.last_checkpoint(run, ME)
    assert sorted(tmp_path.rglob("*")) == before


def test_only_checkpoints_are_taken_for_checkpoints_and_removed(tmp_path):
    run = RunFolder(tmp_path)
    foreign = ["checkpoint-3 (copy)", "checkpoint-best", "checkpoint-7.zip", "desktop.ini", "notes"]
    for step in (2, 4, 6, 8, 10):
        make_checkpoint(run, step)
    for name in foreign[:2]:
        (run / "checkpoints" / name).mkdir()
    for name in foreign[2:]:
        (run / "checkpoints" / name).write_text("mine")
    assert runs.last_checkpoint(run, ME).name == "checkpoint-10"
    runs.remove_old(run, "checkpoint-10", "checkpoint-2")
    assert names(run / "checkpoints") == sorted([*foreign, "checkpoint-10", "checkpoint-2", "checkpoint-8"])


def test_the_checkpoint_just_saved_is_never_removed(tmp_path):
    """It may have a lower number than damaged ones that were passed over."""
    run = RunFolder(tmp_path)
    for step in (2, 5, 6, 8):
        make_checkpoint(run, step)
    runs.remove_old(run, "checkpoint-5")
    assert names(run / "checkpoints") == ["checkpoint-5", "checkpoint-6", "checkpoint-8"]


def test_a_models_folder_beside_the_runs_is_in_nobodys_way(tmp_path):
    for name, content in (("model", '{"model_type": "llama"}'), ("broken", "{"), ("list", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    make_run(tmp_path, "mine", ME)
    assert runs.find(tmp_path, ME).name == "mine"
    assert runs.find(tmp_path, OTHER) is None
    assert runs.choose(tmp_path, "model", OTHER).name.startswith("model-")


def test_a_models_folder_is_not_taken_for_a_run(tmp_path):
    files.write_json(tmp_path / "config.json", {"model_type": "llama"})
    with pytest.raises(UserError, match=r"something else than a run.*choose another output folder") as caught:
        runs.check_free(RunFolder(tmp_path), Config())
    assert "delete" not in str(caught.value)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_new_file_has_the_mode_that_the_user_wants(tmp_path, umask):
    before = os.umask(umask)
    try:
        files.write_text(tmp_path / "a.txt", "text")
        with files.building(tmp_path / "folder") as folder:
            files.write_text(folder / "b.txt", "text")
    finally:
        os.umask(before)
    for name, most in (("a.txt", 0o666), ("folder", 0o777), ("folder/b.txt", 0o666)):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == most & ~umask


def test_a_replaced_file_keeps_its_mode_and_a_link_stays_a_link(tmp_path):
    target, link = tmp_path / "elsewhere" / "a.json", tmp_path / "a.json"
    target.parent.mkdir()
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    files.write_json(link, {"new": 1})
    assert link.is_symlink()
    assert json.loads(target.read_text()) == {"new": 1}
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert names(target.parent) == ["a.json"]


def build(target, error=None):
    with files.building(target) as folder:
        files.write_text(folder / "new.txt", "new")
        if error:
            raise error


@pytest.mark.parametrize("held", [False, True])
def test_a_folder_appears_at_once_or_not_at_all(tmp_path, held):
    target = tmp_path / "out"
    if held:
        files.write_text(target / "old.txt", "old")
    with pytest.raises(KeyboardInterrupt):
        build(target, KeyboardInterrupt())
    assert names(tmp_path) == (["out"] if held else [])
    assert not held or names(target) == ["old.txt"]
    build(target)
    assert names(tmp_path) == ["out"]
    assert names(target) == ["new.txt"]


KILLED = """
import os, sys, pathlib
from qlora_helpers import files
target = pathlib.Path(sys.argv[1])
if sys.argv[2] == "between":
    rename = pathlib.Path.rename
    pathlib.Path.rename = lambda self, to: os._exit(9) if self.name == "built" else rename(self, to)
with files.building(target) as folder:
    (folder / "new.txt").write_text("new")
    if sys.argv[2] == "before":
        os._exit(9)
    if sys.argv[2] == "alive":
        print("building", flush=True)
        sys.stdin.read()
"""


@pytest.mark.parametrize("moment", ["before", "between"])
def test_what_a_killed_process_was_building_is_cleared_and_nothing_else(tmp_path, moment):
    target = tmp_path / "out [1]"
    files.write_text(target / "old.txt", "old")
    mine = tmp_path / f".{target.name}-mine.part"
    mine.mkdir()
    command = [sys.executable, "-c", KILLED, str(target), moment]
    assert subprocess.run(command, cwd=files.ROOT, timeout=60).returncode == 9
    assert len(names(tmp_path)) == (3 if moment == "before" else 2)
    files.clear_leftovers(target)
    assert names(tmp_path) == [mine.name, target.name]
    assert names(target) == ["old.txt"]


def test_what_another_process_is_still_building_stays(tmp_path):
    target = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(target), "alive"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=files.ROOT, **pipes) as process:
        assert process.stdout.readline() == "building\n"
        files.clear_leftovers(target)
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert names(target) == ["new.txt"]


def finished(folder, content=b"weights"):
    run = RunFolder(folder)
    run.adapter.mkdir()
    (run.adapter / "adapter_model.safetensors").write_bytes(content)
    files.write_json(run / "metrics.json", {"adapter_sha256": files.hashes(run.adapter)})
    return run.adapter


@pytest.mark.parametrize("now", [b"", b"weightz", bytes(7), None])
def test_an_adapter_other_than_the_one_saved_is_named(tmp_path, now):
    adapter = finished(tmp_path)
    runs.check_adapter(adapter)
    weights = adapter / "adapter_model.safetensors"
    weights.unlink() if now is None else weights.write_bytes(now)
    with pytest.raises(UserError, match=r"adapter_model.safetensors is damaged, or was changed.*Fix"):
        runs.check_adapter(adapter)


def test_an_adapter_without_recorded_hashes_is_not_judged(tmp_path):
    adapter = finished(tmp_path)
    files.write_json(tmp_path / "metrics.json", {})
    runs.check_adapter(adapter)
    (tmp_path / "metrics.json").unlink()
    runs.check_adapter(adapter)


def test_another_configs_checkpoint_is_refused_and_kept(tmp_path):
    run = RunFolder(tmp_path)
    theirs = make_checkpoint(run, 2, OTHER)
    with pytest.raises(UserError, match="another config"):
        runs.last_checkpoint(run, ME)
    assert theirs.exists()


@pytest.mark.parametrize("content", [b"", b'{"identity": {"con', b"\xff\xfe"])
def test_damaged_json_is_named(tmp_path, content):
    for name in ("metrics.json", "config.json"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            RunFolder(tmp_path).read(name)
    with pytest.raises(UserError, match=r"config\.json"):
        RunFolder(tmp_path).identity()


def test_a_missing_file_says_which(tmp_path):
    with pytest.raises(UserError, match=r"no metrics\.json"):
        RunFolder(tmp_path).read("metrics.json")
    assert RunFolder(tmp_path).identity() is None
    assert not RunFolder(tmp_path).finished


def test_only_new_and_changed_runs_are_read(tmp_path, monkeypatch):
    """A start reads no config of the runs beside it that an earlier start has read."""
    read = []
    monkeypatch.setattr(runs, "INDEXED", 1)
    identity = RunFolder.identity
    monkeypatch.setattr(RunFolder, "identity", lambda run: read.append(run.name) or identity(run))
    for name in "abc":
        make_run(tmp_path, name, {**ME, "data": name})
    assert runs.find(tmp_path, ME) is None
    assert sorted(read) == ["a", "b", "c"]
    read.clear()
    assert runs.find(tmp_path, ME) is None
    assert read == []
    make_run(tmp_path, "b", {**ME, "data": "another"})
    make_run(tmp_path, "d", ME)
    assert runs.find(tmp_path, ME).name == "d"
    assert read == ["b", "d", "d"]  # what is found is read once more


@pytest.mark.parametrize("content", ["", "[1, 2]", "3", '{"a": 1, "b": [0]}', '{"a": {}, "b": null}'])
def test_a_damaged_index_of_runs_is_made_anew(tmp_path, monkeypatch, content):
    monkeypatch.setattr(runs, "INDEXED", 1)
    for name, own in (("a", ME), ("b", OTHER)):
        make_run(tmp_path, name, own)
    (tmp_path / runs.INDEX).write_text(content)
    assert runs.find(tmp_path, OTHER).name == "b"
    assert set(json.loads((tmp_path / runs.INDEX).read_text("utf-8"))) == {"a", "b"}


def test_a_folder_of_few_runs_gets_no_index(tmp_path):
    make_run(tmp_path, "a", ME)
    assert runs.find(tmp_path, ME).name == "a"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_run_that_was_renamed_or_deleted_is_not_found_under_its_old_name(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "INDEXED", 1)
    make_run(tmp_path, "a", ME)
    assert runs.find(tmp_path, ME).name == "a"
    (tmp_path / "a").rename(tmp_path / "b")
    assert runs.find(tmp_path, ME).name == "b"
    shutil.rmtree(tmp_path / "b")
    assert runs.find(tmp_path, ME) is None
