"""The README's results are those of results/, and nothing typed by hand."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_result_tables_come_from_the_run_folders():
    spec = importlib.util.spec_from_file_location("publish", ROOT / "tooling" / "publish.py")
    publish = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(publish)
    assert publish.render() in (ROOT / "README.md").read_text("utf-8")


def test_files_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text("utf-8")
    for target in {part.split(")")[0] for part in text.split("](")[1:]}:
        assert target.startswith("https://colab.research.google.com/") or (ROOT / target).exists(), target
