"""Shapes of models computed from their configs, compared with the real models."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_helpers.errors import UserError
from qlora_helpers.planning import architectures


@pytest.mark.parametrize("name", architectures.known_models())
def test_parameters_are_those_of_the_real_architecture(name):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**architectures.known(name))
    config.num_hidden_layers = 2  # all blocks are alike, and building eighty on the meta device takes seconds
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    small = architectures.from_config(name, {**config.to_dict(), "n_layer": 2})
    assert small.parameters == sum(p.numel() for p in model.parameters())
    linear = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"}
    assert {layer.name for layer in small.linears} == linear
    whole = architectures.load(name)
    one = architectures.from_config(name, {**config.to_dict(), "num_hidden_layers": 1, "n_layer": 1})
    per_block = small.parameters - one.parameters
    assert whole.parameters == small.parameters + (whole.layers - 2) * per_block


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("bigscience/bloom-7b1", 7_069_016_064),
        ("bigscience/bloom-560m", 559_214_592),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1_100_048_384),
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
    ],
)
def test_published_counts(name, parameters):
    assert architectures.load(name).parameters == parameters


def test_a_qwen_has_biases_on_queries_keys_and_values_alone():
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    shape = architectures.from_config("qwen", config.to_dict())
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.biases == sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))


def test_a_folder_a_file_and_the_hub(tmp_path, model_folder, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM

    real = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).parameters())
    assert architectures.load(str(model_folder)).parameters == real
    assert architectures.load(str(model_folder / "config.json")).parameters == real
    from qlora_helpers.models import hub

    monkeypatch.setattr(hub, "reachable", lambda: False)
    with pytest.raises(UserError, match="cannot load the config of 'someone/else'"):
        architectures.load("someone/else")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "model type 'None' is not supported"),
        ('{"model_type": "mamba"}', "model type 'mamba' is not supported by the plan. Supported: llama"),
        ('{"model_type": "llama", "hidden_size": 8}', "has intermediate_size = None"),
        ("[1]", "does not contain a model's config"),
        ("{", "cannot be read"),
    ],
)
def test_a_config_that_cannot_be_used_is_one_line(tmp_path, text, said):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        architectures.load(str(path))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "n_layer", "n_head", "head_dim", "max_position_embeddings", "tie_word_embeddings")  # fmt: skip
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 10**6), st.floats(), st.text(max_size=5), st.lists(st.none())
)


@given(st.sampled_from(architectures.FAMILIES), st.dictionaries(st.sampled_from(KEYS), VALUES))
def test_any_config_gives_a_shape_or_one_line(kind, rest):
    try:
        shape = architectures.from_config("any", {"model_type": kind, **json.loads(json.dumps(rest))})
    except UserError:  # always one line
        return
    assert shape.parameters > 0
