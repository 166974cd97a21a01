"""Shapes of models computed from their configs, compared with the real models."""

import io
import json
import subprocess
import sys
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_helpers.config import Config
from qlora_helpers.errors import UserError
from qlora_helpers.planning import architectures, meta_device, plan, quantization
from qlora_helpers.planning.shape import Shape

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# A tiny config of each architecture. Keys that are not given have the defaults of its config class.
TINY = {
    "llama": {},
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"head_dim": 16},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {},
    "gemma3_text": {"head_dim": 16, "tie_word_embeddings": True},
    "phi3": {},
    "smollm3": {},
    "granite": {"attention_bias": True},
    "olmo2": {},
    "bloom": {"n_layer": 3, "n_head": 4, "num_key_value_heads": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "opt with projections": {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 16},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4},
    "stablelm": {"use_qkv_bias": True, "qk_layernorm": True},
    "mixtral": EXPERTS,
    "granitemoehybrid": {**EXPERTS, "layer_types": ["mamba", "attention", "mamba"], "shared_intermediate_size": 24,
                         "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "head_dim": 16,
                     "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
                     "linear_value_head_dim": 8},
}  # fmt: skip


def tiny(name):
    """One of the configs, as in a config.json."""
    return {"model_type": name, **SIZES, **TINY[name]}


@pytest.fixture
def in_process(monkeypatch, capsys):
    """Count in this process: starting another takes seconds."""

    def run(command, input, **options):
        monkeypatch.setattr(sys, "stdin", io.StringIO(input))
        try:
            meta_device.main()
        except SystemExit as end:
            return subprocess.CompletedProcess(command, 1, "", str(end))
        return subprocess.CompletedProcess(command, 0, capsys.readouterr().out, "")

    monkeypatch.setattr(meta_device.logging, "set_verbosity_error", lambda: None)
    monkeypatch.setattr(architectures.subprocess, "run", run)


def counted(config):
    """The model of a config on the meta device, and its shape as `meta_device` counts it, without the process."""
    model = meta_device.build(config)
    return model, Shape.from_dict(json.loads(json.dumps(asdict(meta_device.measure(model)))))


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
    assert {layer.name for layer in small.blocks[0].linears} == linear
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
        ("Qwen/Qwen3-4B-Instruct-2507", 4_022_468_096),
        ("meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824),
        ("google/gemma-3-1b-it", 999_885_952),
        ("HuggingFaceTB/SmolLM3-3B", 3_075_098_624),
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
    ("text", "message"),
    [
        ("{}", "has model_type = None"),
        ('{"model_type": [null]}', "has model_type = [None]"),
        ('{"model_type": "unheard_of"}', "transformers builds no model of type 'unheard_of'"),
        ('{"model_type": "llama", "hidden_size": 8}', "has intermediate_size = None"),
        ("[1]", "not a JSON object"),
        ("{", "cannot be used"),
    ],
)
def test_a_config_that_cannot_be_used_is_one_line(tmp_path, text, message, in_process):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        architectures.load(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", TINY)
def test_counts_are_those_of_the_real_model(name):
    model, shape = counted(tiny(name))
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.biases == sum(p.numel() for n, p in model.named_parameters() if "bias" in n)
    assert shape.layers == 3


@pytest.mark.parametrize("name", [name for name in TINY if tiny(name)["model_type"] in architectures.FAMILIES])
def test_families_counted_without_torch_agree_with_the_meta_device(name):
    config = tiny(name)
    fast, (_, slow) = architectures.from_config("any", config), counted(config)
    assert set(fast.usual_targets) <= {linear.name for linear in slow.blocks[0].linears}
    for key in ("hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocabulary", "embeddings", "outside"):
        assert getattr(fast, key) == getattr(slow, key), key
    assert config["model_type"] == "bloom" or fast.positions == slow.positions
    ours, real = ([without_reads(block) for block in shape.blocks] for shape in (fast, slow))
    assert ours == real


def without_reads(block):
    """A block as plain values; the names of what its layers read are free, apart from that of the attention."""
    layers = [(layer.name, layer.n_in, layer.n_out, layer.bias, layer.packable, layer.reads == "attended")
              for layer in block.linears]  # fmt: skip
    return {**vars(block), "linears": sorted(layers)}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "opt with projections", "lfm2", "phi3"])
def test_four_bit_weights_are_those_that_bitsandbytes_packs(name, tmp_path, device, monkeypatch):
    import bitsandbytes as bnb
    from transformers import AutoConfig, AutoModelForCausalLM

    from qlora_helpers.models import base, qlora

    config = tiny(name) | {"hidden_size": 64, "word_embed_proj_dim": 64, "n_embd": 64}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(tmp_path)
    monkeypatch.setattr(base, "UNPACKED", 1)  # experts would be refused
    model = qlora.load_base(Config.from_params(profile="cpu", model=str(tmp_path)), device)
    packed = [module.weight for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert counted(config)[1].packable == sum(qlora.true_size(weight) for weight in packed) > 0


def test_the_plan_of_any_architecture_needs_no_torch_in_its_own_process(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny("opt")))
    code = (
        "import sys; from qlora_helpers.__main__ import main; "
        f"code = main(['plan', '--model', {str(tmp_path)!r}, '--max-length', '64']); "
        "sys.exit(code + sum(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    parameters = sum(p.numel() for p in counted(tiny("opt"))[0].parameters())
    assert f"{parameters:,} parameters" in done.stdout


def test_trained_parameters_of_a_hybrid_are_the_models_own(tmp_path, device, in_process):
    from transformers import AutoConfig, AutoModelForCausalLM

    from qlora_helpers.models import qlora

    AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny("lfm2"))).save_pretrained(tmp_path)
    for targets in ("all-linear", "q_proj v_proj", "in_proj"):
        config = Config.from_params(
            profile="cpu", model=str(tmp_path), target_modules=targets, rank=4, quantization="none", max_length=64
        )
        model = qlora.attach_lora(qlora.load_base(config, device), config)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert plan.plan_memory(config).trained == trained, targets


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("phi3", "q_proj", "from down_proj, gate_up_proj, o_proj, qkv_proj, or all-linear; usual: o_proj, qkv_proj."),
        ("gpt2", "q_proj", "from c_attn, c_fc, c_proj, or all-linear; usual: c_attn."),
        ("gpt2", "c_attn", None),
    ],
)
def test_a_wrong_target_names_the_layers_and_the_usual_ones(name, targets, message, in_process):
    from qlora_helpers.models import qlora

    config = Config.from_params(profile="cpu", target_modules=targets)
    model = counted(tiny(name))[0]
    if message is None:
        return qlora.check_targets(model, config)
    with pytest.raises(UserError) as caught:
        qlora.check_targets(model, config)
    assert message in str(caught.value)


def planned(tmp_path, name, quantization_config=None, **settings):
    """Write one of the tiny configs, and return settings that name it."""
    written = tiny(name) | ({"quantization_config": quantization_config} if quantization_config else {})
    (tmp_path / "config.json").write_text(json.dumps(written))
    return Config.from_params(
        profile="cpu", model=str(tmp_path), max_length=64, target_modules="all-linear", **settings
    )


def test_four_bits_are_refused_for_experts_that_stay_in_sixteen(tmp_path, in_process):
    config = planned(tmp_path, "mixtral", rank=4)
    reason = quantization.refusal(config)
    shape = counted(tiny("mixtral"))[1]
    assert f"{1 - shape.packable / shape.matrices:.0%} of the weights" in reason
    assert "Fix: quantization=none" in reason
    assert quantization.refusal(config.replace(quantization="none")) is None
    with pytest.raises(UserError, match="experts"):
        plan.plan_memory(config)
    assert set(plan.by_method(config)) == {"lora", "full"}
    assert all("nf4" not in item.change for item in plan.plan_memory(config, 0.7, "lora").advice)


@pytest.mark.parametrize("name", ["gpt2", "lfm2", "qwen3"])
def test_models_whose_weights_are_packed_are_not_refused(tmp_path, name, in_process):
    assert quantization.refusal(planned(tmp_path, name)) is None


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
       "bnb_4bit_use_double_quant": True}  # fmt: skip


@pytest.mark.parametrize(
    ("stored", "settings", "message"),
    [
        (NF4, {}, None),
        (NF4, {"quantization": "fp4"}, "stays as it is. Fix: quantization=nf4, double_quant=true."),
        (NF4, {"quantization": "none"}, "stays as it is. Fix: quantization=nf4, double_quant=true."),
        (NF4 | {"bnb_4bit_use_double_quant": False}, {}, "Fix: quantization=nf4, double_quant=false."),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, {}, "stored in 8-bit bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, {}, "stored in gptq"),
        ({"quant_method": "fp8"}, {"quantization": "none"}, "stored in fp8"),
        ("gibberish", {}, "not supported here. Fix: use the 16-bit model"),
    ],
)
def test_a_quantized_checkpoint_stays_what_it_is_or_is_refused(tmp_path, stored, settings, message):
    reason = quantization.refusal(planned(tmp_path, "llama", stored, **settings))
    assert (reason is None) if message is None else (message in reason)


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
