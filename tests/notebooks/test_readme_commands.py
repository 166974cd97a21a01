"""The README's commands, as printed, in one folder and in their order: half an hour, so it is a slow test."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text("utf-8")
COMMANDS = [
    line for block in re.findall(r"^```\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL) for line in block.splitlines()
]
# Not run here: they make an environment of their own. What they call is.
MAKE = {"make run": "run", "make test": "test"}
# Says that it does not fit, which is 3.
CODES = {"python -m qlora_helpers plan --preset llama31-8b --memory 16": 3}


def made(target):
    """The commands that make would run, less those that build the environment."""
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True)
    return [line.replace(".venv/bin/", "") for line in done.stdout.splitlines() if line.startswith(".venv/bin/python ")]


def test_every_command_in_the_readme_is_one_that_is_tested():
    assert len(COMMANDS) >= 6
    for command in COMMANDS:
        known = command in MAKE or command.startswith(("python -m qlora_helpers ", "papermill "))
        assert known, f"{command}: say in this test how it is to be tested"


def test_every_inline_make_target_of_the_readme_is_there():
    named = set(re.findall(r"`make ([a-z-]+)", TEXT)) | set(MAKE.values())
    assert {"run", "test", "test-full", "set-repo"} <= named
    for target in named:
        subprocess.run(["make", "-n", target, "URL=x"], cwd=ROOT, capture_output=True, check=True)


def serves(command, **where):
    """Start a server, which does not end by itself, on a port that is free; whether it gets so far as to listen."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        words = [*shlex.split(command), "--port", str(free.getsockname()[1])]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **where) as process:
        listening = any("Uvicorn running" in line for line in process.stdout)
        process.terminate()
    return listening


@pytest.mark.slow
def test_the_readmes_commands_work_in_their_order(tmp_path):
    """`make run` is replaced by what it runs once its environment is there; `rows.jsonl` is the reader's own file."""
    for part in ("qlora_helpers", "data", "notebooks", "pyproject.toml", "README.md"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, tmp_path / part)
    shutil.copy(ROOT / "data" / "conversations.jsonl", tmp_path / "rows.jsonl")
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {name: value for name, value in os.environ.items() if name != "QLORA_WORKDIR"}
    env |= {"PATH": programs, "PYTHONPATH": str(tmp_path)}
    run = [line for line in made("run") if "qlora_helpers" in line and "-m pip" not in line]
    assert len(run) == 2
    for command in [*run, *(command for command in COMMANDS if command not in MAKE)]:
        if " serve " in command:
            assert serves(command, cwd=tmp_path, env=env)
            continue
        done = subprocess.run(shlex.split(command), cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == CODES.get(command, 0), f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    for made_by_them in (
        "runs/demo/report.md",
        "runs/demo/report.html",
        "cleaned/report.md",
        "runs/report/report.md",
        "runs/batch/n8-seed1/metrics.json",
        "runs/exp1/metrics.json",
        "out.ipynb",
    ):
        assert (tmp_path / made_by_them).stat().st_size, made_by_them
