"""The commands of README.md and docs/, as printed, in one folder and in their order: half an hour, so a slow test.

Every code block without a language is commands.
"""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_helpers.__main__ import build_parsers

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands_of(page):
    """The lines of a page's code blocks that name no language."""
    blocks = BLOCK.findall(page.read_text("utf-8"))
    return [line for language, block in blocks if not language for line in block.splitlines()]


# A command that stands on several pages is one command.
COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands_of(page)))
# Not run here: they make an environment of their own. What they call is.
MAKE = {"make run": "run", "make test": "test"}
# Says that it does not fit, which is 3.
CODES = {"python -m qlora_helpers plan --preset llama31-8b --memory 16": 3}


def made(target):
    """The commands that make would run, less those that build the environment."""
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True)
    return [line.replace(".venv/bin/", "") for line in done.stdout.splitlines() if line.startswith(".venv/bin/python ")]


def test_every_command_in_the_pages_is_one_that_is_tested():
    assert len(COMMANDS) >= 11
    for command in COMMANDS:
        known = command in MAKE or command.startswith(("python -m qlora_helpers ", "papermill "))
        assert known, f"{command}: say in this test how it is to be tested"


@pytest.mark.parametrize("command", [command for command in COMMANDS if " -m qlora_helpers " in command])
def test_every_command_is_understood(command):
    build_parsers()[0].parse_args(shlex.split(command)[3:])


def test_every_inline_make_target_of_the_pages_is_there():
    named = {name for page in PAGES for name in re.findall(r"`make ([a-z-]+)", page.read_text("utf-8"))}
    named |= set(MAKE.values())
    assert {"run", "test", "test-full", "set-repo", "figures", "docs"} <= named
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
def test_the_commands_work_in_their_order(tmp_path):
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
