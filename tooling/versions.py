"""The unit tests on other versions: the oldest and the newest that requirements.txt admits, and Colab's own.

usage: python tooling/versions.py oldest newest colab     (make test-versions)

Each has a virtual environment of its own, .venv-NAME; `colab` wants Colab's Python. On Linux pip's torch is a CUDA
build of several gigabytes: PIP_EXTRA_INDEX_URL chooses another index, as for any pip.
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
    """The lowest minor version of each range; its newest patch."""
    pins = []
    for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines():
        found = re.match(r"([\w-]+)>=([\d.]+)", line)
        if found:
            major, _, rest = found[2].partition(".")
            pins.append(f"{found[1]}=={major}.{rest.split('.')[0] or 0}.*")
    return pins


def colab() -> list[str]:
    """Colab's packages, less what belongs to its build of torch: the index has another one, for another CUDA."""
    lines = [line for line in COLAB.read_text("utf-8").splitlines() if "==" in line and not line.startswith("#")]
    return [line.split("+")[0] for line in lines if not line.startswith(("cuda-", "nvidia-"))]


def newest() -> list[str]:
    """Whatever pip finds."""
    return []


def python_for(name: str) -> str:
    """Colab's Python for Colab's versions, else the one that runs this."""
    if name != "colab":
        return sys.executable
    wanted = re.search(r"^# python (.+)$", COLAB.read_text("utf-8"), re.MULTILINE)
    found = shutil.which(f"python{wanted[1]}") if wanted else None
    if found is None:
        raise SystemExit(
            f"error: Colab's Python is not on this machine. Fix: put python{wanted and wanted[1]} on PATH."
        )
    return found


def test(name: str) -> int:
    """Make the environment and run the tests in it; returns pytest's code."""
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
    both = ["--numprocesses", "2", "--dist", "loadfile"]  # small models: one thread each, as in `make test`
    return subprocess.run([*words, *both], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode


def installed(python: str) -> list[str]:
    """Versions of what decides results, as that environment has them."""
    look = "from qlora_helpers.device import versions; print(*(f'{k} {v}' for k, v in versions().items()), sep='|')"
    done = subprocess.run([python, "-c", look], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip().split("|")


if __name__ == "__main__":
    names = sys.argv[1:] or ["oldest", "newest", "colab"]
    failed = [name for name in names if test(name)]
    if failed:
        raise SystemExit(f"error: the tests fail with versions: {', '.join(failed)}")
