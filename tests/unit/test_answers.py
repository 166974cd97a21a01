"""Answers end where they should, and what is counted about them is what the libraries count."""

import csv
import json
import subprocess
import sys

import pytest
import torch

from qlora_helpers.data import prompts, schema
from qlora_helpers.evaluation import answers


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
        return torch.cat([input_ids, torch.tensor(self.answers)], dim=1)


def test_an_answer_ends_at_the_first_end_token(config, device, tokenizer):
    end, (word,) = tokenizer.eos_token_id, tokenizer("a", add_special_tokens=False)["input_ids"]
    fixed = Fixed([[word, end, end], [word, word, word], [end, word, word]])
    said = answers.generate(fixed, tokenizer, config, device, asked("x", "y", "z"))
    assert said == [
        {"prompt": "x", "reference": "r", "answer": "a", "thought": "", "stopped": True, "invented": False, "tokens": 1},
        {"prompt": "y", "reference": "r", "answer": "aaa", "thought": "", "stopped": False, "invented": False, "tokens": 3},
        {"prompt": "z", "reference": "r", "answer": "", "thought": "", "stopped": True, "invented": False, "tokens": 0},
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


def test_a_thought_is_no_part_of_the_answer(config, device, tokenizer):
    """Not if it is closed, not if it is empty, and not if the limit cuts it off."""
    texts = ["<think>\nHm.\n</think>\n\nBlue.", "<think>\n\n</think>\n\nBlue.", "<think> Hm.", "Hm.</think>Blue.", "Blue."]
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
        ((text,),) = seen[-1:]
        assert example.text.startswith(text)
        assert text.count("5") and "Be kind." in text and "2, 3" in text


def test_what_is_asked(setup):
    _, examples = setup
    result = answers.heldout_prompts(examples, 2)
    assert [entry["prompt"] for entry in result[:2]] == list(answers.PUBLISHED_PROMPTS)
    assert [entry["reference"] for entry in result[:2]] == [None, None]
    assert [entry["prompt"] for entry in result[2:]] == [e.row.messages[0]["content"] for e in examples[:2]]
    assert [entry["reference"] for entry in result[2:]] == [e.row.messages[1]["content"] for e in examples[:2]]


SAID = [
    "The cat sat on the mat.",
    "one two three four one two three four one two three four",
    "No idea",
    "Yes it is so.",
]
WANTED = ["A cat sat on the mat.", "Count to four.", "Nobody has any idea of that.", "Yes it is so."]


def rows():
    said = zip(SAID, WANTED, (True, False, False, True), (False, True, False, False), strict=True)
    keys = ("answer", "reference", "stopped", "invented")
    return [{"prompt": "?", "tokens": 9, **dict(zip(keys, values, strict=True))} for values in said]


def test_rates_and_lengths():
    result = answers.text_metrics([*rows(), rows()[0] | {"reference": None}])
    assert result["ends by itself"].value == 0.5
    assert result["invents a turn"].value == 0.25
    assert result["repeats itself"].value == pytest.approx((1 - 4 / 9) / 4)
    assert result["length"].value == (6 + 12 + 2 + 4) / (6 + 3 + 6 + 4)
    assert all(interval.low <= interval.value <= interval.high for interval in result.values())
    assert answers.text_metrics([rows()[0] | {"reference": None}]) == {}
    one = answers.text_metrics(rows()[:1])
    assert (one["BLEU"].low, one["BLEU"].high) == (0, 100)
    assert (one["ROUGE-L"].low, one["ROUGE-L"].high) == (0, 1)


def test_no_interval_leaves_what_can_be():
    short, long = ({"answer": " ".join("word" for _ in range(n))} for n in (1, 60))
    result = answers.text_metrics([rows()[0] | said for said in (short, short, long)])
    for name in ("ROUGE-L", "repeats itself", "length"):
        assert result[name].low >= 0, name
    assert result["ROUGE-L"].high <= 1
    assert result["repeats itself"].high <= 1
    assert result["length"].low == 0 < result["length"].value < result["length"].high


def test_bleu_and_chrf_are_the_command_lines(tmp_path):
    (tmp_path / "said").write_text("\n".join(SAID) + "\n", "utf-8")
    (tmp_path / "wanted").write_text("\n".join(WANTED) + "\n", "utf-8")
    words = [sys.executable, "-m", "sacrebleu", "wanted", "-i", "said", "-m", "bleu", "chrf", "-w", "6"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    result = answers.text_metrics(rows())
    for name, line in zip(("BLEU", "chrF"), json.loads(done.stdout), strict=True):
        assert result[name].value == pytest.approx(line["score"], abs=1e-5)


@pytest.mark.parametrize("empty", ["", "```", "9"])
def test_answers_without_any_overlap_have_intervals_too(empty):
    """Some resamples then score nothing at all."""
    result = answers.text_metrics([rows()[0], *(rows()[0] | {"answer": empty} for _ in range(3))])
    for name in ("BLEU", "chrF"):
        assert 0 <= result[name].low <= result[name].value <= result[name].high


def test_rouge_is_the_command_lines(tmp_path):
    (tmp_path / "said").write_text("\n".join(SAID) + "\n", "utf-8")
    (tmp_path / "wanted").write_text("\n".join(WANTED) + "\n", "utf-8")
    words = [sys.executable, "-m", "rouge_score.rouge", "--target_filepattern=wanted", "--prediction_filepattern=said"]
    words += ["--output_filename=out.csv", "--use_stemmer=false", "--rouge_types=rougeL", "--aggregate=false"]
    subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = list(csv.DictReader((tmp_path / "out.csv").open()))
    mean = sum(float(line["rougeL-F"]) for line in lines) / len(lines)
    assert answers.text_metrics(rows())["ROUGE-L"].value == pytest.approx(mean, abs=1e-5)


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
