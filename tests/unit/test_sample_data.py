"""The sample data matches its data card."""

import json
import re
from collections import Counter
from pathlib import Path

from qlora_helpers.data.schema import parse_guanaco
from qlora_helpers.data.sources import sample_data
from qlora_helpers.evaluation.answers import PUBLISHED_PROMPTS

ROWS = [json.loads(line) for line in sample_data().read_text("utf-8").splitlines()]
TURNS = [parse_guanaco(row["text"]) for row in ROWS]


def test_the_counts_match_the_card():
    card = (Path(sample_data()).parent / "README.md").read_text("utf-8")
    assert len(ROWS) == 300
    topics = Counter(row["topic"] for row in ROWS)
    for topic, count in topics.items():
        assert re.search(rf"\| {topic}.*\| {count} \|", card)
    assert f"{sum(len(turns) == 4 for turns in TURNS)} conversations have two rounds" in card


def test_turns_alternate_and_end_with_an_answer():
    for turns in TURNS:
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert all(turn["content"] for turn in turns)


def test_prompts_and_openings_are_unique():
    prompts = [turns[0]["content"] for turns in TURNS]
    assert len({prompt.casefold() for prompt in prompts}) == len(prompts)
    openings = Counter(" ".join(turns[1]["content"].casefold().split()[:4]) for turns in TURNS)
    assert max(openings.values()) == 1


def test_the_published_prompts_are_not_in_the_data():
    text = " ".join(turn["content"].casefold() for turns in TURNS for turn in turns)
    assert not any(prompt.casefold() in text for prompt in PUBLISHED_PROMPTS)


def test_python_snippets_parse():
    blocks = [block for row in ROWS for block in re.findall(r"```python\n(.*?)```", row["text"], re.DOTALL)]
    assert len(blocks) > 20
    for block in blocks:
        compile(block.replace(">>> ", ""), "snippet", "exec")
