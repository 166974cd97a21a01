"""nbval on the stored notebook 02 must fail when the package has a fault."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAULTS = {
    "the wrong turn is masked": ("data/builtin_templates.py", "spans.append((start, len(text)))", "spans.append((0, start))"),
    "another split": ("data/splitting.py", "if row.group else own[0], *own", "if row.group else row.prompt[::-1], *own"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_line_that_a_fault_replaces_exists(fault):
    """A fast test, so that a changed line is noticed before the slow tests run."""
    name, right, _ = FAULTS[fault]
    assert (ROOT / "qlora_helpers" / name).read_text("utf-8").count(right) == 1


@pytest.mark.slow
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_planted_fault_fails_nbval(tmp_path, fault):
    for part in ("qlora_helpers", "data", "notebooks", "conftest.py", "pyproject.toml"):
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, tmp_path / part)
        else:
            shutil.copy(source, tmp_path / part)
    if fault:
        name, right, wrong = FAULTS[fault]
        module = tmp_path / "qlora_helpers" / name
        module.write_text(module.read_text("utf-8").replace(right, wrong), "utf-8")
    words = ["pytest", "--nbval", "--nbval-current-env", "-p", "no:cacheprovider", "notebooks/02_load_data.ipynb"]
    env = os.environ | {"PYTHONPATH": str(tmp_path), "QLORA_WORKDIR": str(tmp_path / "runs")}
    done = subprocess.run([sys.executable, "-m", *words], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert (done.returncode == 0) == (fault is None), done.stdout[-2000:]
