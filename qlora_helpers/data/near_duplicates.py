"""Texts that are nearly the same: MinHash finds candidates, their exact Jaccard similarity decides.

Broder, "On the resemblance and containment of documents" (1997): the similarity of two texts is |A ∩ B| / |A ∪ B| over
their sets of character 4-grams. Case, punctuation and spacing do not count. Numbers do, as 3 + 4 is another question
than 3 + 5: texts that hold different numbers are different, unless it is one number in a long text.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SHINGLE = 4  # characters: a changed word spoils few of them, also in short rows
LONGEST = 20_000  # characters that are compared: what is the same for so long is the same
PERMUTATIONS = 128
FACTORS = [2654435761 * 31**i % 2**32 for i in range(SHINGLE)]  # of a polynomial hash, modulo 2^32
REPLACED = 2  # one number for another: one stands only here, one only there
LONG = 200  # 4-grams from which one number more or less makes no other text, if 9 in 10 are the same
PUNCTUATION = re.compile(r"[^\w\s]+|_")
NUMBER = re.compile(r"\d+")


def normalize(text: str) -> str:
    """The words alone: no case, no punctuation, single spaces."""
    return " ".join(PUNCTUATION.sub("", text[:LONGEST].casefold()).split())


def shingles(words: str) -> set[int]:
    """32-bit hashes of the character 4-grams of a normalized text."""
    points = np.frombuffer(words.ljust(SHINGLE).encode("utf-32-le"), dtype=np.uint32)
    count = len(points) - SHINGLE + 1
    hashes = np.zeros(count, dtype=np.uint32)
    for i, factor in enumerate(FACTORS):
        hashes += points[i : i + count] * np.uint32(factor)
    return set(hashes.tolist())


def other_numbers(a: str, b: str) -> int:
    """How many numbers stand in one of two texts and not in the other, wherever they stand."""
    mine, other = Counter(NUMBER.findall(a)), Counter(NUMBER.findall(b))
    return (mine - other).total() + (other - mine).total()


def jaccard(a: set[int], b: set[int]) -> float:
    """Similarity of two sets, 0 to 1."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


@dataclass
class Index:
    """Texts that were kept so far; each new one is compared with those that MinHash puts beside it.

    MinHash is set a little lower than the threshold, so that it seldom misses a pair that counts: at 0.7 it finds 93%
    of pairs that are exactly so similar, 98% at 0.75. What it finds in excess is compared exactly and let go.
    """

    threshold: float
    texts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        from datasketch import MinHash, MinHashLSH

        self._lsh = MinHashLSH(threshold=self.threshold - 0.05, num_perm=PERMUTATIONS, weights=(0.1, 0.9))
        self._empty = MinHash(PERMUTATIONS, hashfunc=int)
        self._same: dict[str, int] = {}

    def first_like(self, text: str, add: bool = True) -> tuple[int, float] | None:
        """Number of the first text that is at or above the threshold, and the similarity; else None.

        A text with no such neighbor is kept, if `add` is set; texts are numbered from 0 in the order of keeping.
        """
        words = normalize(text)
        if words in self._same:  # no need to look any closer
            return self._same[words], 1.0
        mine = shingles(words)
        signature = self._empty.copy()
        signature.update_batch(mine)
        for number in sorted(self._lsh.query(signature)):
            value = self._similarity(words, mine, self.texts[number])
            if value >= self.threshold:
                return number, value
        if add:
            self._insert(words, signature)
        return None

    def _similarity(self, words: str, mine: set[int], other: str) -> float:
        differ = other_numbers(words, other)
        if differ > (REPLACED if len(mine) >= LONG else 0):
            return 0.0
        value = jaccard(mine, shingles(other))
        return value if differ == 0 or value >= 0.9 else 0.0

    def _insert(self, words: str, signature: Any) -> None:
        number = len(self.texts)
        self._lsh.insert(number, signature, check_duplication=False)
        self._same[words] = number
        self.texts.append(words)
