"""The package as a whole: what its folders export, and what a wheel of it holds."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import qlora_helpers

HERE = Path(qlora_helpers.__file__).parent
FOLDERS = sorted(path.parent.name for path in HERE.glob("*/__init__.py"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_exports_what_it_names(folder):
    package = importlib.import_module(f"qlora_helpers.{folder}")
    assert package.__all__
    for name in package.__all__:
        assert callable(getattr(package, name)), name
        assert getattr(package, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


def test_importing_a_folder_imports_no_torch():
    code = "import sys, qlora_helpers; "
    code += "".join(f"import qlora_helpers.{folder}; " for folder in FOLDERS)
    code += "sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_wheel_lists_every_folder():
    settings = tomllib.loads((HERE.parent / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    assert {f"qlora_helpers.{folder}" for folder in FOLDERS} < set(settings["packages"])
