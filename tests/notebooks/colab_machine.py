"""A stand-in for a Colab machine: a virtual environment that only claims to hold Colab's packages."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIST = ROOT / "tests" / "colab" / "packages.txt"
# What lies on PYTHONPATH would count as installed.
ENV = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def normal(name):
    """A package's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def packages():
    """Name and version of everything in the list; the version is empty where the list has none."""
    lines = [line for line in LIST.read_text("utf-8").splitlines() if not line.startswith("#")]
    return {normal(line.split("==")[0]): line.partition("==")[2].split("+")[0] for line in lines}


def python_version():
    """Colab's Python, such as 3.13."""
    return re.search(r"^# python (.+)$", LIST.read_text("utf-8"), re.MULTILINE)[1]


def make(folder, requirements):
    """Make the environment and return its Python. `requirements` are what the packages that matter ask for, by name.

    It is Colab's Python where this machine has it, else the one that runs the tests.
    """
    wanted = shutil.which(f"python{python_version()}")
    works = wanted and subprocess.run([wanted, "-c", ""], capture_output=True).returncode == 0
    subprocess.run([wanted if works else sys.executable, "-m", "venv", str(folder)], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    for name, version in packages().items():
        if name in ("pip", "wheel"):
            continue
        info = site / f"{name.replace('-', '_')}-{version or '0'}.dist-info"
        info.mkdir(exist_ok=True)
        needs = "".join(f"Requires-Dist: {need}\n" for need in requirements.get(name, []))
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version or '0'}\n{needs}")
        (info / "INSTALLER").write_text("pip\n")
        (info / "RECORD").write_text(f"{info.name}/METADATA,,\n")
    return folder / "bin" / "python"


def would_install(python, *words):
    """What `pip install WORDS` would install there, as pip's own resolver says: its report."""
    pip = [str(python), "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-"]
    done = subprocess.run([*pip, *words], capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr[-3000:]
    return [entry["metadata"] for entry in json.loads(done.stdout)["install"]]
