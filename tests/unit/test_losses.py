"""Losses against a plain loop, with examples in the prompt, in bytes, and on the general questions."""

import dataclasses

import pytest
import torch

from qlora_helpers.data import cleaning, prompts
from qlora_helpers.evaluation import losses
from qlora_helpers.evaluation.row_losses import RowLoss, mean_loss
from qlora_helpers.models import qlora


def one_by_one(built, examples):
    """The library's own loss, a row at a time, without padding."""
    losses = []
    for example in examples:
        with torch.no_grad():
            out = built(input_ids=torch.tensor([example.input_ids]), labels=torch.tensor([example.labels]))
        losses.append((out.loss.item(), sum(label != -100 for label in example.labels[1:])))
    return losses


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_losses_equal_a_plain_loop(setup, device, batch_size):
    built, examples = setup
    assert len({len(example.input_ids) for example in examples}) > 2  # so there is padding
    got = losses.heldout_losses(built, examples, device, batch_size)
    want = one_by_one(built, examples)
    assert [row.id for row in got] == [example.row.id for example in examples]
    assert [row.tokens for row in got] == [tokens for _, tokens in want]
    assert [row.loss_sum / row.tokens for row in got] == pytest.approx([loss for loss, _ in want], abs=1e-4)


def test_what_is_trained_is_never_passed_over(setup, device):
    """Rows that share trained tokens, or nothing else: all of these count."""
    built, examples = setup
    row = max(examples, key=lambda example: len(example.input_ids))
    twice = [row, dataclasses.replace(row, labels=[-100, *row.input_ids[1:]])]
    long = [
        dataclasses.replace(e, input_ids=e.input_ids * 5, labels=[-100] * 4 * len(e.labels) + e.labels) for e in twice
    ]
    for rows in (twice, long, long[:1]):
        got = losses.heldout_losses(built, rows, device)
        want = one_by_one(built, rows)
        assert [r.tokens for r in got] == [tokens for _, tokens in want]
        assert [r.loss_sum / r.tokens for r in got] == pytest.approx([loss for loss, _ in want], abs=1e-4)


def test_more_tokens_than_go_through_the_head_at_once(setup, device, monkeypatch):
    built, examples = setup
    whole = losses.heldout_losses(built, examples, device)
    monkeypatch.setattr(losses.memory, "EVALUATION_LOGITS", 7)
    parts = losses.heldout_losses(built, examples, device)
    assert [row.loss_sum for row in parts] == pytest.approx([row.loss_sum for row in whole], rel=1e-5)


def test_losses_in_batches_of_a_gpu_are_the_same_in_fewer_passes(setup, device, monkeypatch):
    built, examples = setup
    short = [
        dataclasses.replace(e, input_ids=e.input_ids[:12], labels=[-100] * 4 + e.input_ids[4:12]) for e in examples
    ]
    rows, passes, logits_at = [*examples, *short], [], losses.forward.logits_at
    monkeypatch.setattr(losses.forward, "logits_at", lambda *given: passes.append(1) or logits_at(*given))
    want = losses.heldout_losses(built, rows, device, 4)
    on_cpu = len(passes)
    got = losses.heldout_losses(built, rows, dataclasses.replace(device, kind="cuda"), 4)
    assert [row.loss_sum for row in got] == pytest.approx([row.loss_sum for row in want], rel=1e-5)
    assert len(passes) - on_cpu < on_cpu


def test_measuring_leaves_no_trace(setup, device):
    built, examples = setup
    for training in (True, False):
        built.train(training)
        state = torch.get_rng_state()
        first = losses.heldout_losses(built, examples, device)
        assert built.training is training
        assert torch.equal(torch.get_rng_state(), state)
        assert losses.heldout_losses(built, examples, device) == first  # no dropout
    assert not any(p.grad is not None for p in built.parameters())


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_on_a_cpu_losses_are_in_float32(setup, config, device, quantization):
    """Those of a run that computes in bfloat16 equal those of float32, and its model stays as it was."""
    _, examples = setup
    own = config.replace(quantization=quantization)

    def built(dtype):
        torch.manual_seed(0)
        model = qlora.attach_lora(qlora.load_base(own, device.computing_in(dtype)), own)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return model.eval()

    def in_bfloat16(model):
        with torch.no_grad():
            return model(input_ids=torch.tensor([examples[0].input_ids])).logits

    narrow, wide = built("bfloat16"), built("float32")
    adapter = {name: p for name, p in narrow.named_parameters() if p.requires_grad}  # the library draws it in bfloat16
    wide.load_state_dict(adapter, strict=False)
    before, stored = in_bfloat16(narrow), [(p.data_ptr(), p.dtype) for p in narrow.parameters()]
    got = losses.heldout_losses(narrow, examples, device.computing_in("bfloat16"))
    want = losses.heldout_losses(wide, examples, device)
    assert [row.loss_sum for row in got] == pytest.approx([row.loss_sum for row in want], rel=1e-6)
    rounded = losses.heldout_losses(narrow, examples, device)  # as if it computed in float32 already
    assert [row.loss_sum for row in rounded] != pytest.approx([row.loss_sum for row in want], rel=1e-6)
    assert torch.equal(in_bfloat16(narrow), before)
    assert [(p.data_ptr(), p.dtype) for p in narrow.parameters()] == stored


def test_a_failed_evaluation_leaves_the_model_as_it_was(setup, config, device, monkeypatch):
    _, examples = setup
    here = device.computing_in("bfloat16")
    model = qlora.attach_lora(qlora.load_base(config, here), config)
    before = [(p.data_ptr(), p.dtype) for p in model.parameters()]
    monkeypatch.setattr(losses.forward, "logits_at", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        losses.heldout_losses(model, examples, here)
    assert [(p.data_ptr(), p.dtype) for p in model.parameters()] == before


def test_losses_of_other_arithmetic_are_kept_apart(config, data, device, tmp_path):
    """Those of the base in bfloat16 that earlier versions stored are not read as float32."""
    narrow = losses.baseline_folder(config, data, device.computing_in("bfloat16"), tmp_path)
    wide = losses.baseline_folder(config, data, device, tmp_path)
    on_gpu = dataclasses.replace(device, kind="cuda", dtype="bfloat16")
    assert len({f.path for f in (narrow, wide, losses.baseline_folder(config, data, on_gpu, tmp_path))}) == 3


def test_the_mean_counts_tokens_not_rows():
    rows = [RowLoss("a", 10.0, 1, 0), RowLoss("b", 30.0, 9, 0)]
    assert mean_loss(rows) == 4.0


def test_after_shots_the_same_tokens_count(setup, config, device, tokenizer):
    """Three examples before the row: another loss on the same tokens."""
    built, examples = setup
    shots = ({"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}) * 3
    for template in ("guanaco", "instruction", "auto"):
        own = config.replace(template=template, max_length=90)
        plain = list(prompts.encode([example.row for example in examples], own, tokenizer))
        plain = [example for example in plain if example.trained]
        longer = [losses.after_shots(example, shots, own, tokenizer) for example in plain]
        assert all(len(b.input_ids) > len(a.input_ids) for a, b in zip(plain, longer, strict=True))
        assert all(b.input_ids.count(tokenizer.bos_token_id) <= 1 for b in longer)
        assert len(plain) > 5
        before, after = (losses.heldout_losses(built, rows, device) for rows in (plain, longer))
        assert [(r.id, r.tokens) for r in before] == [(r.id, r.tokens) for r in after]
        assert [r.loss_sum for r in before] != [r.loss_sum for r in after]


def test_the_examples_in_the_prompt_are_ordinary_rows(config, tokenizer):
    """Answers of about the median length; other ones with another data seed, but not with more training rows."""
    few, many = (cleaning.prepare(config.replace(n_samples=n), tokenizer) for n in (4, 30))
    shots = losses.choose_shots(few, 0)
    assert len(shots) == 2 * losses.SHOTS
    assert shots == losses.choose_shots(many, 0) != losses.choose_shots(few, 1)
    lengths = sorted(len(item.row.rounds[0][1]["content"]) for item in few.cleaned.train)
    quarter = len(lengths) // 4
    for answer in shots[1::2]:
        assert lengths[quarter] < len(answer["content"]) < lengths[-quarter]


def test_bytes_are_those_of_whole_answers(make_row, config, tokenizer):
    row = make_row("Hi", "Là-bas 🎉", "And?", "ok")
    (whole,) = prompts.encode([row], config, tokenizer)
    (cut,) = prompts.encode([row], config.replace(max_length=len(whole.input_ids) - 1), tokenizer)
    assert losses.answer_bytes(whole) == len("Là-bas 🎉".encode()) + 2
    assert losses.answer_bytes(cut) == 0


def test_the_general_questions_are_frozen(config, tokenizer):
    """A changed row would make old and new measurements of forgetting different things."""
    examples = losses.general_examples(config, tokenizer)
    assert len(examples) == 48
    assert cleaning.fingerprint(example.row.id for example in examples) == "f1baae56cf136ba8"
    assert not any(example.cut for example in examples)
    assert examples[0].text.startswith("<|im_start|>user")  # the model's own template


CHANGES = ({"thinking": False}, {"template_date": "2024-07-26"}, {"end_token": "<s>"}, {"system": "Hi"})


@pytest.mark.parametrize("change", CHANGES)
def test_a_base_model_that_is_prompted_otherwise_is_measured_again(config, data, device, tmp_path, change):
    plain, other = (losses.baseline_folder(c, data, device, tmp_path) for c in (config, config.replace(**change)))
    assert plain.name != other.name


def test_only_a_limit_that_cuts_other_rows_makes_other_losses(config, data, tokenizer, device, tmp_path):
    rows = [example.row for example in data.heldout]
    names = []
    for length in (512, 600, 20):
        read = dataclasses.replace(
            data, heldout=list(prompts.encode(rows, config.replace(max_length=length), tokenizer))
        )
        names.append(losses.baseline_folder(config, read, device, tmp_path).name)
    assert names[0] == names[1] != names[2]
