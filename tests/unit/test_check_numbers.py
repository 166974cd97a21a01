"""tooling/check_numbers.py: a number in the prose of a notebook comes from somewhere, or is reported with its place."""

import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("check_numbers", ROOT / "tooling" / "check_numbers.py")
check_numbers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_numbers)

SETTINGS = {
    "output_type": "display_data",
    "data": {
        "text/plain": ["Preset a, profile cpu.\nn_samples   16 instead of 100 (profile)"],
        "text/html": ["<table><tr><td>16</td><td>100</td></tr></table><pre>n_samples   16    rows up to 512</pre>"],
    },
}


def found(tmp_path, prose, code="pass", outputs=(), facts=None):
    """What the checker says about a notebook with one cell of prose and one of code."""
    cells = [
        {"cell_type": "markdown", "source": [prose]},
        {"cell_type": "code", "source": [code], "outputs": list(outputs)},
    ]
    path = tmp_path / "planted.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    return check_numbers.check(path, {}, facts or {})


def printed(text):
    return {"output_type": "stream", "text": [text]}


def test_a_number_without_an_origin_is_reported_with_notebook_cell_and_sentence(tmp_path):
    assert found(tmp_path, "A claim. The loss fell to 1.75 here.", outputs=[printed("loss 1.8")]) == [
        "planted.ipynb: cell 0: 1.75 has no origin: The loss fell to 1.75 here."
    ]


@pytest.mark.parametrize(
    ("prose", "origin"),
    [
        ("It fell to 1.75.", "loss 1.7512"),
        ("It saves 59% of it.", "59%"),
        ("It is off by 9%.", "relative error 0.09"),
        ("It has 921,600 of them.", "921600"),
        ("It has 135 million of them.", "135,436,608 parameters"),
        ("Below 6e-8 it is lost.", "6e-08"),
        ("It took 64 s.", "took 64 s"),
        ("It was asked forty-eight questions.", "48 questions"),
        ("It saw a hundred rows.", "100 rows"),
    ],
)
def test_a_number_may_be_rounded_and_written_in_words(tmp_path, prose, origin):
    assert not found(tmp_path, prose, outputs=[printed(origin)])
    assert found(tmp_path, prose, outputs=[printed("7 rows")])


def test_a_time_needs_its_unit_in_the_output(tmp_path):
    assert found(tmp_path, "It takes 4 min.", outputs=[printed("step 4 of 4")])


def test_small_integers_are_not_rounded(tmp_path):
    assert found(tmp_path, "It has 3 layers.", outputs=[printed("3.4")])


def test_literals_of_the_code_are_origins_and_its_comments_are_not(tmp_path):
    assert not found(tmp_path, "Width 2,048, limit 77.", code="width = 2048\nprint('limit 77')")
    assert found(tmp_path, "Width 2,048.", code="width = None  # 2048")


def test_settings_count_as_they_are_here_and_not_as_in_the_preset(tmp_path):
    assert not found(tmp_path, "It trains on 16 rows.", outputs=[SETTINGS])
    assert found(tmp_path, "It trains on a hundred rows.", outputs=[SETTINGS])
    assert found(tmp_path, "Rows of 512 tokens.", outputs=[SETTINGS])


def test_figures_and_styles_are_no_origins(tmp_path):
    figure = {"output_type": "display_data", "data": {"text/plain": ["<NotebookFigure size 640x380 with 12 Axes>"]}}
    style = {
        "output_type": "display_data",
        "data": {"text/html": ["<style>12 px</style><p id='12 px'>none</p>"]},
    }
    assert found(tmp_path, "It has 12 axes.", outputs=[figure, style])


@pytest.mark.parametrize(
    "prose",
    [
        "# 27 ways\n\nNone.",
        "27. A list.\n28. Goes on.",
        "See notebook 11, notebooks 01–07, [page 27](page.md#27) and `limit=27`.",
        "```\n27\n```",
        "A T4, an H100, SmolLM2-135M, NF4, top-1, Llama 31, Python 3.13 and https://a.org/27.",
        "As published (Hu et\nal. 2021).",
    ],
)
def test_names_headings_links_and_code_hold_no_numbers(tmp_path, prose):
    assert not found(tmp_path, prose)


def test_a_fact_excuses_its_phrase_only(tmp_path):
    facts = {"560 GB": "the report"}
    assert not found(tmp_path, "It takes 560 GB.", facts=facts)
    assert found(tmp_path, "It takes 560 GB, or 560 of these.", facts=facts)


def test_a_fact_that_no_text_uses_is_reported(tmp_path):
    assert found(tmp_path, "No number.", facts={"560 GB": "the report"}) == [
        "planted.ipynb: the fact '560 GB' is not in the text"
    ]


def test_a_fact_that_its_file_does_not_hold_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(check_numbers, "ROOT", tmp_path)
    (tmp_path / "results.json").write_text('{"seconds": 64.2}')
    assert not found(tmp_path, "It takes 64 s.", facts={"64 s": "results.json, seconds"})
    assert found(tmp_path, "It takes 65 s.", facts={"65 s": "results.json, seconds"}) == [
        "planted.ipynb: '65 s' is not in results.json"
    ]


@given(st.integers(0, 10**9), st.integers(0, 3))
def test_every_number_is_found_as_it_is_written(whole, decimals):
    value = whole / 10**decimals
    assert list(check_numbers.numbers(f"is {value:,.{decimals}f}, they say.")) == [(value, -decimals)]


@given(st.text())
def test_any_prose_can_be_read(text):
    for sentence in check_numbers.sentences(text):
        list(check_numbers.numbers(sentence))


def test_the_command_fails_and_prints_what_it_found(tmp_path, capsys):
    found(tmp_path, "It has 27 lives.")
    assert check_numbers.main([str(tmp_path / "planted.ipynb")]) == 1
    assert "planted.ipynb: cell 0: 27 has no origin: It has 27 lives." in capsys.readouterr().out
