"""What keeps the load small changes no result. benchmarks/load.py measures the load itself."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_helpers import Config
from qlora_helpers.data import cleaning, processes

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import load  # noqa: E402

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")


@pytest.fixture
def forked(monkeypatch):
    """Let two processes work on any items."""
    monkeypatch.setattr(processes, "MANY", 1)
    monkeypatch.setattr(processes, "SPAN", 7)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)


def test_compare_needs_no_torch(tmp_path):
    load.write_runs(tmp_path, 2)
    words = ["compare", *(str(tmp_path / f"run{i}") for i in range(2)), "--out", str(tmp_path / "out")]
    code = f"import sys; from qlora_helpers.__main__ import main; sys.exit(main({words}) or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report.md").exists()


@LINUX
def test_several_processes_give_the_results_in_order(forked):
    results = list(processes.in_order(lambda item: (item, os.getpid()), range(50)))
    assert [item for item, _ in results] == list(range(50))
    assert os.getpid() not in {pid for _, pid in results}
    with pytest.raises(ZeroDivisionError):
        list(processes.in_order(lambda item: 1 // item, range(50)))


@LINUX
def test_several_processes_clean_a_data_set_as_one_does(forked, tokenizer, tmp_path, monkeypatch):
    load.write_rows(tmp_path / "rows.jsonl", 60)
    config = Config(dataset=str(tmp_path / "rows.jsonl"), n_heldout=20, max_length=2000, near_duplicates=0.7)
    several = cleaning.clean(config, tokenizer)
    monkeypatch.setattr(processes, "MANY", 1000)
    one = cleaning.clean(config, tokenizer)
    assert one.near_duplicates
    for name in ("train", "heldout", "dropped", "near_duplicates", "lengths"):
        assert getattr(several, name) == getattr(one, name), name


@LINUX
def test_the_processes_end_when_their_parent_is_killed(tmp_path):
    code = (
        "import os, time; from qlora_helpers.data import processes; processes.MANY = processes.SPAN = 1\n"
        "os.sched_getaffinity = lambda _: {0, 1}\n"
        "list(processes.in_order(lambda item: os.write(1, b'%d\\n' % os.getpid()) and time.sleep(60), range(2)))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    children = [int(parent.stdout.readline()) for _ in range(2)]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for child in children:
        for _ in range(300):
            if not _runs(child):
                break
            time.sleep(0.1)
        assert not _runs(child)


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
