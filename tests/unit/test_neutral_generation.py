"""The base model's own generation settings change neither answers nor the comparison of an export with its adapter."""

import shutil

import pytest
from transformers import GenerationConfig

from qlora_helpers import files
from qlora_helpers.chat import panel, side_by_side
from qlora_helpers.evaluation import answers
from qlora_helpers.export import merge, parity

LEAKS = {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "suppress_tokens": [7], "min_new_tokens": 5}
QUESTIONS = ["What is rain?", "And snow?"]


@pytest.fixture
def leaking(setup):
    """A model with an adapter, and its base model's settings, to be changed."""
    built, _ = setup
    inner = built.get_base_model()
    own = inner.generation_config
    yield built, inner
    inner.generation_config = own


def test_answers_are_the_same_with_and_without_the_base_models_settings(leaking, tokenizer, config, device):
    built, inner = leaking
    asked = [{"prompt": question, "reference": None} for question in QUESTIONS]
    plain = answers.generate(built, tokenizer, config, device, asked)
    inner.generation_config = GenerationConfig(**LEAKS)
    assert answers.generate(built, tokenizer, config, device, asked) == plain
    with built.disable_adapter():
        base = answers.generate(built, tokenizer, config, device, asked)
        inner.generation_config = GenerationConfig()
        assert answers.generate(built, tokenizer, config, device, asked) == base
    assert inner.generation_config.repetition_penalty is None
    assert base != plain


@pytest.fixture(scope="module")
def runs(make_run, model_folder, tmp_path_factory):
    """Two runs that differ in the generation settings of their base model only."""
    base = shutil.copytree(model_folder, tmp_path_factory.mktemp("leaking") / "base")
    files.write_json(base / "generation_config.json", {"eos_token_id": 1, "do_sample": True, **LEAKS})
    return {"plain": make_run(), "leaking": make_run(base)}


def test_an_adapter_is_compared_with_neutral_settings(runs, device):
    plain, leaking = (parity.adapter_responses(merge.source(run), device, QUESTIONS) for run in runs.values())
    assert [one.answer for one in leaking] == [one.answer for one in plain]


def test_the_chat_panel_answers_with_neutral_settings(runs):
    texts = []
    for run in runs.values():
        talk = panel.Conversation(side_by_side.load({"exp1": [run]}), 12)
        for _ in talk.ask(QUESTIONS[0]):
            pass
        texts.append(talk.entries())
    assert texts[0] == texts[1]
