"""Installing on Colab changes nothing that is there: by what packages ask for, and by pip's own resolver."""

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
THERE = colab_machine.packages()
PYTHON = colab_machine.python_version()
BOOTSTRAP = nbformat.read(ROOT / "notebooks" / "01_install.ipynb", as_version=4).cells[2].source


def own_requirements():
    """What requirements.txt asks for."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines()]
    return [Requirement(line) for line in lines if line]


def needs(requirement, asked_extras=frozenset({""})):
    """What a package that Colab lacks asks for, on Colab's Python: as installed here, which is where pip ends too."""
    there = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0", "sys_platform": "linux"}
    for line in importlib.metadata.requires(requirement.name) or []:
        need = Requirement(line)
        if need.marker is None or any(need.marker.evaluate(there | {"extra": extra}) for extra in asked_extras):
            yield need


def clashes(requirements):
    """Requirements, whoever asks for them, that a package of the list does not meet."""
    found, seen, queue = [], set(), [("requirements.txt", need) for need in requirements]
    while queue:
        who, need = queue.pop()
        name = colab_machine.normal(need.name)
        if name in THERE:
            if THERE[name] and not need.specifier.contains(THERE[name], prereleases=True):
                found.append(f"{who} asks for {need}, Colab has {THERE[name]}")
        elif name not in seen:
            seen.add(name)
            queue += [(name, more) for more in needs(need, frozenset({"", *need.extras}))]
    return found


def test_the_list_is_dated_and_whole():
    text = colab_machine.LIST.read_text("utf-8")
    assert "# as of 20" in text
    assert len(THERE) > 500
    assert {"torch", "numpy", "transformers", "pyarrow"} <= set(THERE)
    assert not {"trl", "bitsandbytes", "papermill"} & set(THERE)


def test_nothing_that_is_asked_for_changes_colab():
    assert clashes(own_requirements()) == []


@pytest.mark.parametrize("asked", ["trl>=1.0", "datasets>=4.7", "torch>=2.12"])
def test_what_would_change_colab_is_found(asked, monkeypatch):
    newer = ["datasets>=4.7", "torch; extra == 'x'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: newer if name == "trl" else [])
    assert len(clashes([Requirement(asked)])) == 1


def test_the_list_is_made_of_what_colab_publishes():
    spec = importlib.util.spec_from_file_location("colab_list", ROOT / "tooling" / "colab_list.py")
    colab_list = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(colab_list)
    freeze = (
        "# a remark\nnumpy==2.1.3\ntorch==2.11.0+cu128\n"
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
    """Run the bootstrap cell where `/content` is a folder of the test's, and return what it would run."""

    def run_it(colab=True, installed=False, wheels=()):
        for name in [name for name in os.environ if name.startswith("COLAB_")]:
            monkeypatch.delenv(name)
        if colab:
            monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
        ran = []
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
        monkeypatch.setattr(subprocess, "run", lambda words, check: ran.append((words, check)))
        for name in wheels:
            (tmp_path / name).touch()
        exec(BOOTSTRAP.replace('"/content/', f'"{tmp_path}/'), {})
        return ran

    return run_it


def test_the_bootstrap_does_nothing_elsewhere_or_twice(bootstrap):
    assert bootstrap(colab=False) == []
    assert bootstrap(installed=True) == []


def test_the_bootstrap_installs_from_the_repository(bootstrap):
    ((words, check),) = bootstrap()
    assert check
    assert words[:4] == [sys.executable, "-m", "pip", "install"]
    assert words[-1].startswith("qlora-helpers @ git+https://github.com/")
    assert not {"-U", "--upgrade", "--no-deps", "--force-reinstall"} & set(words)


def test_the_bootstrap_finds_an_uploaded_wheel(bootstrap, tmp_path):
    wheels = ["qlora_helpers-0.1.0-py3-none-any.whl", "qlora_helpers-0.2.0-py3-none-any.whl", "other-1.0.whl"]
    ((words, _),) = bootstrap(wheels=wheels)
    assert words[-1] == str(tmp_path / wheels[1])


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """The stand-in. The packages that requirements.txt names ask for what they really ask for; torch for nothing, since
    Colab's is another build than the index's.
    """
    named = {colab_machine.normal(need.name) for need in own_requirements()} & set(THERE) - {"torch"}
    pins = [f"{name}=={THERE[name]}" for name in sorted(named)]
    bare = tmp_path_factory.mktemp("bare") / "venv"
    python = colab_machine.make(bare, {})
    found = colab_machine.would_install(python, "--ignore-installed", "--no-deps", *pins)
    asked = {colab_machine.normal(entry["name"]): entry.get("requires_dist", []) for entry in found}
    assert set(asked) == named
    return colab_machine.make(tmp_path_factory.mktemp("colab") / "venv", asked)


def check_only_new(installed):
    """Packages to be installed are new to Colab, and none that is there forbids them."""
    names = {colab_machine.normal(entry["name"]) for entry in installed}
    assert not names & set(THERE)
    return names


@pytest.mark.slow
def test_pip_would_only_add_packages_for_the_requirements(machine):
    added = check_only_new(colab_machine.would_install(machine, "-r", str(ROOT / "requirements.txt")))
    assert {"trl", "bitsandbytes", "papermill", "nbval"} <= added


@pytest.mark.slow
def test_pip_would_change_packages_for_another_trl(machine):
    """The stand-in notices what it is for: a newer trl asks for newer datasets than Colab has."""
    with pytest.raises(AssertionError):
        check_only_new(colab_machine.would_install(machine, "trl==1.15.0"))


@pytest.mark.slow
def test_the_bootstrap_with_an_uploaded_wheel_would_only_add_packages(machine, monkeypatch, tmp_path):
    """The cell as it stands, with Colab's Python, and pip asked to say what it would do."""
    beside = shutil.ignore_patterns(".*", "runs", "results", "build", "*.egg-info")
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=beside)
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
