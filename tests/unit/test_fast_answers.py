"""On a GPU, answers come from a CUDA graph. They are those of `generate`."""

from dataclasses import replace

import pytest
import torch
from test_families import TINY
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from qlora_helpers.device import detect
from qlora_helpers.evaluation import answers
from qlora_helpers.models import forward

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
QUESTIONS = ["Hi", "What is a variable in programming, and why would I need more than one of them?", "How do I?"]
ASKED = [{"prompt": question, "reference": None} for question in QUESTIONS]
CAPTURED = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2},
    "gpt_neox": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "phi3": {},
    "granite": {"logits_scaling": 8.0},
    "bloom": {"n_head": 4, "n_layer": 2},  # ALiBi
}
OTHERS = {
    "gemma3_text": {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


class Recomputed:
    """Stands in for a graph: a replay computes the pass again, from the tensors that a graph would read."""

    replays = 0

    def __init__(self, body):
        self.body, self.output = body, CausalLMOutputWithPast()

    def replay(self):
        Recomputed.replays += 1
        for name, value in self.body().items():
            self.output[name] = value


@pytest.fixture
def gpu(device, monkeypatch):
    """A device that answers as on a GPU."""

    def capture(body):
        graph = Recomputed(body)
        return graph, graph.output

    monkeypatch.setattr(Recomputed, "replays", 0)
    monkeypatch.setattr(forward, "capture", capture)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return replace(device, kind="cuda")


def build(family, tokenizer, **settings):
    """A random model of a family in float32 whose answers vary."""
    torch.manual_seed(0)
    shape = TINY | {"vocab_size": len(tokenizer), "max_position_embeddings": 256} | settings
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape)).float().eval()


def ends_within(rows, tokenizer):
    """Tokens that end the first answer early and the second one later."""
    written = [tokenizer(row["answer"], add_special_tokens=False)["input_ids"] for row in rows]
    return [tokenizer.eos_token_id, written[0][3], written[1][9]]


@pytest.mark.parametrize("family", CAPTURED)
def test_answers_from_a_graph_are_those_of_generate(family, gpu, config, device, tokenizer, monkeypatch):
    """For questions of different lengths, with answers that end early, at one of several tokens."""
    model, own = build(family, tokenizer, **CAPTURED[family]), config.replace(max_new_tokens=20)
    whole = answers.generate(model, tokenizer, own, device, ASKED)
    assert answers.generate(model, tokenizer, own, gpu, ASKED) == whole
    assert Recomputed.replays == 18
    assert len({row["answer"] for row in whole}) == 3
    monkeypatch.setattr(answers.rendering, "end_tokens", lambda *_: ends_within(whole, tokenizer))
    ended = answers.generate(model, tokenizer, own, device, ASKED)
    assert any(row["stopped"] for row in ended)
    assert answers.generate(model, tokenizer, own, gpu, ASKED) == ended
