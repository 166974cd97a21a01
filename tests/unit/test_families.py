"""Every family: held-out losses are the model's own, in 16 and in 4 bits, and what is not in 4 bits is found."""

import sys
from contextlib import nullcontext

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_helpers import Config, UserError, files
from qlora_helpers.data.prompts import IGNORE, Example
from qlora_helpers.data.schema import Row
from qlora_helpers.evaluation import losses
from qlora_helpers.models import base, qlora

TINY = {
    "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.3,  # far from uniform predictions, so that a wrong token or position shows
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen3_5_text": {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"], **LINEAR},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},  # soft-caps its logits
    "gemma3_text": {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {},
    "smollm3": {},
    "granite": {"logits_scaling": 8.0},  # scales its logits
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 64,
        "logits_scaling": 4.0, **MAMBA,
    },
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},  # learned positions, shifted by two
    "gpt_neox": {},
    "bloom": {"n_head": 4, "n_layer": 2},  # ALiBi: distances instead of positions
    "olmo2": {},
    "stablelm": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},  # carries state from token to token
    "cohere": {"logit_scale": 0.25},
}  # fmt: skip


def build(family, **settings):
    """Create a random model of a family in float32."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TINY | settings)).float().eval()


def examples(*lengths, untrained):
    """Create rows of these lengths; the first `untrained` tokens of each are not trained, as after few-shot turns."""
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]
    row = Row(({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}), "line 1")
    return [Example(row, "", i, [IGNORE] * untrained + i[untrained:], [(0, 0)] * len(i), 0) for i in ids]


@pytest.mark.parametrize("family", FAMILIES)
def test_heldout_losses_are_the_models_own(family, device, tmp_path):
    """In 16 bits and in 4, with short and with long beginnings that are not trained."""
    build(family, **FAMILIES[family]).save_pretrained(tmp_path)
    for quantization in ("none", "nf4"):
        base = qlora.load_base(Config(model=str(tmp_path), quantization=quantization), device)
        assert (qlora.four_bit_share(base) > 0.9) == (quantization == "nf4")
        for rows in (examples(9, 31, 4, 22, 17, untrained=2), examples(75, 90, 81, untrained=70)):
            got = losses.heldout_losses(base, rows, device, 3)
            for row, loss in zip(rows, got, strict=True):
                with torch.no_grad():
                    want = base(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss
                assert loss.loss_sum / loss.tokens == pytest.approx(want.item(), abs=1e-4)


def test_experts_that_would_stay_in_16_bits_are_refused(device, tmp_path):
    """Mixtral keeps its experts in one three-dimensional tensor, which bitsandbytes leaves as it is."""
    build("mixtral", num_local_experts=4).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"only 1\d% of the weights .* in 4 bits.*Fix: quantization=none"):
        qlora.load_base(Config(model=str(tmp_path)), device)
    assert qlora.load_base(Config(model=str(tmp_path), quantization="none"), device)


@pytest.mark.parametrize(("share", "refused"), [(0.94, True), (0.96, False)])
def test_a_twentieth_of_the_weights_may_stay_in_16_bits(monkeypatch, share, refused):
    monkeypatch.setattr(base, "four_bit_share", lambda model: share)
    with pytest.raises(UserError, match="only 94%") if refused else nullcontext():
        base.check_quantized(torch.nn.Linear(1, 1), Config())


def test_a_model_saved_in_another_4_bit_type_is_not_called_nf4(device, tmp_path):
    build("llama").save_pretrained(tmp_path / "plain")
    saved = qlora.load_base(Config(model=str(tmp_path / "plain"), quantization="fp4"), device)
    saved.save_pretrained(tmp_path / "fp4")
    with pytest.raises(UserError, match="is stored in fp4, not nf4"):
        qlora.load_base(Config(model=str(tmp_path / "fp4")), device)
    assert qlora.load_base(Config(model=str(tmp_path / "fp4"), quantization="fp4"), device)


def test_the_page_of_templates_is_what_the_command_writes():
    """`python tooling/families.py` writes the page. Trying every family takes minutes, the templates a second."""
    sys.path.insert(0, str(files.ROOT / "tooling"))
    import families

    page = (files.ROOT / "docs" / "families.md").read_text("utf-8")
    rows = list(families.template_rows())
    assert all(f"| {' | '.join(row)} |" in page for row in rows)
    assert not any("wrong" in cell for row in rows for cell in row)
    others = {(row[0], cell) for row in rows for cell in row[1:-1] if cell != "ok"}
    thought = "refused: the chat template leaves out the thought of an answer"
    assert others == {("a prompt that opens a thought", thought)}
    assert rows[-2][-1] == "ok"  # a template that takes tool calls
