"""The coding data set that needs no download: docstrings of the running Python."""

import platform

import pytest

from qlora_helpers import Config
from qlora_helpers.data import cleaning, python_docs, sources


@pytest.fixture(scope="module")
def loaded():
    return sources.load(Config(dataset="python-stdlib"))


def test_rows_are_questions_signatures_and_docstrings(loaded):
    by_name = {row.origin: row.to_record() for row in loaded.rows}
    assert loaded.layout == "instruction"
    assert not loaded.rejected
    shorten = by_name["textwrap.shorten"]
    assert shorten["instruction"] == "What does textwrap.shorten do in Python?"
    assert shorten["input"].startswith("shorten(text, width")
    assert '>>> textwrap.shorten("Hello  world!", width=12)' in shorten["output"]
    assert by_name["str.split"]["input"].startswith("str.split(")
    assert by_name["math.gcd"]["output"] == "Greatest Common Divisor."


def test_rows_are_grouped_by_module(loaded):
    groups = {row.group: row.origin for row in loaded.rows}
    assert groups["json.decoder"].startswith("json.decoder.")
    assert {"builtins", "math", "textwrap"} <= groups.keys()


def test_private_names_and_programs_are_excluded(loaded):
    names = [row.origin for row in loaded.rows]
    assert not any(part.startswith("_") for name in names for part in name.split(".") if part != "__init__")
    assert not {"this", "antigravity", "idlelib", "test"} & {name.split(".")[0] for name in names}


def test_the_source_name_includes_the_python_version(loaded):
    assert loaded.name == f"python-stdlib of CPython {platform.python_version()}"


def test_there_are_enough_rows_for_the_published_experiment(tokenizer, loaded, monkeypatch):
    """1,080 rows for training and 120 held out. The dropped rows include real leaks and real outliers."""
    config = Config.preset("tinyllama-coding")
    assert config.dataset == "python-stdlib"
    monkeypatch.setattr(sources, "load", lambda config: {"python-stdlib": loaded}[config.dataset])
    data = cleaning.prepare(config.replace(model="tiny", template="instruction", max_length=2000), tokenizer)
    assert (len(data.train), len(data.heldout)) == (1080, 120)
    reasons = {drop["reason"] for drop in data.dropped}
    assert {"answer nearly the same as a held-out one", "over 2000 tokens"} <= reasons
    held, trained = ({example.row.group for example in part} for part in (data.heldout, data.train))
    assert len(held) >= 10
    assert not held & trained
    assert data.to_manifest()["source"] == python_docs.source_name()
    assert any(">>>" in example.row.answer for example in data.train)
