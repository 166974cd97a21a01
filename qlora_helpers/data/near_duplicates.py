"""Find near duplicates: MinHash proposes candidates, and their exact Jaccard similarity decides.

The similarity of two texts is |A ∩ B| / |A ∪ B|, where A and B are their sets of character 4-grams (Broder, "On the
resemblance and containment of documents", 1997). Case, punctuation and spacing are ignored. Numbers are not, because
3 + 4 and 3 + 5 are different questions: two texts with different numbers are different, unless a single number was
replaced in a long text.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SHINGLE = 4  # characters in an n-gram: so few that a changed word alters few n-grams, even in short rows
LONGEST = 20_000  # characters compared; texts that agree this far count as equal
PERMUTATIONS = 128
FACTORS = [2654435761 * 31**i % 2**32 for i in range(SHINGLE)]  # coefficients of a polynomial hash modulo 2^32
REPLACED = 2  # unmatched numbers when one is replaced: one in each text
LONG = 200  # 4-grams in a long text, where one replaced number is tolerated at a similarity of 0.9 or more
PUNCTUATION = re.compile(r"[^\w\s]+|_")
NUMBER = re.compile(r"\d+")


def normalize(text: str) -> str:
    """Casefold the text, remove punctuation, and collapse whitespace to single spaces."""
    return " ".join(PUNCTUATION.sub("", text[:LONGEST].casefold()).split())


def shingles(words: str) -> set[int]:
    """Return the 32-bit hashes of the character 4-grams in a normalized text."""
    points = np.frombuffer(words.ljust(SHINGLE).encode("utf-32-le"), dtype=np.uint32)
    count = len(points) - SHINGLE + 1
    hashes = np.zeros(count, dtype=np.uint32)
    for i, factor in enumerate(FACTORS):
        hashes += points[i : i + count] * np.uint32(factor)
    return set(hashes.tolist())


def count_unmatched_numbers(a: str, b: str) -> int:
    """Count the numbers that occur in only one of the two texts, regardless of position."""
    in_a, in_b = Counter(NUMBER.findall(a)), Counter(NUMBER.findall(b))
    return (in_a - in_b).total() + (in_b - in_a).total()


def jaccard(a: set[int], b: set[int]) -> float:
    """Return the Jaccard similarity of two sets, from 0 to 1."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


@dataclass
class Index:
    """Index of the texts kept so far. Each new text is compared with the candidates that MinHash proposes.

    MinHash uses a threshold 0.05 lower than `threshold`, so that it rarely misses a near duplicate. With a threshold of
    0.7, it finds 93% of the pairs whose similarity is exactly 0.7, and 98% at 0.75. The exact comparison discards the
    surplus candidates.
    """

    threshold: float
    texts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        from datasketch import MinHash, MinHashLSH

        self._lsh = MinHashLSH(threshold=self.threshold - 0.05, num_perm=PERMUTATIONS, weights=(0.1, 0.9))
        self._empty = MinHash(PERMUTATIONS, hashfunc=int)
        self._position: dict[str, int] = {}

    def first_similar(self, text: str, add: bool = True) -> tuple[int, float] | None:
        """Return the position and similarity of the first kept text at or above the threshold, or None.

        If there is none and `add` is true, the text is kept. Kept texts are numbered from 0 in the order they were
        added.
        """
        words = normalize(text)
        if words in self._position:  # equal after normalization
            return self._position[words], 1.0
        grams = shingles(words)
        signature = self._empty.copy()
        signature.update_batch(grams)
        for number in sorted(self._lsh.query(signature)):
            similarity = self._similarity(words, grams, self.texts[number])
            if similarity >= self.threshold:
                return number, similarity
        if add:
            self._insert(words, signature)
        return None

    def _similarity(self, words: str, grams: set[int], other: str) -> float:
        unmatched = count_unmatched_numbers(words, other)
        if unmatched > (REPLACED if len(grams) >= LONG else 0):
            return 0.0
        similarity = jaccard(grams, shingles(other))
        return similarity if unmatched == 0 or similarity >= 0.9 else 0.0

    def _insert(self, words: str, signature: Any) -> None:
        number = len(self.texts)
        self._lsh.insert(number, signature, check_duplication=False)
        self._position[words] = number
        self.texts.append(words)
