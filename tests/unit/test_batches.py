"""Batches without padding: same loss and gradients as the model's own where possible, TRL's batches elsewhere."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_helpers.data.cleaning import prepare
from qlora_helpers.data.prompts import IGNORE
from qlora_helpers.evaluation.context import RunContext
from qlora_helpers.models import qlora
from qlora_helpers.runs import RunFolder
from qlora_helpers.training import batches, trainer

TINY = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.3,  # far from uniform predictions, so that a wrong token or position shows
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8},  # soft-caps its logits
    "granite": {"logits_scaling": 8.0},  # scales its logits
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},  # learned positions, shifted by two
    "gpt_neox": {},
    "bloom": {"n_head": 4, "n_layer": 2},  # ALiBi: distances instead of positions
    "lfm2": {"layer_types": ["conv", "full_attention"]},  # carries state from token to token
    "mamba": {"state_size": 4},
}


def tiny(family):
    """Create a random model of a family in float32."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TINY | FAMILIES[family])).float()


def rows_of(*lengths, untrained=0):
    """Create rows of these lengths; the first `untrained` tokens of each are not trained."""
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "labels": [IGNORE] * untrained + row[untrained:]} for row in ids]


def plain(built, features):
    """Mean loss over the trained tokens, with each row in a separate forward pass of the model."""
    sums, count = 0.0, 0
    for row in features:
        trained = sum(label != IGNORE for label in row["labels"][1:])
        loss = built(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
        sums, count = sums + loss * trained, count + trained
    return sums / count


@pytest.mark.parametrize("family", FAMILIES)
def test_chosen_collator_gives_each_familys_own_loss(family, device):
    """The chosen collator keeps the model's own loss. Families for which none does keep TRL's batches."""
    built = tiny(family).eval()
    features = rows_of(9, 17, 4, 12, untrained=2)
    own = plain(built, features)
    chosen = batches.collator(built, device)
    if chosen is not None:
        assert built(**chosen(features)).loss.item() == pytest.approx(own.item(), abs=1e-5)
    for candidate in (batches.flat, batches.padded):
        if batches._takes_columns(built) and batches.same_loss(built, candidate):
            assert built(**candidate(features)).loss.item() == pytest.approx(own.item(), abs=1e-4)


def test_llama_rows_are_packed(device):
    assert isinstance(batches.collator(tiny("llama"), device), batches.PackedRows)


@pytest.mark.parametrize("family", ["lfm2", "bloom"])
def test_family_that_would_mix_rows_is_not_packed(family, device):
    built = tiny(family)
    assert not batches._takes_columns(built) or not batches.same_loss(built, batches.flat)
    assert not isinstance(batches.collator(built, device), batches.PackedRows)


def test_state_leaking_between_rows_is_detected(device):
    """With continuous positions, a Llama's second row attends to the first, so the check must fail."""
    built = tiny("llama")

    def leaking(features):
        batch = batches.flat(features)
        return {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1])[None]}

    assert batches.same_loss(built, batches.flat)
    assert not batches.same_loss(built, leaking)


def test_loss_over_other_tokens_is_detected(device):
    built = tiny("llama")

    def one_too_few(features):
        batch = batches.flat(features)
        batch["shift_labels"][0, -1] = IGNORE
        return batch

    assert not batches.same_loss(built, one_too_few)


def test_a_small_difference_is_accepted_in_bfloat16_only(device, monkeypatch):
    built, exact = tiny("llama"), batches.flat

    def almost(features):
        batch = exact(features)
        batch["shift_labels"][0, -1] = (batch["shift_labels"][0, -1] + 1) % 97
        return batch

    monkeypatch.setattr(batches, "flat", almost)
    monkeypatch.setattr(batches, "ROUNDING", 0.5)
    for dtype, packed in (("float32", False), ("bfloat16", True)):
        chosen = batches.collator(built, dataclasses.replace(device, dtype=dtype))
        assert isinstance(chosen, batches.PackedRows) == packed


def test_gradients_equal_those_of_the_plain_forward_pass():
    built = tiny("llama")
    features = rows_of(9, 17, 4, 12, untrained=3)
    gradients = []
    for loss in (plain(built, features), built(**batches.flat(features)).loss, built(**batches.padded(features)).loss):
        built.zero_grad()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in built.parameters()]))
    assert torch.allclose(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    assert torch.allclose(gradients[2], gradients[0], rtol=1e-4, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=6), st.integers(0, 1))
def test_every_trained_token_counts_once(lengths, untrained):
    features = rows_of(*lengths, untrained=untrained)
    for batch in (batches.flat(features), batches.padded(features)):
        trained = sum(label != IGNORE for row in features for label in row["labels"][1:])
        assert int((batch["shift_labels"] != IGNORE).sum()) == int((batch["labels"] != IGNORE).sum()) == trained
    assert batches.flat(features)["input_ids"].shape == (1, sum(lengths))


@pytest.mark.parametrize(
    ("lengths", "shape"),
    [([60] * 4, (4, 60)), ([60, 5, 5, 5], (1, 75)), ([40, 6, 36, 5], (2, 45)), ([30], (1, 30))],
)
def test_cheapest_number_of_lines_is_chosen(lengths, shape):
    """Rows of similar length get one line each. A long row and short rows share a line if attention stays cheap."""
    batch = batches.PackedRows(hidden_size=16, layers=2, vocabulary=97)(rows_of(*lengths))
    assert tuple(batch["input_ids"].shape) == shape


def test_the_cost_of_a_batch_counts_weights_logits_and_attention():
    """Several rows in a line need a mask, which makes attention dearer. Few blocks make logits count for more."""
    packed = batches.PackedRows(hidden_size=16, layers=2, vocabulary=97)
    one, four = rows_of(12), rows_of(3, 3, 3, 3)
    logits = 11 * 97 / 2, 4 * 2 * 97 / 2  # columns with a trained token x lines x vocabulary / layers
    assert packed.cost([one]) == pytest.approx(batches.BLOCK_WEIGHTS * 16 * 12 + logits[0] + batches.CAUSAL * 12 * 12)
    lines = [[row] for row in four]
    assert packed.cost(lines) == pytest.approx(batches.BLOCK_WEIGHTS * 16 * 12 + logits[1] + batches.CAUSAL * 12 * 3)
    masked = packed.cost([four]) - dataclasses.replace(packed, vocabulary=0).cost([one])
    assert masked == pytest.approx(8 * 97 / 2 + (batches.MASKED - batches.CAUSAL) * 12 * 12)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_any_number_of_lines_gives_the_same_loss(number):
    built = tiny("llama").eval()
    features = rows_of(9, 17, 4, 12, untrained=2)
    batch = batches.collate_lines(batches.split_rows(features, number))
    assert batch["input_ids"].shape[0] == number
    assert built(**batch).loss.item() == pytest.approx(plain(built, features).item(), abs=1e-5)


def test_gpu_keeps_trls_batches(device):
    assert batches.collator(tiny("llama"), dataclasses.replace(device, kind="cuda")) is None


def test_run_takes_the_same_steps_as_with_trls_batches(config, tokenizer, device, tmp_path, monkeypatch):
    """Losses agree within 1e-3 at every step. Dropout is off, because it would draw other numbers for other shapes."""
    own = config.replace(dropout=0.0, n_samples=16, learning_rate=0.01)
    data = prepare(own, tokenizer)
    losses, tokens = [], []
    for number, collate in enumerate((batches.collator, lambda model, device: None)):
        monkeypatch.setattr(batches, "collator", collate)
        built = qlora.attach_lora(qlora.load_base(own, device), own)
        ready = trainer.build_trainer(
            built, RunContext(own, data, tokenizer, device, RunFolder(tmp_path / str(number)))
        )
        ready.train()
        losses.append([line["loss"] for line in ready.state.log_history if "loss" in line])
        tokens.append(ready.state.num_input_tokens_seen)
    assert tokens == [sum(len(example.input_ids) for example in data.train)] * 2  # without padding
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
