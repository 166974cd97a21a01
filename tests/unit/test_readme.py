"""README.md and docs/: generated parts are those of results/, nothing is undocumented, and no link is dead."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from qlora_helpers.__main__ import build_parsers
from qlora_helpers.config import Config, preset_names

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(path.read_text("utf-8") for path in PAGES)


@pytest.fixture(scope="module")
def publish():
    sys.path.insert(0, str(ROOT / "tooling"))  # it imports modules beside it
    spec = importlib.util.spec_from_file_location("publish", ROOT / "tooling" / "publish.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_what_make_figures_writes(publish):
    for page, text in publish.pages().items():
        assert (ROOT / page).read_text("utf-8") == text, f"{page}: run make figures"


def test_a_changed_number_is_noticed_and_repaired(publish):
    changed = README.replace("raised it by 0", "raised it by 1")
    assert changed != README
    assert publish.fill("README.md", changed) == README


def test_a_page_without_its_markers_is_refused(publish):
    with pytest.raises(SystemExit, match=r"README\.md needs the markers of 'findings'"):
        publish.fill("README.md", README.replace("<!-- end of findings -->", ""))


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 250
    prose = [line for line in lines if not line.startswith(("|", "!["))]
    assert max(len(line) for line in prose if "](" not in line) <= 120


def test_every_notebook_has_its_badge_in_the_readme():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"](notebooks/{path.name})" in README
        assert f"/blob/main/notebooks/{path.name})" in README


def test_every_preset_and_every_folder_of_the_package_is_named():
    folders = [path.name for path in (ROOT / "qlora_helpers").iterdir() if path.is_dir() and "__" not in path.name]
    for name in [*preset_names(), *(f"── {name}/" for name in folders)]:
        assert name in TEXT, name


@pytest.mark.parametrize("command", build_parsers()[1])
def test_every_command_and_option_is_documented(command):
    """`--no-NAME` is documented once, with the settings."""
    assert f"qlora_helpers {command}" in TEXT
    for option in build_parsers()[1][command].options:
        named = re.search(rf"(?<![\w-]){option}(?![\w-])", TEXT)
        assert named or option.startswith("--no-"), option


def test_settings_that_the_pages_quote_are_those_of_the_code():
    from qlora_helpers import cpu_speed
    from qlora_helpers.evaluation import intervals, losses
    from qlora_helpers.export import parity

    words = " ".join(TEXT.split())
    for quoted in (
        f"with the adapter on {parity.PROMPTS} prompts",
        f"answer {parity.PROMPTS} fixed questions",
        f"used if it is at least {cpu_speed.WORTHWHILE} times as fast",
        f"with {intervals.RESAMPLES:,} resamples",
        f"the base model with {('no', 'one', 'two', 'three')[losses.SHOTS]} training rows as examples",
        f"(default {Config().near_duplicates})",
    ):
        assert quoted in words, quoted


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_files_that_a_page_names_exist(page):
    for target in set(re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8"))):
        outside = target.startswith("https://")
        assert outside or (page.parent / target.partition("#")[0]).exists(), target


def test_the_site_builds_without_a_warning(tmp_path):
    commands = pytest.importorskip("mkdocs.commands.build")
    from mkdocs.config import load_config

    commands.build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    assert (tmp_path / "figures" / "memory.png").exists()
    assert "fonts.googleapis.com" not in (tmp_path / "index.html").read_text("utf-8")
