"""One command writes the owner's repository into all files and changes nothing else."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"github(?:\.com)?/([\w.-]+/[\w.-]+?)(?=/blob/|\\?\")")


def places(folder):
    """Return the repositories in the badges and bootstrap cells of each file."""
    files = [folder / "README.md", *sorted((folder / "notebooks").glob("*.ipynb"))]
    return {path.name: NAMED.findall(path.read_text("utf-8")) for path in files}


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def set_repo(url, folder):
    words = [sys.executable, str(ROOT / "tooling" / "set_repository.py"), url, str(folder)]
    return subprocess.run(words, capture_output=True, text=True)


def test_all_files_name_the_same_repository():
    named = places(ROOT)
    assert len({name for names in named.values() for name in names}) == 1
    assert named.pop("README.md")
    assert all(len(names) >= 2 for names in named.values())  # badge and bootstrap


@pytest.mark.parametrize(
    "url", ["https://github.com/some-one/my.qlora_2", "https://github.com/some-one/my.qlora_2.git"]
)
def test_command_changes_the_repository_and_nothing_else(copy, url):
    before = places(copy)
    done = set_repo(url, copy)
    assert done.returncode == 0, done.stderr
    assert places(copy) == {name: ["some-one/my.qlora_2"] * len(names) for name, names in before.items()}
    (old,) = {name for names in before.values() for name in names}
    assert set_repo(f"https://github.com/{old}", copy).returncode == 0
    for path in [copy / "README.md", *(copy / "notebooks").iterdir()]:
        original = ROOT / path.relative_to(copy)
        assert path.read_bytes() == original.read_bytes()


@pytest.mark.parametrize(
    "url", ["", "github.com/a/b", "https://github.com/a", "https://github.com/a/b/tree/main", "x y"]
)
def test_invalid_repository_is_refused(copy, url):
    done = set_repo(url, copy)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "Fix" in done.stderr
    assert places(copy) == places(ROOT)
