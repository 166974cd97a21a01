"""Run the unit tests on other package versions: the oldest and newest that requirements.txt allows, and Colab's.

usage: python tooling/versions.py oldest newest colab     (make test-versions)

Each set of versions gets its own virtual environment, .venv-NAME; `colab` needs Colab's Python. On Linux, pip installs
a CUDA build of torch, which is several gigabytes; PIP_EXTRA_INDEX_URL selects another index.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLAB = ROOT / "tests" / "colab" / "packages.txt"


def oldest() -> list[str]:
    """Pin each requirement to the newest patch release of its lowest minor version."""
    pins = []
    for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines():
        lower_bound = re.match(r"([\w-]+)>=([\d.]+)", line)
        if lower_bound:
            major, _, rest = lower_bound[2].partition(".")
            pins.append(f"{lower_bound[1]}=={major}.{rest.split('.')[0] or 0}.*")
    return pins


def colab() -> list[str]:
    """Pin Colab's packages, except those of its torch build: the index has a build for another CUDA version."""
    lines = [line for line in COLAB.read_text("utf-8").splitlines() if "==" in line and not line.startswith("#")]
    return [line.split("+")[0] for line in lines if not line.startswith(("cuda-", "nvidia-"))]


def newest() -> list[str]:
    """Pin nothing."""
    return []


def python_for(name: str) -> str:
    """Return the path of Colab's Python for Colab's versions, else of the Python that runs this script."""
    if name != "colab":
        return sys.executable
    wanted = re.search(r"^# python (.+)$", COLAB.read_text("utf-8"), re.MULTILINE)
    path = shutil.which(f"python{wanted[1]}") if wanted else None
    if path is None:
        raise SystemExit(f"error: Colab's Python was not found. Fix: put python{wanted and wanted[1]} on PATH.")
    return path


def test(name: str) -> int:
    """Create the environment, run the tests in it, and return pytest's exit code."""
    folder = ROOT / f".venv-{name}"
    constraints = folder / "constraints.txt"
    subprocess.run([python_for(name), "-m", "venv", str(folder)], check=True)
    constraints.write_text("\n".join({"oldest": oldest, "newest": newest, "colab": colab}[name]()) + "\n", "utf-8")
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--upgrade", "--constraint", str(constraints)]
    needed = ["-r", "requirements.txt", "-r", "requirements-dev.txt"]
    subprocess.run([*pip, *needed], cwd=ROOT, check=True)
    print(f"{name}: {', '.join(installed(python))}", flush=True)
    words = [python, "-m", "pytest", "tests/unit", "-m", "not slow", "-p", "no:cacheprovider"]
    both = ["--numprocesses", "2", "--dist", "loadfile"]  # one thread per process, as in `make test`
    return subprocess.run([*words, *both], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode


def installed(python: str) -> list[str]:
    """Return the versions of the packages in that environment that affect results."""
    code = "from qlora_helpers.device import versions; print(*(f'{k} {v}' for k, v in versions().items()), sep='|')"
    done = subprocess.run([python, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip().split("|")


if __name__ == "__main__":
    names = sys.argv[1:] or ["oldest", "newest", "colab"]
    failed = [name for name in names if test(name)]
    if failed:
        raise SystemExit(f"error: the tests fail with these versions: {', '.join(failed)}")
