"""A stand-in for a Colab machine: a virtual environment with the metadata, but not the code, of Colab's packages."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIST = ROOT / "tests" / "colab" / "packages.txt"
# Packages on PYTHONPATH would count as installed.
ENV = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def normal(name):
    """Normalize a package name like pip."""
    return re.sub(r"[-_.]+", "-", name).lower()


def packages():
    """Return name and version of each package in the list. The version is empty if the list has none."""
    lines = [line for line in LIST.read_text("utf-8").splitlines() if not line.startswith("#")]
    return {normal(line.split("==")[0]): line.partition("==")[2].split("+")[0] for line in lines}


def python_version():
    """Return Colab's Python version, such as 3.13."""
    return re.search(r"^# python (.+)$", LIST.read_text("utf-8"), re.MULTILINE)[1]


def make(folder, requirements):
    """Create the environment and return its Python. `requirements` maps package names to what they require.

    It uses Colab's Python version if this machine has it, else the Python that runs the tests.
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
    """Return what `pip install WORDS` would install in that environment, from the report of pip's own resolver."""
    pip = [str(python), "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-"]
    done = subprocess.run([*pip, *words], capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr[-3000:]
    return [entry["metadata"] for entry in json.loads(done.stdout)["install"]]
