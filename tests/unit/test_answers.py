"""Answers end where they should, alone and in a batch."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_helpers.data import prompts, schema
from qlora_helpers.evaluation import answers
from qlora_helpers.models import forward


def asked(*prompts):
    return [{"prompt": prompt, "reference": "r"} for prompt in prompts]


class Fixed(torch.nn.Module):
    """Stands in for a model: answers with given tokens."""

    def __init__(self, answers):
        super().__init__()
        self.words, self.answers = torch.nn.Embedding(1, 1), answers

    def get_input_embeddings(self):
        return self.words

    def generate(self, input_ids, **options):
        self.options = options
        return torch.cat([input_ids, torch.tensor(self.answers)], dim=1)


def test_each_end_token_ends_an_answer(config, device, tokenizer, monkeypatch):
    """The model stops at any of them, and the answer ends there."""
    end, word, other = tokenizer.eos_token_id, *tokenizer("a b", add_special_tokens=False)["input_ids"][:2]
    monkeypatch.setattr(answers.rendering, "end_tokens", lambda config, tokenizer: [end, other])
    fixed = Fixed([[word, other, word]])
    (said,) = answers.generate(fixed, tokenizer, config, device, asked("x"))
    assert fixed.options["eos_token_id"] == [end, other]
    assert (said["answer"], said["stopped"], said["tokens"]) == ("a", True, 1)


def test_an_answer_ends_at_the_first_end_token(config, device, tokenizer):
    end, (word,) = tokenizer.eos_token_id, tokenizer("a", add_special_tokens=False)["input_ids"]
    fixed = Fixed([[word, end, end], [word, word, word], [end, word, word]])
    said = answers.generate(fixed, tokenizer, config, device, asked("x", "x", "x"))
    assert said == [
        {
            "prompt": "x",
            "reference": "r",
            "answer": "a",
            "thought": "",
            "stopped": True,
            "invented": False,
            "tokens": 1,
        },
        {
            "prompt": "x",
            "reference": "r",
            "answer": "aaa",
            "thought": "",
            "stopped": False,
            "invented": False,
            "tokens": 3,
        },
        {"prompt": "x", "reference": "r", "answer": "", "thought": "", "stopped": True, "invented": False, "tokens": 0},
    ]


@pytest.mark.parametrize("template", ["guanaco", "auto"])
def test_answers_alone_and_in_a_batch_are_the_same(setup, config, device, tokenizer, template):
    built, _ = setup
    built.train()
    own = config.replace(template=template)
    prompts = ["Hi", "What is a variable in programming, and why would I need more than one of them?", "How do I?"]
    together = answers.generate(built, tokenizer, own, device, asked(*prompts))
    alone = [answers.generate(built, tokenizer, own, device, asked(p))[0] for p in prompts]
    assert together == alone
    assert len({a["answer"] for a in alone}) > 1
    assert all(a["tokens"] == config.max_new_tokens or a["stopped"] for a in alone)
    assert built.training
    assert tokenizer.padding_side == "right"


@given(lengths=st.lists(st.integers(1, 300), max_size=40), rows=st.integers(1, 9), tokens=st.integers(1, 900))
def test_every_row_is_in_one_batch_of_no_more_rows_and_tokens_than_asked(lengths, rows, tokens):
    """Unless it is alone. Rows of similar length are together, and no two batches would fit one."""
    batches = forward.batches_by_length(lengths, rows, tokens)
    assert [i for batch in batches for i in batch] == sorted(range(len(lengths)), key=lambda i: lengths[i])
    longest = [max(lengths[i] for i in batch) for batch in batches]
    for batch, length in zip(batches, longest, strict=True):
        assert len(batch) == 1 or (len(batch) <= rows and len(batch) * length <= tokens)
    for batch, following in itertools.pairwise(batches):
        assert len(batch) == rows or (len(batch) + 1) * lengths[following[0]] > tokens


def test_long_questions_are_answered_few_at_a_time(setup, config, device, tokenizer, monkeypatch):
    built, own = setup[0], config.replace(max_new_tokens=2, max_length=16)
    sizes = []
    generated = answers._continue
    monkeypatch.setattr(answers, "_continue", lambda *given: sizes.append(len(given[4])) or generated(*given))
    answers.generate(built, tokenizer, own, device, asked(*["word " * 40] * 4), batch_size=4)
    assert sizes == [1, 1, 1, 1]


def test_a_thought_is_no_part_of_the_answer(config, device, tokenizer):
    """Not if it is closed, not if it is empty, and not if the limit cuts it off."""
    texts = [
        "<think>\nHm.\n</think>\n\nBlue.",
        "<think>\n\n</think>\n\nBlue.",
        "<think> Hm.",
        "Hm.</think>Blue.",
        "Blue.",
    ]
    reader = answers.AnswerReader(config, tokenizer)
    read = [reader.read(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    assert [one["answer"] for one in read] == ["Blue.", "Blue.", "", "Blue.", "Blue."]
    assert [one["thought"] for one in read] == ["Hm.", "", "Hm.", "Hm.", ""]


def test_rows_are_asked_as_they_are_trained(config, device, tokenizer, make_row, monkeypatch):
    """With system prompt, input and earlier rounds: the prompt is the beginning of the training text."""
    messages = (
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Add", "input": "2, 3"},
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": "And 4?"},
        {"role": "assistant", "content": "9"},
    )
    seen = []
    monkeypatch.setattr(answers, "_continue", lambda *given: seen.append(given[4]) or [[1]] * len(given[4]))
    for template in ("guanaco", "instruction", "auto"):
        own = config.replace(template=template)
        (example,) = prompts.encode([schema.Row(messages, "line 1")], own, tokenizer)
        asked_row = answers.heldout_prompts([example], 1)[2]
        assert (asked_row["prompt"], asked_row["reference"]) == ("And 4?", "9")
        (answered,) = answers.generate(torch.nn.Identity(), tokenizer, own, device, [asked_row])
        assert list(answered) == ["prompt", "reference", "answer", "thought", "stopped", "invented", "tokens"]
        ((ids,),) = seen[-1:]
        (whole,) = prompts.tokenize([example.text], tokenizer)  # `input_ids` are cut
        assert whole[: len(ids)] == ids
        text = tokenizer.decode(ids)
        assert all(part in text for part in ("5", "Be kind.", "2, 3"))


def test_tests_and_group_of_a_row_are_kept_with_its_answer(config, device, tokenizer, monkeypatch):
    messages = ({"role": "user", "content": "Double it."}, {"role": "assistant", "content": "def f(x): ..."})
    rows = [schema.Row(messages, "line 1", tests="assert f(2) == 4", group="numbers"), schema.Row(messages, "line 2")]
    asked_rows = answers.heldout_prompts(list(prompts.encode(rows, config, tokenizer)), 2)[2:]
    monkeypatch.setattr(answers, "_continue", lambda *given: [[1]] * len(given[4]))
    first, second = answers.generate(torch.nn.Identity(), tokenizer, config, device, asked_rows)
    assert (first["tests"], first["group"]) == ("assert f(2) == 4", "numbers")
    assert not {"tests", "group"} & set(second)


def test_what_is_asked(setup):
    _, examples = setup
    result = answers.heldout_prompts(examples, 2)
    assert [entry["prompt"] for entry in result[:2]] == list(answers.PUBLISHED_PROMPTS)
    assert [entry["reference"] for entry in result[:2]] == [None, None]
    assert [entry["prompt"] for entry in result[2:]] == [e.row.messages[0]["content"] for e in examples[:2]]
    assert [entry["reference"] for entry in result[2:]] == [e.row.messages[1]["content"] for e in examples[:2]]


def test_no_answers_are_no_questions_either(setup):
    """A study of many seeds, of which only the losses count, asks nothing of most."""
    _, examples = setup
    assert answers.heldout_prompts(examples, 0) == []


@pytest.mark.parametrize(
    ("text", "invented"),
    [
        ("Fine.### Human: and now?", True),
        ("Fine.\n### Response:\nagain", True),
        ("Fine.<|im_start|>user", True),
        ("[INST] what? [/INST]", True),
        ("### Steps\n\n1. Go", False),
        ("A human is an assistant.", False),
    ],
)
def test_invented_turns(text, invented):
    assert bool(schema.TURN_MARKER.search(text)) is invented
