"""On a GPU, answers come from a CUDA graph. They are those of `generate`."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from test_families import TINY
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from qlora_helpers.device import detect
from qlora_helpers.evaluation import answers
from qlora_helpers.models import forward, qlora
from qlora_helpers.planning import memory

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


@pytest.fixture(scope="module")
def device():
    """A device that answers without graphs, also where there is a GPU."""
    return replace(detect("float32"), kind="cpu")


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


@pytest.fixture(scope="module")
def adapted(config, device):
    """An adapter that changes the answers, on the tiny model in 4 bits."""
    torch.manual_seed(0)
    built = qlora.attach_lora(qlora.load_base(config, device), config)
    for name, parameter in built.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return built


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


@pytest.mark.parametrize("family", OTHERS)
def test_families_with_other_caches_stay_with_generate(family, gpu, config, device, tokenizer):
    model = build(family, tokenizer, **OTHERS[family])
    assert answers.generate(model, tokenizer, config, gpu, ASKED) == answers.generate(
        model, tokenizer, config, device, ASKED
    )
    assert Recomputed.replays == 0


def test_an_adapter_on_four_bits_answers_the_same_and_is_left_as_it_was(gpu, adapted, config, device, tokenizer):
    """Also with a limit for thoughts, and with the adapter disabled."""
    own = config.replace(thinking=True, max_thinking_tokens=5)
    inner = forward.inner(adapted)
    for context in (nullcontext(), adapted.disable_adapter()):
        with context:
            want = answers.generate(adapted, tokenizer, own, device, ASKED)
            assert answers.generate(adapted, tokenizer, own, gpu, ASKED) == want
    assert Recomputed.replays == 2 * (config.max_new_tokens + 5 - 2)
    assert max(row["tokens"] for row in want) == config.max_new_tokens + 5
    assert "forward" not in vars(inner)
    assert inner.config._attn_implementation == "sdpa"


def test_a_model_that_cannot_be_captured_answers_without_a_graph(
    gpu, adapted, config, device, tokenizer, monkeypatch, capsys
):
    def fail(body):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    want = answers.generate(adapted, tokenizer, config, device, ASKED)
    monkeypatch.setattr(forward, "capture", fail)
    assert answers.generate(adapted, tokenizer, config, gpu, ASKED) == want
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("(operation not permitted when stream is capturing).")


def test_heads_that_share_keys_attend_as_with_copies_of_them():
    module, generator = torch.nn.Module(), torch.Generator().manual_seed(0)
    module.num_key_value_groups = 3
    query = torch.randn(2, 6, 1, 8, generator=generator)
    key, value = torch.randn(2, 2, 2, 7, 8, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 0]]).bool()[:, None, None]
    got, _ = forward._grouped(module, query, key, value, mask, scaling=0.3)
    copied = key.repeat_interleave(3, dim=1), value.repeat_interleave(3, dim=1)
    want = torch.nn.functional.scaled_dot_product_attention(query, *copied, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(got, want.transpose(1, 2))


def test_the_plan_counts_the_whole_cache(config, tokenizer, model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    read, written = config.max_length // 2, config.max_new_tokens
    cache = forward.static_cache(model, read + written)
    model(input_ids=torch.ones(3, read, dtype=torch.long), **{answers.cache_argument(model): cache})
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == memory.answer_parts(memory.workload_of(config), 3)["keys and values"]


@needs_gpu
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "bloom"])
def test_captured_answers_are_those_of_generate(family, config, tokenizer, monkeypatch):
    """In float32, on a real GPU, where the graph is a real one."""
    model, own = build(family, tokenizer, **CAPTURED[family]).cuda(), config.replace(max_new_tokens=60)
    captured = []
    capture = forward.capture
    monkeypatch.setattr(forward, "capture", lambda body: captured.append(1) or capture(body))
    fast = answers.generate(model, tokenizer, own, detect("float32"), ASKED)
    again = answers.generate(model, tokenizer, own, detect("float32"), ASKED)
    monkeypatch.setattr(forward, "static_cache", lambda *_: None)
    assert fast == again == answers.generate(model, tokenizer, own, detect("float32"), ASKED)
    assert len(captured) == 2


@needs_gpu
def test_a_failed_capture_leaves_the_gpu_usable(config, tokenizer, monkeypatch, capsys):
    model = build("llama", tokenizer).cuda()
    want = answers.generate(model, tokenizer, config, detect("float32"), ASKED)
    norm = type(model.model.norm).forward
    monkeypatch.setattr(type(model.model.norm), "forward", lambda self, x: norm(self, x * float(x.abs().max() < 1e9)))
    assert answers.generate(model, tokenizer, config, detect("float32"), ASKED) == want
    assert "no CUDA graph of this model" in capsys.readouterr().out
    assert torch.randn(3, device="cuda").isfinite().all()
