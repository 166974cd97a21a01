"""tooling/reading_time.py: how long the notebooks take to read."""

import importlib.util
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("reading_time", ROOT / "tooling" / "reading_time.py")
reading_time = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reading_time)


def test_lines_of_calls_of_the_libraries_are_counted_once_with_their_arguments():
    first = "from peft import LoraConfig as Shape\nimport math\nfrom qlora_helpers import runs"
    second = "shape = Shape(\n    r=math.ceil(8.5),\n)\nruns.choose(shape)\nmath.floor(1.5)"
    assert reading_time.library_lines([first, second]) == 3


def test_words_and_code_are_counted_without_links_and_the_bootstrap(tmp_path):
    text, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    cells = [text("# Title"), text("one [two](a b)"), code("import os"), text("three"), code("n = 1"), code("n\n\nn")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbformat.write(notebook, tmp_path / "x.ipynb")
    words, lines, minutes, story, library = reading_time.count(tmp_path / "x.ipynb")
    assert (words, lines, story, library) == (4, 3, 1, 0)
    assert minutes == pytest.approx(4 / 220 + 3 / 30)


def test_the_series_is_read_in_less_than_two_hours():
    paths = sorted(reading_time.NOTEBOOKS.glob("0[0-7]_*.ipynb"))
    assert len(paths) == 8
    assert sum(reading_time.count(path)[2] for path in paths) < 120
