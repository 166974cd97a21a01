"""Held-out losses against a plain loop, and answers."""

import pytest
import torch

from qlora_helpers import cleaning, evaluation, model
from qlora_helpers.evaluation import RowLoss


@pytest.fixture(scope="module")
def setup(config, device, tokenizer):
    """A float32 model with an adapter that does something, and held-out rows of many lengths."""
    plain = config.replace(quantization="none", max_length=48, n_heldout=11, n_samples=1)
    built = model.attach_lora(model.load_base(plain, device), plain)
    torch.manual_seed(0)
    for name, p in built.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.1)
    rows = cleaning.prepare(plain, tokenizer).heldout
    for length in (32, 40, 56):
        rows += cleaning.prepare(plain.replace(max_length=length), tokenizer).heldout[:2]
    return built.eval(), rows


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
    got = evaluation.heldout_losses(built, examples, device, batch_size)
    want = one_by_one(built, examples)
    assert [row.id for row in got] == [example.row.id for example in examples]
    assert [row.tokens for row in got] == [tokens for _, tokens in want]
    assert [row.loss_sum / row.tokens for row in got] == pytest.approx([loss for loss, _ in want], abs=1e-4)


def test_more_tokens_than_go_through_the_head_at_once(setup, device, monkeypatch):
    built, examples = setup
    whole = evaluation.heldout_losses(built, examples, device)
    monkeypatch.setattr(evaluation, "LOGIT_ROWS", 7)
    parts = evaluation.heldout_losses(built, examples, device)
    assert [row.loss_sum for row in parts] == pytest.approx([row.loss_sum for row in whole], rel=1e-5)


def test_measuring_leaves_no_trace(setup, device):
    built, examples = setup
    for training in (True, False):
        built.train(training)
        state = torch.get_rng_state()
        first = evaluation.heldout_losses(built, examples, device)
        assert built.training is training
        assert torch.equal(torch.get_rng_state(), state)
        assert evaluation.heldout_losses(built, examples, device) == first  # no dropout
    assert not any(p.grad is not None for p in built.parameters())


def test_the_mean_counts_tokens_not_rows():
    losses = [RowLoss("a", 10.0, 1), RowLoss("b", 30.0, 9)]
    assert evaluation.mean_loss(losses) == 4.0


class Fixed(torch.nn.Module):
    """Stands in for a model: answers with given tokens."""

    def __init__(self, answers):
        super().__init__()
        self.words, self.answers = torch.nn.Embedding(1, 1), answers

    def get_input_embeddings(self):
        return self.words

    def generate(self, input_ids, **options):
        return torch.cat([input_ids, torch.tensor(self.answers)], dim=1)


def test_an_answer_ends_at_the_first_end_token(config, device, tokenizer):
    end, (word,) = tokenizer.eos_token_id, tokenizer("a", add_special_tokens=False)["input_ids"]
    fixed = Fixed([[word, end, end], [word, word, word], [end, word, word]])
    said = evaluation.answer(fixed, tokenizer, config, device, ["x", "y", "z"])
    assert said == [
        {"prompt": "x", "answer": "a", "stopped": True, "tokens": 1},
        {"prompt": "y", "answer": "aaa", "stopped": False, "tokens": 3},
        {"prompt": "z", "answer": "", "stopped": True, "tokens": 0},
    ]


@pytest.mark.parametrize("template", ["guanaco", "auto"])
def test_answers_alone_and_in_a_batch_are_the_same(setup, config, device, tokenizer, template):
    built, _ = setup
    built.train()
    asked = config.replace(template=template)
    prompts = ["Hi", "What is a variable in programming, and why would I need more than one of them?", "How do I?"]
    together = evaluation.answer(built, tokenizer, asked, device, prompts)
    alone = [evaluation.answer(built, tokenizer, asked, device, [p])[0] for p in prompts]
    assert together == alone
    assert len({a["answer"] for a in alone}) > 1
    assert all(a["tokens"] == config.max_new_tokens or a["stopped"] for a in alone)
    assert built.training
    assert tokenizer.padding_side == "right"


def test_what_is_asked(setup):
    _, examples = setup
    prompts = evaluation.answer_prompts(examples)
    assert prompts[:2] == list(evaluation.PUBLISHED_PROMPTS)
    assert prompts[2:] == [example.row.messages[0]["content"] for example in examples[:2]]
