"""Code of answers: it passes only if its tests do, and hostile code harms nothing outside its folder."""

import os
import socket
import subprocess
import sys
import time

import pytest

from qlora_helpers.evaluation import run_code

GOOD = "def f(x):\n    return 2 * x\n"
TESTS = "assert f(2) == 4"


@pytest.fixture(params=["isolated", "not isolated"])
def isolation(request, monkeypatch):
    """Both with and without what takes the network and other processes away; many systems do not have it."""
    if request.param == "not isolated":
        monkeypatch.setattr(run_code, "_isolation", tuple)
    elif not run_code._isolation():
        pytest.skip("this system does not isolate processes (unshare)")


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        (GOOD, "passed"),
        ("def f(x):\n    return x", "failed"),
        ("def f(x:", "failed"),
        ("", "failed"),
        ("import sys\nsys.exit(0)", "failed"),
        ("import os\nos._exit(0)", "failed"),
        ("import sys\nif __name__ == '__main__':\n    sys.exit()\n" + GOOD, "passed"),
        ("input()\n" + GOOD, "failed"),
        ("\ud800 = 1", "failed"),
        ("(" * 100_000, "failed"),
    ],
)
def test_code_passes_if_its_tests_do(code, outcome):
    assert run_code.run(code, TESTS) == outcome


@pytest.mark.parametrize(
    "code",
    [
        "import numpy\nassert numpy.ones((9, 9)).sum() == 81",
        "import asyncio, ctypes, random, re, collections, subprocess",
        "import tempfile, shutil\nd = tempfile.mkdtemp()\nopen(d + '/a', 'w').write('x')\nshutil.rmtree(d)",
        "open('a.txt', 'w').write('x')\nassert open('a.txt').read() == 'x'\nimport os\nos.rename('a.txt', 'b.txt')",
        "import sqlite3\nsqlite3.connect(':memory:')",
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
        "print('x' * 10_000_000)",
    ],
)
def test_usual_code_runs(isolation, code):
    assert run_code.run(code + "\n" + GOOD, TESTS) == "passed"


def test_time_is_limited(isolation):
    for code in ("import time\ntime.sleep(60)", "while True:\n    print('x' * 1000)"):
        assert run_code.run(code, TESTS, seconds=1) == "timed out", code


@pytest.mark.parametrize(
    "code",
    [
        "x = bytearray(10 * 2**30)",
        "x = []\nwhile True:\n    x.append(bytearray(2**26))",
        "open('big', 'w').write('x' * 10**8)",
        "for i in range(1000):\n    open(str(i), 'w')",
        "def g():\n    g()\ng()",
    ],
)
def test_memory_and_files_are_limited(isolation, code):
    assert run_code.run(code + "\n" + GOOD, TESTS, seconds=5) != "passed"


WRITES = {
    "open": "open(target, 'w').write('x')",
    "append": "open(target, 'a').write('x')",
    "descriptor": "import os\nos.write(os.open(target, os.O_WRONLY), b'x')",
    "relative": "import os\nopen(os.path.relpath(target), 'w').write('x')",
    "folder": "import os\nos.write(os.open('kept.txt', os.O_WRONLY, dir_fd=os.open(folder, os.O_RDONLY)), b'x')",
    "link": "import os\nos.symlink(target, 'mine')\nopen('mine', 'w').write('x')",
    "hard link": "import os\nos.link(target, 'mine')\nopen('mine', 'w').write('x')",
    "remove": "import os\nos.remove(target)",
    "remove in folder": "import os\nos.remove('kept.txt', dir_fd=os.open(folder, os.O_RDONLY))",
    "rmtree": "import shutil\nshutil.rmtree(folder)",
    "rename": "import os\nos.rename(target, 'mine')",
    "replace": "open('mine', 'w').close()\nimport os\nos.replace('mine', target)",
    "truncate": "import os\nos.truncate(target, 0)",
    "pathlib": "import pathlib\npathlib.Path(target).write_text('x')",
    "change folder": "import os\nos.chdir(folder)\nopen('kept.txt', 'w').write('x')",
    "new folder": "import os\nos.mkdir(folder + '/new')",
    "shell": "import os\nos.system(f'echo x > {target}')",
    "program": "import subprocess\nsubprocess.run(['rm', target])",
    "program below": "import _posixsubprocess",
    "library": "import ctypes\nctypes.CDLL(None).unlink(target.encode())",
    "another program": "import os\nos.execv('/bin/rm', ['rm', target])",
}


@pytest.mark.parametrize("code", WRITES.values(), ids=WRITES.keys())
def test_nothing_outside_its_folder_is_changed(isolation, code, tmp_path):
    target = tmp_path / "kept.txt"
    target.write_text("kept")
    given = f"folder, target = {str(tmp_path)!r}, {str(target)!r}\n{code}\n{GOOD}"
    assert run_code.run(given, TESTS, seconds=5) == "failed"
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    assert target.read_text() == "kept"


@pytest.mark.parametrize("start", ["os.fork()", "multiprocessing.Process(target=print).start()", "os.forkpty()"])
def test_no_other_process_is_started(isolation, start, tmp_path):
    code = f"import os, multiprocessing\nmultiprocessing.set_start_method('fork')\nwhile True:\n    {start}"
    began = time.monotonic()
    assert run_code.run(code, TESTS, seconds=20) == "failed"  # at once, not after the limit
    assert time.monotonic() - began < 20


def test_other_processes_are_safe(isolation):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert run_code.run(f"import os\nos.kill({process.pid}, 9)\n{GOOD}", TESTS) == "failed"
        assert process.poll() is None
        process.communicate(b"\n")


def test_there_is_no_network(isolation):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}))\n{GOOD}"
        assert run_code.run(code, TESTS) == "failed"
        with pytest.raises(TimeoutError):
            server.accept()


def test_secrets_of_the_environment_are_not_passed_on(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert run_code.run(f"import os\nassert 'HF_TOKEN' not in os.environ\n{GOOD}", TESTS) == "passed"


def test_the_folder_of_an_answer_is_removed(isolation, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_code.run(f"import os\nos.mkdir('d')\nopen('d/x', 'w').close()\nos.chmod('d', 0)\n{GOOD}", TESTS)
    if os.geteuid() == 0:
        assert list(tmp_path.iterdir()) == []
