"""Steps from CUDA graphs: the loss and gradients of the model's own forward pass, and what the trainer makes of them.

Graphs need a GPU, but the passes that they record run anywhere.
"""

import json
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from qlora_helpers.data.prompts import IGNORE
from qlora_helpers.device import detect
from qlora_helpers.models import forward, qlora
from qlora_helpers.planning import compute_dtype
from qlora_helpers.runs import RunFolder
from qlora_helpers.training import cuda_graphs, paths, trainer
from qlora_helpers.training.cuda_graphs import FixedShapes, GraphStep, Passes
from qlora_helpers.training.paths import Choice
from qlora_helpers.training.qlora_trainer import QloraTrainer

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def features(*sizes, untrained=3):
    rows = [[(7 + 31 * n * place * (place + 1)) % 900 for place in range(size)] for n, size in enumerate(sizes, 1)]
    return [{"input_ids": ids, "labels": [IGNORE] * untrained + ids[untrained:]} for ids in rows]


@pytest.fixture
def model(config):
    """An adapter on the tiny model in 4 bits, on the GPU if there is one, without dropout."""
    torch.manual_seed(0)
    here = compute_dtype.device_for(config) if not torch.cuda.is_available() else detect("float32")
    adapted = qlora.attach_lora(qlora.load_base(config, here), config.replace(dropout=0.0))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return adapted.train()


@pytest.fixture
def passes(model):
    return Passes(model, detect("float32"), lambda loss: loss.backward())


def moved(batch, model):
    return {key: value.to(model.device) for key, value in batch.items() if torch.is_tensor(value)}


def gradients(model):
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=4), sampling=st.sampled_from(["random", "group_by_length"])
)
def test_every_row_fits_one_of_at_most_eight_lengths(sizes, sampling):
    lengths = cuda_graphs.lengths_for(max(sizes), sampling)
    assert len(lengths) <= cuda_graphs.MOST_LENGTHS
    batch = FixedShapes(4, lengths)(features(*sizes, untrained=0))
    assert batch["input_ids"].shape[0] == 4
    assert batch["tokens"] == sum(sizes)
    assert max(sizes) <= batch["input_ids"].shape[1] < max(sizes) + lengths[0]
    assert int((batch["labels"] != IGNORE).sum()) == sum(sizes)


def test_lengths_are_multiples_of_the_smallest_width_that_needs_at_most_eight():
    assert cuda_graphs.lengths_for(512) == (64, 128, 192, 256, 320, 384, 448, 512)
    assert cuda_graphs.lengths_for(513) == (128, 256, 384, 512, 640)


def test_loss_and_gradients_are_those_of_the_models_own_forward_pass(model, passes):
    """Also over several chunks, with an empty row, and with rows of different lengths."""
    passes.chunk = 50
    rows = features(20, 70, 33)
    batch = moved(FixedShapes(4, (64, 128))(rows), model)
    trained = (batch["labels"][:, 1:] != IGNORE).sum()
    loss = passes(batch["input_ids"], batch["labels"], trained)
    ours = gradients(model)
    model.zero_grad()
    own = 0.0
    for row in rows:  # one at a time: no padding, no mask
        ids, labels = (torch.tensor([row[key]], device=model.device) for key in ("input_ids", "labels"))
        part = model(input_ids=ids, labels=labels, num_items_in_batch=trained).loss
        part.backward()
        own += part.item()
    assert loss.item() == pytest.approx(own, abs=1e-5)
    for mine, theirs in zip(ours, gradients(model), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)
    assert model.config._attn_implementation == "sdpa"
    assert all(state.nested for state, *_ in passes.scales)
    assert passes.scales


def test_a_row_does_not_change_the_loss_of_another(model, passes):
    """The first row is not trained. If the second attended to it, its loss would depend on it."""
    losses = []
    for first in (features(40)[0], features(1, 40)[1]):
        silent = {"input_ids": first["input_ids"], "labels": [IGNORE] * 40}
        batch = moved(FixedShapes(2, (64,))([silent, *features(50)]), model)
        losses.append(passes(batch["input_ids"], batch["labels"], torch.tensor(47.0)).item())
    assert losses[0] == losses[1]


def test_model_that_attends_within_a_window_keeps_the_librarys_steps(model, passes):
    model.config.sliding_window = 32
    assert "window" in paths._unsuitable(model, passes, 64)
    assert paths._unsuitable(model, passes, 32) is None


def test_model_whose_head_is_not_all_of_its_logits_keeps_the_librarys_steps(model, passes):
    """Granite, Gemma and others scale or cap their logits after the head."""
    head = passes.head
    passes.head = lambda hidden: head(hidden) / 8
    assert "differs" in paths._unsuitable(model, passes, 64)


def test_norms_take_one_kernel_where_that_gives_the_same(model, passes):
    """Gemma adds 1 to the weights, which `rms_norm` does not."""
    blocks = model.config.num_hidden_layers
    assert len(passes.replaced) == 2 * blocks + 1
    norm, fused = next(iter(passes.replaced.items()))
    hidden = torch.randn(2, 3, norm.weight.numel(), device=model.device)
    assert torch.allclose(fused(hidden), norm(hidden), atol=1e-6)
    gemma = GemmaRMSNorm(16)
    gemma.weight.requires_grad_(False).fill_(0.5)
    assert cuda_graphs._fused_norms(torch.nn.ModuleList([gemma, torch.nn.LayerNorm(16)])) == {}


def test_cpu_keeps_the_librarys_steps(model):
    here = detect("float32")
    if here.kind == "cpu":
        assert paths.choose(model, here, None, "auto", 4, (64,), 10) == (
            None,
            Choice("off", "CUDA graphs need an NVIDIA or AMD GPU"),
        )
    assert paths.choose(model, here, None, "off", 4, (64,), 10) == (None, Choice("off", "as requested"))


def test_length_whose_graph_does_not_fit_is_computed_without_one(model, passes, monkeypatch):
    """The gradients are added to those of the batches before."""
    asked = []

    def capture(self, length):
        asked.append(length)
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(GraphStep, "capture", capture)
    step = GraphStep(passes, 2)
    batch = moved(FixedShapes(2, (64,))(features(40, 50)), model)
    one, two = (step(batch["input_ids"], batch["labels"], torch.tensor(84.0)) for _ in range(2))
    added = gradients(model)
    model.zero_grad()
    assert passes(batch["input_ids"], batch["labels"], torch.tensor(84.0)) == one == two
    assert asked == [64]
    for twice, once in zip(added, gradients(model), strict=True):
        assert torch.allclose(twice, 2 * once)


@pytest.mark.parametrize(("room_gib", "dropped"), [(1e6, []), (16.0, ["graphs"])])
def test_graphs_that_take_more_than_half_of_the_memory_are_dropped_before_an_evaluation(room_gib, dropped):
    ready, seen = QloraTrainer.__new__(QloraTrainer), []
    ready.device_, ready.peak_gib, ready.room_gib = detect("float32"), 9.0, room_gib
    ready.graphs = SimpleNamespace(release=lambda: seen.append("graphs"))
    with ready.evaluating():
        assert seen == dropped


def test_only_whole_chunks_are_computed_by_the_compiled_loss(model, passes):
    """The last chunk has another size in every batch length, and each size would be compiled anew."""
    passes.chunk, sizes = 50, []
    passes.loss_of_chunk = lambda hidden, labels: sizes.append(len(hidden)) or passes._loss_sum(hidden, labels)
    batch = moved(FixedShapes(2, (64,))(features(40, 60)), model)
    passes(batch["input_ids"], batch["labels"], torch.tensor(94.0))
    assert sizes == [50, 50]  # of 2 x 63 predictions


@pytest.mark.parametrize(
    ("wanted", "passes_left", "seconds", "path"),
    [
        ("auto", 100, {"off": 1.0, "graphs": 1.0}, "off"),
        ("auto", 100, {"off": 2.0, "graphs": 0.5}, "graphs"),  # compiling two lengths takes 16 s and saves 15 s
        ("auto", 108, {"off": 2.0, "graphs": 0.5, "compiled": 0.4}, "compiled"),  # saves 16.2 s
        ("auto", 108, {"off": 2.0, "graphs": 0.5, "compiled": 0.5}, "graphs"),
        ("auto", 108, {"off": 2.0, "graphs": 0.5, "compiled": 0.6}, "graphs"),
        ("graphs", 108, {"off": 1.0, "graphs": 2.0}, "graphs"),
        ("".join(["comp", "iled"]), 1, {"off": 1.0, "compiled": 2.0}, "compiled"),
    ],
)
def test_path_is_the_fastest_that_pays_for_itself_or_the_wanted_one(monkeypatch, wanted, passes_left, seconds, path):
    times, measured, step = iter(seconds.values()), {}, MagicMock()
    monkeypatch.setattr(paths, "_seconds", lambda run: next(times))
    chosen, choice = paths._fastest(step, wanted, (64, 128), passes_left, measured)
    assert (choice.path, measured) == (path, seconds)
    assert chosen is (None if path == "off" else step)
    assert step.passes.compile.called == ("compiled" in seconds)
    assert step.passes.undo_compile.called == ("compiled" in seconds and path == "graphs")


class Recorded(TrainerCallback):
    """Lines that the trainer logs."""

    def on_train_end(self, args, state, control, **kwargs):
        self.lines = [line for line in state.log_history if "loss" in line]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_run_of_recorded_passes_is_the_librarys(config, data, tokenizer, tmp_path, monkeypatch, accumulation):
    """The same losses and adapter, a line per step, though the log is written every tenth step."""
    settings = config.replace(
        dropout=0.0, epochs=3, batch_size=4 // accumulation, gradient_accumulation=accumulation, eval_steps=10**6,
        save_steps=5, n_answers=0, few_shot=False,
    )  # fmt: skip

    def run(name):
        seen = Recorded()
        folder = trainer.train(settings, data, tokenizer, RunFolder(tmp_path / name), [seen])
        return folder, seen.lines

    own, own_lines = run("own")
    monkeypatch.setattr(
        paths, "choose",
        lambda model, device, backward, *_: (Passes(model, device, backward), Choice("graphs", "for this test")),
    )  # fmt: skip
    folder, lines = run("passes")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in own_lines], rel=1e-4)
    assert [line["learning_rate"] for line in lines] == [line["learning_rate"] for line in own_lines]
    assert lines[-1]["num_input_tokens_seen"] == own_lines[-1]["num_input_tokens_seen"]
    written = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written if "loss" in line] == list(range(1, 13))
    weights = [load_file(one.adapter / "adapter_model.safetensors") for one in (own, folder)]
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], atol=1e-4)
    assert folder.read("manifest.json")["training_path"]["path"] == "graphs"


def test_run_that_continues_keeps_its_path(config, data, tokenizer, tmp_path, monkeypatch):
    asked = []

    def choose(model, device, backward, wanted, rows, lengths, passes_left):
        asked.append((wanted, passes_left))
        return None, Choice("compiled", "for this test")

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(paths, "choose", choose)
    settings = config.replace(n_answers=0, few_shot=False, batch_size=2, gradient_accumulation=2)
    run = RunFolder(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        trainer.train(settings, data, tokenizer, run, [Stop()])
    trainer.train(settings, data, tokenizer, run)
    assert asked == [("auto", 8), ("compiled", 4)]  # two passes for each of 4 steps, and of the 2 left


@pytest.mark.parametrize(("dropout", "kept"), [(0.0, False), (0.1, True)])
def test_random_numbers_are_kept_for_recomputing_only_with_dropout(config, dropout, kept):
    """A graph cannot set their generator back."""
    changed = MagicMock()
    paths.recompute(changed, config.replace(dropout=dropout))
    assert changed.args.gradient_checkpointing_kwargs["preserve_rng_state"] is kept


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activations_are_recomputed_before_paths_are_tried(config, data, tokenizer, tmp_path, monkeypatch, dropout):
    """What is timed and captured is what is trained. With dropout there is nothing to try."""
    seen = []

    def choose(model, *_):
        seen.append((forward.recomputes(model), Passes(model, detect("float32"), None).scales))
        return None, Choice("off", "for this test")

    monkeypatch.setattr(paths, "choose", choose)
    settings = config.replace(gradient_checkpointing=True, dropout=dropout, n_answers=0, few_shot=False)
    run = trainer.train(settings, data, tokenizer, RunFolder(tmp_path / "run"))
    assert seen == ([] if dropout else [(True, [])])
    assert ("dropout" in run.read("manifest.json")["training_path"]["reason"]) == bool(dropout)


def test_recomputed_blocks_keep_their_inputs_in_the_computers_memory(model):
    """One buffer for each block, also for longer rows later; losses and gradients stay the same."""
    plain = Passes(model, detect("float32"), lambda loss: loss.backward())
    model.enable_input_require_grads()
    options = {"use_reentrant": False, "preserve_rng_state": False}
    results: dict[bool, list] = {False: [], True: []}
    for recompute in results:
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            passes = Passes(model, detect("float32"), lambda loss: loss.backward())
        for sizes in ((20, 60, 33, 9), (100, 20, 7, 5), (64, 3, 9)):
            model.zero_grad()
            batch = moved(FixedShapes(4, (64, 128))(features(*sizes)), model)
            compute = passes if recompute else plain
            loss = compute(batch["input_ids"], batch["labels"], torch.tensor(100.0, device=model.device))
            results[recompute] += [loss.detach(), *gradients(model)]
    assert plain.host is None
    for one, other in zip(results[False], results[True], strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)
    shape = forward.inner(model).config
    kept = [tuple(buffer.numel() for buffer in buffers) for buffers in passes.host.buffers.values()]
    assert len(kept) >= shape.num_hidden_layers  # and what the last norm saves
    assert {*kept} == {(4 * 64 * shape.hidden_size, 4 * 128 * shape.hidden_size)}


@needs_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_graph_recomputes_activations(config, dtype):
    here = detect(dtype)
    adapted = qlora.attach_lora(qlora.load_base(config, here), config.replace(dropout=0.0)).train()
    adapted.enable_input_require_grads()
    options = {"use_reentrant": False, "preserve_rng_state": False}
    batch = moved(FixedShapes(4, (64, 128))(features(100, 20, 7, 5)), adapted)
    items, losses = torch.tensor(100.0, device=adapted.device), []
    for recompute in (False, True):
        if recompute:
            adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        step = GraphStep(Passes(adapted, here, lambda loss: loss.backward()), 4)
        losses.append([step(batch["input_ids"], batch["labels"], items).item() for _ in range(2)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@needs_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_graph_replays_what_the_passes_compute(config, dtype):
    """Losses, gradients and dropout, over two lengths, with gradients added up over two passes."""
    here = detect(dtype)
    adapted = qlora.attach_lora(qlora.load_base(config, here), config.replace(dropout=0.2)).train()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # at first 0, and dropout on the adapter's input would change nothing
            parameter.data.normal_(std=0.1)
    passes = Passes(adapted, here, lambda loss: loss.backward())
    step = GraphStep(passes, 4)
    collate = FixedShapes(4, (64, 128))
    sequence = [moved(collate(features(*sizes)), adapted) for sizes in ((20, 60, 33, 9), (100, 20, 7, 5), (64, 3, 9))]
    items = torch.tensor(100.0, device=adapted.device)
    results = []
    for compute in (passes, step):
        adapted.zero_grad()
        torch.cuda.manual_seed(0)
        losses = [compute(batch["input_ids"], batch["labels"], items).item() for batch in sequence]
        results.append((losses, gradients(adapted)))
    (plain, plain_gradients), (replayed, replayed_gradients) = results
    assert replayed == pytest.approx(plain, rel=1e-3)
    for one, other in zip(plain_gradients, replayed_gradients, strict=True):
        assert torch.allclose(one, other, rtol=0.02, atol=1e-4)
    assert replayed[0] != pytest.approx(step(sequence[0]["input_ids"], sequence[0]["labels"], items).item(), rel=1e-6)


@needs_gpu
def test_failed_capture_leaves_training_and_random_numbers_working(config, data, tokenizer, tmp_path, monkeypatch):
    original = Passes.__call__

    def failing(self, ids, labels, items):
        if torch.cuda.is_current_stream_capturing():
            ids.sum().item()
        return original(self, ids, labels, items)

    monkeypatch.setattr(Passes, "__call__", failing)
    settings = config.replace(compute_dtype="bfloat16", fast="graphs", n_answers=0, few_shot=False, dropout=0.1)
    run = trainer.train(settings, data, tokenizer, RunFolder(tmp_path / "run"))
    chosen = run.read("manifest.json")["training_path"]
    assert (chosen["path"], chosen["reason"][:16]) == ("off", "capturing failed")


@needs_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("path", ["graphs", "compiled"])
def test_interrupted_run_ends_as_the_uninterrupted_one(config, data, tokenizer, tmp_path, path, dtype):
    settings = config.replace(compute_dtype=dtype, fast=path, n_answers=0, few_shot=False, dropout=0.1, epochs=2)

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    whole = trainer.train(settings, data, tokenizer, RunFolder(tmp_path / "whole"))
    cut = RunFolder(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        trainer.train(settings, data, tokenizer, cut, [Stop()])
    trainer.train(settings, data, tokenizer, cut)
    weights = [load_file(one.adapter / "adapter_model.safetensors") for one in (whole, cut)]
    assert whole.read("manifest.json")["training_path"]["path"] == path
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
