"""Run folders: partially written files are not trusted, and no run overwrites another."""

import json
import shutil
import subprocess
import sys

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


def make_checkpoint(run, step, identity=ME):
    path = run / f"checkpoints/checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "weights.bin").write_bytes(b"x" * step)
    runs.seal(path, identity)
    return path


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


@pytest.mark.parametrize("damage", ["no seal", "half a seal", "no file", "short file"])
def test_an_incomplete_checkpoint_is_skipped_and_removed(tmp_path, capsys, damage):
    run = RunFolder(tmp_path)
    whole, broken = make_checkpoint(run, 2), make_checkpoint(run, 10)
    if damage == "no seal":
        (broken / runs.SEAL).unlink()
    elif damage == "half a seal":
        (broken / runs.SEAL).write_text('{"identity": {"con')
    elif damage == "no file":
        (broken / "weights.bin").unlink()
    else:
        (broken / "weights.bin").write_bytes(b"x")
    assert runs.last_checkpoint(run, ME) == whole
    assert not broken.exists()
    assert "checkpoint-10 is incomplete" in capsys.readouterr().out


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
