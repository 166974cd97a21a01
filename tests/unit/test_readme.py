"""The README's results are those of results/, and nothing typed by hand."""

import importlib.util
from pathlib import Path

from qlora_helpers.config import preset_names

ROOT = Path(__file__).parents[2]


def test_result_tables_come_from_the_run_folders():
    spec = importlib.util.spec_from_file_location("publish", ROOT / "tooling" / "publish.py")
    publish = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(publish)
    assert publish.render() in (ROOT / "README.md").read_text("utf-8")


def test_every_notebook_and_preset_is_named():
    text = (ROOT / "README.md").read_text("utf-8")
    for name in [*preset_names(), *(f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb"))]:
        assert name in text, name


def test_files_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text("utf-8")
    for target in {part.split(")")[0] for part in text.split("](")[1:]}:
        assert target.startswith("https://colab.research.google.com/") or (ROOT / target).exists(), target
