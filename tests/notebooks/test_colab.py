"""Installing on Colab changes no package that Colab has, by the packages' requirements and by pip's resolver."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import colab_machine
import nbformat
import pytest
from packaging.requirements import Requirement

ROOT = colab_machine.ROOT
ON_COLAB = colab_machine.packages()
PYTHON = colab_machine.python_version()
BOOTSTRAP = nbformat.read(ROOT / "notebooks" / "01_install.ipynb", as_version=4).cells[2].source


def own_requirements():
    """Return the requirements in requirements.txt."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines()]
    return [Requirement(line) for line in lines if line]


def needs(requirement, extras=frozenset({""})):
    """Yield the requirements, on Colab's Python, of a package that Colab lacks. The version installed here is used."""
    environment = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0", "sys_platform": "linux"}
    for line in importlib.metadata.requires(requirement.name) or []:
        need = Requirement(line)
        if need.marker is None or any(need.marker.evaluate(environment | {"extra": extra}) for extra in extras):
            yield need


def conflicts(requirements):
    """Return all direct and indirect requirements that a package on Colab does not meet."""
    conflicts, seen, queue = [], set(), [("requirements.txt", need) for need in requirements]
    while queue:
        who, need = queue.pop()
        name = colab_machine.normal(need.name)
        if name in ON_COLAB:
            if ON_COLAB[name] and not need.specifier.contains(ON_COLAB[name], prereleases=True):
                conflicts.append(f"{who} requires {need}, Colab has {ON_COLAB[name]}")
        elif name not in seen:
            seen.add(name)
            queue += [(name, more) for more in needs(need, frozenset({"", *need.extras}))]
    return conflicts


def test_package_list_is_dated_and_complete():
    text = colab_machine.LIST.read_text("utf-8")
    assert "# as of 20" in text
    assert len(ON_COLAB) > 500
    assert {"torch", "numpy", "transformers", "pyarrow"} <= set(ON_COLAB)
    assert not {"trl", "bitsandbytes", "papermill"} & set(ON_COLAB)


def test_requirements_do_not_change_colab():
    assert conflicts(own_requirements()) == []


@pytest.mark.parametrize("requirement", ["trl>=1.0", "datasets>=4.7", "torch>=2.12"])
def test_requirement_that_changes_colab_is_detected(requirement, monkeypatch):
    newer = ["datasets>=4.7", "torch; extra == 'x'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: newer if name == "trl" else [])
    assert len(conflicts([Requirement(requirement)])) == 1


def test_package_list_is_converted_from_colabs_files():
    spec = importlib.util.spec_from_file_location("colab_list", ROOT / "tooling" / "colab_list.py")
    colab_list = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(colab_list)
    freeze = (
        "# a comment\nnumpy==2.1.3\ntorch==2.11.0+cu128\n"
        "cuvs-cu12 @ https://host/cuvs-cu12/cuvs_cu12-26.2.0-cp313-cp313-manylinux_2_24_x86_64.whl\n"
        "en_core @ https://host/3.7/en_core-3.8.0-py3-none-any.whl#sha256=19\n"
        "google-colab @ file:///dist/google_colab-1.0.0.tar.gz\n"
        "gateway @ git+https://host/gateway@b134e9945df25c2dcb98ade9129399be10788671\n"
    )
    made = colab_list.convert(freeze, "Ubuntu 22.04\nPython 3.13.15\nR 4", "2026-01-02").splitlines()
    assert made[1:] == [
        "# as of 2026-01-02", "# python 3.13", "numpy==2.1.3", "torch==2.11.0+cu128", "cuvs-cu12==26.2.0",
        "en_core==3.8.0", "google-colab==1.0.0", "gateway",
    ]  # fmt: skip


@pytest.fixture
def bootstrap(monkeypatch, tmp_path):
    """Function that runs the bootstrap cell with another folder for `/content`, and returns its commands."""

    def run_cell(colab=True, installed=False, wheels=(), owner="some-one"):
        for name in [name for name in os.environ if name.startswith("COLAB_")]:
            monkeypatch.delenv(name)
        if colab:
            monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
        ran = []
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
        monkeypatch.setattr(subprocess, "run", lambda words, check: ran.append((words, check)))
        for name in wheels:
            (tmp_path / name).touch()
        exec(BOOTSTRAP.replace("/OWNER/qlora", f"/{owner}/qlora").replace('"/content/', f'"{tmp_path}/'), {})
        return ran

    return run_cell


def test_bootstrap_does_nothing_elsewhere_or_twice(bootstrap):
    assert bootstrap(colab=False) == []
    assert bootstrap(installed=True) == []


def test_bootstrap_installs_from_the_repository(bootstrap):
    ((words, check),) = bootstrap()
    assert check
    assert words[:4] == [sys.executable, "-m", "pip", "install"]
    assert words[-1] == "qlora-helpers @ git+https://github.com/some-one/qlora-notebooks"
    assert not {"-U", "--upgrade", "--no-deps", "--force-reinstall"} & set(words)


def test_bootstrap_installs_from_nobody_while_no_repository_is_set(bootstrap):
    with pytest.raises(RuntimeError, match="make set-repo URL="):
        bootstrap(owner="OWNER")
    assert len(bootstrap(owner="OWNER", wheels=["qlora_helpers-0.1.0-py3-none-any.whl"])) == 1


def test_bootstrap_finds_an_uploaded_wheel(bootstrap, tmp_path):
    wheels = ["qlora_helpers-0.1.0-py3-none-any.whl", "qlora_helpers-0.2.0-py3-none-any.whl", "other-1.0.whl"]
    ((words, _),) = bootstrap(wheels=wheels)
    assert words[-1] == str(tmp_path / wheels[1])


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """The stand-in for a Colab machine.

    The packages in requirements.txt have their real requirements, except torch, of which Colab has another build than
    the package index.
    """
    named = {colab_machine.normal(need.name) for need in own_requirements()} & set(ON_COLAB) - {"torch"}
    pins = [f"{name}=={ON_COLAB[name]}" for name in sorted(named)]
    bare = tmp_path_factory.mktemp("bare") / "venv"
    python = colab_machine.make(bare, {})
    report = colab_machine.would_install(python, "--ignore-installed", "--no-deps", *pins)
    requirements = {colab_machine.normal(entry["name"]): entry.get("requires_dist", []) for entry in report}
    assert set(requirements) == named
    return colab_machine.make(tmp_path_factory.mktemp("colab") / "venv", requirements)


def check_only_new(installed):
    """Check that all packages to install are new to Colab, and return their names."""
    names = {colab_machine.normal(entry["name"]) for entry in installed}
    assert not names & set(ON_COLAB)
    return names


@pytest.mark.slow
def test_pip_would_only_add_packages_for_the_requirements(machine):
    added = check_only_new(colab_machine.would_install(machine, "-r", str(ROOT / "requirements.txt")))
    assert {"trl", "bitsandbytes", "papermill", "nbval"} <= added


@pytest.mark.slow
def test_pip_would_change_packages_for_another_trl(machine):
    """The stand-in detects a change: a newer trl requires newer datasets than Colab has."""
    with pytest.raises(AssertionError):
        check_only_new(colab_machine.would_install(machine, "trl==1.15.0"))


@pytest.mark.slow
def test_bootstrap_with_an_uploaded_wheel_would_only_add_packages(machine, monkeypatch, tmp_path):
    """The real cell runs with Colab's Python and a dry run of pip."""
    ignored = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info")
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=ignored)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = zipfile.ZipFile(wheel).namelist()
    tracked = subprocess.run(["git", "ls-files", "qlora_helpers"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(tracked.stdout.split()) <= set(inside)
    report = tmp_path / "report.json"
    real = subprocess.run

    def dry(words, check):
        pip = [*words[:4], "--dry-run", "--report", str(report), *words[4:]]
        return real(pip, check=check, capture_output=True, text=True, env=colab_machine.ENV)

    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    monkeypatch.setattr(sys, "executable", str(machine))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", dry)
    exec(BOOTSTRAP.replace('"/content/', f'"{tmp_path}/'), {})
    installed = [entry["metadata"] for entry in json.loads(Path(report).read_text())["install"]]
    assert "qlora-helpers" in check_only_new(installed)
