"""Figures of the lessons: what their titles state is computed, and follows what a reader changes."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_helpers import lessons
from qlora_helpers.config import Config
from qlora_helpers.errors import UserError
from qlora_helpers.models import qlora

TINYLLAMA = Config.preset("tinyllama-guanaco-100")


def percents(figure):
    return [float(share) for share in re.findall(r"([\d.]+)%", figure.get_suptitle())]


def labeled(figure):
    return figure.get_suptitle() and all(axes.get_xlabel() for axes in figure.axes) and figure.axes[0].get_ylabel()


@pytest.fixture(scope="module")
def model(config, device):
    return qlora.attach_lora(qlora.load_base(config, device), config)


@pytest.fixture(scope="module")
def batch():
    return {"input_ids": torch.arange(5, 25).reshape(1, 20)}


def test_scaling_saves_gradients_until_they_become_infinite():
    (as_they_are, unscaled), (_, scaled), (_, too_far) = map(
        percents, (lessons.loss_scaling(1), lessons.loss_scaling(2**16), lessons.loss_scaling(2**36))
    )
    assert as_they_are == unscaled == pytest.approx(34.4, abs=1)  # normal: below log10(2**-25) = -7.53 of -7 ± 1.3
    assert scaled < 0.1
    assert too_far > 10


def test_the_factors_of_a_gradient_multiply_to_what_autograd_gives(model, batch):
    layer = model.base_model.model.model.layers[1].self_attn.v_proj.base_layer
    plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
    with torch.no_grad():
        plain.weight.copy_(torch.randn(plain.weight.shape, generator=torch.Generator().manual_seed(0)))
    model.base_model.model.model.layers[1].self_attn.v_proj.base_layer = plain
    try:
        plain.weight.requires_grad_(False)
        left, right = lessons._factors(model, batch, plain)
        assert not plain._forward_hooks
        plain.weight.requires_grad_(True)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        torch.testing.assert_close(left.T @ right / lessons.SCALE, plain.weight.grad, rtol=1e-3, atol=1e-6)
    finally:
        model.base_model.model.model.layers[1].self_attn.v_proj.base_layer = layer
        model.zero_grad()


@given(st.integers(1, 12), st.integers(2, 8), st.integers(2, 8), st.integers(0, 99))
def test_shares_are_those_of_the_singular_values_of_the_product(tokens, outputs, inputs, seed):
    draw = torch.Generator().manual_seed(seed)
    left, right = torch.randn(tokens, outputs, generator=draw), torch.randn(tokens, inputs, generator=draw)
    squares = torch.linalg.svdvals(left.T @ right).square()[: min(tokens, outputs, inputs)]
    shares = lessons._shares(left, right)[: len(squares)]
    np.testing.assert_allclose(shares, (squares.cumsum(0) / squares.sum()).numpy(), atol=1e-4)


def test_the_figure_of_the_rank_leaves_the_model_as_it_was(model, batch):
    with torch.no_grad():
        before = model.eval()(**batch).logits
    figure = lessons.low_rank(model, batch, "q_proj")
    assert labeled(figure)
    _, most, width = map(int, re.findall(r"\d+", figure.get_suptitle()))
    shares = figure.axes[0].lines[0].get_ydata()
    assert width == 64
    assert most == 1 or shares[most - 2] < 99
    assert shares[most - 1] >= 99
    assert shares[19] == pytest.approx(100)  # 20 tokens: at most 20 directions
    assert not [name for name, p in model.named_parameters() if p.grad is not None]
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before)


def test_a_layer_without_an_adapter_is_refused(model, batch):
    with pytest.raises(UserError, match=r"layer: o_proj has no adapter\. Fix: "):
        lessons.low_rank(model, batch, "o_proj")


def test_a_larger_alpha_goes_further_per_step_and_dropout_hides_inputs():
    small, medium, large = (lessons._trained(scale, 16, 0.0)[10] for scale in (0.5, 2, 8))
    assert small > medium > large
    assert lessons._trained(2, 16, 0.5)[-1] > 5 * lessons._trained(2, 16, 0.0)[-1]
    assert labeled(lessons.alpha([8, 2048], 16, 0.05))


def test_an_adapters_moments_take_eight_bytes_per_weight():
    figure = lessons.optimizer_states(TINYLLAMA)
    assert labeled(figure)
    assert f" {2_252_800 * 8 / 2**20:.0f} MiB" in figure.get_suptitle()
    *_, adapter, in_8_bits = (bar.get_width() for bar in figure.axes[0].patches)
    assert in_8_bits < adapter / 3
    assert lessons.optimizer_states(TINYLLAMA.replace(rank=64)).get_suptitle() != figure.get_suptitle()


def test_checkpointing_takes_less_memory_for_every_length_and_more_time():
    figure = lessons.checkpointing(TINYLLAMA, "t4")
    assert labeled(figure)
    off, on, _ = (line.get_ydata() for line in figure.axes[0].lines)
    assert all(np.array(off) > np.array(on))
    assert "1.5 times as long" in figure.get_suptitle()
