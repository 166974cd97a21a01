"""The base model in 4 bits and the adapter attached to it."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit

from qlora_helpers import Config, UserError
from qlora_helpers.device import detect
from qlora_helpers.models import qlora


@pytest.fixture
def lora(config, device):
    """Build the tiny model with an adapter. Keyword arguments change the config."""

    def build(**changes):
        changed = config.replace(**changes)
        return qlora.attach_lora(qlora.load_base(changed, device), changed)

    return build


def initial_weights(built):
    return {name: p.detach().clone() for name, p in built.named_parameters() if "lora_A" in name}


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_only_the_adapter_is_trained_in_float32(config, compute):
    from qlora_helpers.device import detect

    built = qlora.attach_lora(qlora.load_base(config, detect(str(compute).removeprefix("torch."))), config)
    trained = {name: p.dtype for name, p in built.named_parameters() if p.requires_grad}
    assert trained
    assert set(trained.values()) == {torch.float32}
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)


def test_the_number_of_trainable_parameters(lora):
    # r x (in + out) per layer; hidden size 64, 2 blocks, q: 64 to 64, v: 64 to 32 (2 of 4 heads)
    assert qlora.trainable_per_layer(lora(rank=4)) == {"q_proj": 2 * 4 * 128, "v_proj": 2 * 4 * 96}
    every = qlora.trainable_per_layer(lora(rank=4, target_modules=["all-linear"]))
    assert every == {
        "q_proj": 2 * 4 * 128,
        "k_proj": 2 * 4 * 96,
        "v_proj": 2 * 4 * 96,
        "o_proj": 2 * 4 * 128,
        "gate_proj": 2 * 4 * 192,
        "up_proj": 2 * 4 * 192,
        "down_proj": 2 * 4 * 192,
    }


@pytest.mark.parametrize("targets", [["q_proj", "query"], ["lm_head"]])
def test_the_error_for_an_unknown_target_lists_the_layers(lora, targets):
    with pytest.raises(UserError, match=f"no linear layer '{targets[-1]}'.*down_proj.*v_proj"):
        lora(target_modules=targets)


def test_the_seed_determines_the_initial_weights(lora):
    torch.manual_seed(1)
    one = initial_weights(lora(seed=3))
    torch.manual_seed(2)
    same = initial_weights(lora(seed=3))
    other = initial_weights(lora(seed=4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_the_base_is_in_4_bits_frozen_and_passes_gradients(config, device, quantization):
    base = qlora.load_base(config.replace(quantization=quantization), device)
    layers = [m for m in base.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 14  # seven per block; the output head is not quantized
    assert {layer.weight.quant_state.quant_type for layer in layers} == {quantization}
    assert all(layer.support_avx512bf16_for_cpu is False for layer in layers)
    assert not any(p.requires_grad for p in base.parameters())
    assert not base.training


def test_an_unquantized_base_has_plain_layers(config, device):
    base = qlora.load_base(config.replace(quantization="none"), device)
    assert not any(isinstance(m, Linear4bit) for m in base.modules())
    assert {p.dtype for p in base.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["no/such-model", "/no/such/folder", "empty"])
def test_a_missing_model_is_an_error(config, device, tmp_path, name):
    source = str(tmp_path) if name == "empty" else name
    with pytest.raises(UserError, match="neither a model folder") as caught:
        qlora.load_base(config.replace(model=source), device)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_adapter_is_an_error(tmp_path):
    with pytest.raises(UserError, match="holds none"):
        qlora.load_adapter(None, tmp_path)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_weight_table_includes_every_parameter(config, device, quantization):
    plain = qlora.load_base(config.replace(quantization="none"), device)
    base = qlora.load_base(config.replace(quantization=quantization), device)
    table = {row["module"]: row for row in qlora.weight_table(base)}
    want = sum(p.numel() for p in plain.parameters())
    assert sum(row["parameters"] for row in table.values()) == want
    # Stored in 16 bits, although this device computes in float32.
    assert (device.dtype, device.storage_dtype) == ("float32", "bfloat16")
    assert table["output head"]["bytes"] == 2 * table["output head"]["parameters"]
    if quantization == "nf4":
        weights = table["Linear4bit"]
        assert 0.5 < weights["bytes"] / weights["parameters"] < 0.6  # 4 bits and the quantization constants


@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_has_a_smaller_error_than_fp4_on_normal_weights(double_quant):
    weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    error = {q: (qlora.round_trip(weight, q, double_quant) - weight).norm() for q in ("nf4", "fp4")}
    assert 0 < error["nf4"] < error["fp4"] < 0.2 * weight.norm()


def test_a_4_bit_weight_has_16_levels():
    levels = qlora.four_bit_levels("nf4")
    assert len(levels) == 16
    assert (levels[0], levels[-1]) == (-1, 1)
    assert levels == sorted(levels)


@pytest.fixture(scope="module")
def bloom_folder(tmp_path_factory):
    """A random two-layer BLOOM model, whose linear layers and norms have biases."""
    from transformers import BloomConfig, BloomForCausalLM

    folder = tmp_path_factory.mktemp("tiny-bloom")
    torch.manual_seed(0)
    BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_change_in_float32_and_are_saved_and_loaded(bloom_folder, tmp_path, bias, quantization):
    config = Config.from_params(
        profile="cpu", model=str(bloom_folder), target_modules="query_key_value", bias=bias, quantization=quantization
    )
    trained = qlora.attach_lora(qlora.load_base(config, detect("float32")), config).train()
    ids = torch.arange(16).reshape(2, 8)
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-5)
    for _ in range(3):
        trained(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    biases = {name: p for name, p in trained.named_parameters() if p.requires_grad and name.endswith("bias")}
    assert len(biases) == (2 if bias == "lora_only" else 14)
    assert {p.dtype for p in biases.values()} == {torch.float32}
    assert all(p.abs().max() > 0 for p in biases.values())  # they start at zero, and steps of 1e-5 are not rounded away
    trained.save_pretrained(tmp_path)
    qlora.save_biases(trained, tmp_path)
    again = qlora.load_adapter(qlora.load_base(config, detect("float32")), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, trained.eval()(input_ids=ids).logits)


def test_a_4_bit_layer_adds_its_trained_bias_in_float32():
    """bitsandbytes casts the bias to the compute dtype in place, which the fp16 gradient scaler rejects."""
    torch.manual_seed(0)
    layer = Linear4bit(64, 64, bias=True, compute_dtype=torch.bfloat16)
    layer.weight = Params4bit(torch.randn(64, 64), requires_grad=False)
    layer = layer.to("cpu")
    layer.bias.data = torch.full((64,), 1e-4)
    plain = layer(torch.ones(1, 64, dtype=torch.bfloat16))
    assert layer.bias.dtype == torch.bfloat16
    layer.bias.data = torch.full((64,), 1e-4)
    qlora.keep_biases(layer)
    assert torch.allclose(layer(torch.ones(1, 64, dtype=torch.bfloat16)), plain, rtol=0.02, atol=0.02)
    assert layer.bias.dtype == torch.float32
