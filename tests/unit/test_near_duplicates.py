"""Near duplicates: planted edits are detected, and texts that only look similar are not."""

import json
import random
import re

import pytest

from qlora_helpers.data.near_duplicates import Index, jaccard, normalize, shingles
from qlora_helpers.data.schema import parse_guanaco
from qlora_helpers.data.sources import sample_data

STRANGERS = ["harbour", "violin", "quickly", "copper", "seventeen", "winter", "lantern"]


def rows():
    """Return each sample conversation as one text."""
    lines = sample_data().read_text("utf-8").splitlines()
    return ["\n".join(turn["content"] for turn in parse_guanaco(json.loads(line)["text"])) for line in lines]


def change_a_word(text, rng):
    words = text.split(" ")
    words[rng.randrange(len(words))] = rng.choice(STRANGERS)
    return " ".join(words)


def swap_two_sentences(text, rng):
    parts = re.split(r"(?<=[.!?])\s+", text)
    i = rng.randrange(len(parts) - 1)
    parts[i], parts[i + 1] = parts[i + 1], parts[i]
    return " ".join(parts)


EDITS = {
    "a word": change_a_word,
    "punctuation": lambda text, rng: re.sub(r"[.,;:]", "", text) + "!!",
    "case": lambda text, rng: text.upper(),
    "two sentences": swap_two_sentences,
}


def matches(texts):
    """Return the positions of the texts that the index considers near duplicates of an earlier text."""
    index = Index(0.7)
    return {number for number, text in enumerate(texts) if index.first_similar(text) is not None}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("part", ["whole", "short"])
def test_planted_edits_are_found_and_nothing_else(edit, part):
    """Half of the rows get an edited copy; no other row may match. Short rows are three sentences of a row."""
    rng = random.Random(1)
    originals = rows() if part == "whole" else [" ".join(re.split(r"(?<=[.!?])\s+", text)[:3]) for text in rows()]
    originals = list(dict.fromkeys(text for text in originals if len(re.split(r"(?<=[.!?])\s+", text)) > 2))
    copies = [EDITS[edit](text, rng) for text in originals[::2]]
    hits = matches([*originals, *copies])
    planted = set(range(len(originals), len(originals) + len(copies)))
    assert len(planted) > 90
    assert len(hits & planted) / len(planted) >= 0.95
    assert len(hits & planted) / len(hits) >= 0.95


def test_texts_with_different_numbers_are_different():
    """All of these pairs have similar letters, so that only the numbers distinguish them."""
    short = "Calculate the area of a circle whose radius is exactly {} meters, and explain each step of the way."
    story = next(text for text in rows() if len(shingles(normalize(text))) > 400).replace("{", "").replace("}", "")
    long = story + " Count to {}: {}, {}, {}, {}, {}."
    pairs = {
        "short, one number": ([short.format(4), short.format(5)], set()),
        "short, the same number": ([short.format(4), short.format(4).upper()], {1}),
        "long, one number": ([long.format(4, *range(5)), long.format(9, *range(5))], {1}),
        "long, many numbers": ([long.format(4, *range(5)), long.format(9, *range(11, 16))], set()),
    }
    for name, (texts, want) in pairs.items():
        assert jaccard(*(shingles(normalize(text)) for text in texts)) > 0.7, name
        assert matches(texts) == want, name


def test_the_similarity_is_the_jaccard_index():
    a, b = shingles("abcdef"), shingles("bcdefg")
    assert len(a) == len(b) == 3
    assert jaccard(a, b) == 2 / 4
    assert jaccard(a, a) == 1


@pytest.mark.parametrize("text", ["", "a", "?!", "日本語のテキスト", "\U0001f389"])
def test_short_and_foreign_texts_have_shingles(text):
    assert shingles(normalize(text))
    assert matches([text, text]) == {1}


def test_different_foreign_texts_are_different():
    russian = ["Что такое переменная в программировании?", "Как компьютеры хранят данные на диске?"]
    assert matches(russian) == set()


def test_the_first_similar_text_is_returned_with_its_similarity():
    index = Index(0.7)
    for text in ("The harbour lies to the north of the old town.", "A violin has four strings and no frets."):
        assert index.first_similar(text) is None
    assert index.first_similar("a violin has four strings, and no frets") == (1, 1.0)
    number, similarity = index.first_similar("A violin has five strings and no frets.")
    assert number == 1
    assert 0.7 <= similarity < 1
    assert index.first_similar("Copper conducts heat.", add=False) is None
    assert index.first_similar("Copper conducts heat.", add=False) is None
