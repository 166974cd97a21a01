"""Find near duplicates: MinHash proposes candidates, then their Jaccard similarity and their tokens decide.

The similarity of two texts is |A ∩ B| / |A ∪ B|, where A and B are their sets of character 4-grams (Broder, "On the
resemblance and containment of documents", 1997). It is not enough: `a += b` and `a -= b`, two products in one sentence
frame, or two inputs below one long instruction share nearly all their 4-grams. So tokens are compared as well, by one
of two tests, because the two kinds of mistake differ in cost:

- `same_text` finds copies among training rows. Any other word, number or symbol keeps a row: data that was dropped
  cannot be learned, and a copy that was left over does little harm.
- `same_question` finds training rows that are also held out. It accepts added, common and reordered words: a leak that
  was left over falsifies the evaluation.
"""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from qlora_helpers.data.normal_form import BRACKETS, LETTERS, OPERATORS, PART, normalize

SHINGLE = 4  # characters in an n-gram: so few that a changed word alters few n-grams, even in short rows
LONGEST = 20_000  # characters whose n-grams are compared; the tests of tokens see the whole text
PERMUTATIONS = 128
SHORT = 100  # characters of a text in which one more token changes many of the 4-grams that begin a token
FACTORS = [2654435761 * 31**i % 2**32 for i in range(SHINGLE)]  # coefficients of a polynomial hash modulo 2^32

CODE = OPERATORS | BRACKETS | {"{"}  # a sentence with one of these is no prose
EMPHASIS = frozenset("`*\"'")
SLIP = 5  # letters of the shortest word in which a wrong letter counts as a slip of spelling
WORDS_PER_SLIP = 10


def shingles(words: str) -> set[int]:
    """Return the 32-bit hashes of the character 4-grams in a normalized text, regardless of case."""
    return set(_hashes(_points(words)).tolist())


def _points(words: str) -> np.ndarray:
    flat = words[:LONGEST].replace("\n", " ").casefold()
    return np.frombuffer(flat.ljust(SHINGLE).encode("utf-32-le"), dtype=np.uint32)


def _hashes(points: np.ndarray) -> np.ndarray:
    """Return the hashes of all 4-grams of code points in order, also repeated ones."""
    count = len(points) - SHINGLE + 1
    hashes = np.zeros(count, dtype=np.uint32)
    for i, factor in enumerate(FACTORS):
        hashes += points[i : i + count] * np.uint32(factor)
    return hashes


def _initial_hashes(words: str) -> np.ndarray:
    """Return the hashes of the 4-grams that begin a token: of long texts a sixth of all, and about as similar."""
    points = _points(f" {words}{' ' * SHINGLE}")
    return _hashes(points[1:])[points[:-SHINGLE] == ord(" ")]


def jaccard(a: set[int], b: set[int]) -> float:
    """Return the Jaccard similarity of two sets, from 0 to 1."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


def same_text(a: str, b: str) -> bool:
    """Return whether two normalized texts have the same tokens, except for slips of spelling and moved sentences.

    A sentence moves only within its part, and symbols and numbers keep their order.
    """
    if len(a.split()) != len(b.split()):
        return False
    if _aligned(a.split("\n"), b.split("\n")):
        return True
    return _symbols(a) == _symbols(b) and _aligned(_sorted_sentences(a), _sorted_sentences(b))


def same_question(a: str, b: str, common: Collection[str] = frozenset()) -> bool:
    """Return whether two normalized texts of similar letters ask for the same, however they word it.

    Symbols and numbers must be the same. Words may be added to one of the texts, in any order. If both have words of
    their own, these must be slips of spelling or words that are `common` in the data set.
    """
    words = [_vocabulary(text) for text in (a, b)]
    own = [words[0].difference(words[1], common), words[1].difference(words[0], common)]
    if _surely_left(own[0], words[1]) and _surely_left(own[1], words[0]):  # as for most texts, and quickly found
        return False
    in_a, in_b = (Counter(word for word in text.split() if word not in EMPHASIS) for text in (a, b))
    only_a, only_b = ([w for w in only.elements() if w not in common] for only in (in_a - in_b, in_b - in_a))
    if _symbols(" ".join((in_a - in_b) + (in_b - in_a))):
        return False
    if _surely_left(only_a, only_b) and _surely_left(only_b, only_a):
        return False
    for word in tuple(only_a):
        twin = next((other for other in only_b if is_slip(word, other)), None)
        if twin is not None:
            only_a.remove(word)
            only_b.remove(twin)
    return not (only_a and only_b)


@lru_cache(maxsize=4096)  # a text is compared with many others
def _vocabulary(text: str) -> frozenset[str]:
    """Return the distinct tokens of a normalized text, except those that only emphasize."""
    return frozenset(text.split()) - EMPHASIS


def _surely_left(words: Collection[str], others: Collection[str]) -> bool:
    """Return whether one of the words is surely no slip of spelling of any of the others."""
    if any(len(word) < SLIP for word in words):
        return True
    begun = {(other[0], len(other)) for other in others if len(other) >= SLIP}
    return any(begun.isdisjoint((word[0], len(word) + more) for more in (-1, 0, 1)) for word in words)


def is_slip(a: str, b: str) -> bool:
    """Return whether two words differ by one wrong, missing, additional or transposed letter after the first.

    This holds only for long words of scripts with capitals. In other scripts one sign more often makes another word.
    """
    if min(len(a), len(b)) < SLIP or a[0] != b[0] or not (a.isalpha() and b.isalpha() and a.lower() != a.upper()):
        return False
    if _without_accents(a) == _without_accents(b):
        return False
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    a, b = a[start:], b[start:]
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    return (len(a) <= 1 and len(b) <= 1) or (len(a) == 2 and a == b[::-1])


def _without_accents(word: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFD", word) if not unicodedata.combining(c))


def _aligned(a: list[str], b: list[str]) -> bool:
    """Return whether equally many tokens are equal in order, except for a few slips of spelling in prose."""
    in_a, in_b = " ".join(a).split(), " ".join(b).split()
    different = [i for i, (x, y) in enumerate(zip(in_a, in_b, strict=True)) if x != y]
    if not different:
        return True
    if len(different) > max(1, len(in_a) // WORDS_PER_SLIP):
        return False
    prose = [CODE.isdisjoint(words) for words in map(str.split, a) for _ in words]
    return all(prose[i] and is_slip(in_a[i], in_b[i]) for i in different)


def _symbols(words: str) -> list[str]:
    """Return the tokens that are no words of prose: symbols, numbers, and names with digits."""
    return [token for token in words.split() if not (token.isalpha() or LETTERS.fullmatch(token))]


def _sorted_sentences(words: str) -> list[str]:
    parts = (sorted(part.split("\n")) for part in words.split(PART))
    return [sentence for part in parts for sentence in [*part, PART]]


def _number(words: Iterable[str]) -> int:
    """Return a hash of words that is the same in all processes."""
    return int.from_bytes(hashlib.blake2b(" ".join(words).encode(errors="surrogatepass"), digest_size=8).digest())


def _letters(words: str) -> int:
    """Return a number that is equal for texts of which `same_text` may hold: slips keep the first letter."""
    return _number(sorted([w[0] if len(w) >= SLIP and w.isalpha() else w for w in words.split()]))


def _figures(words: str) -> int:
    """Return a number that is equal for texts of which `same_question` may hold: they have the same symbols."""
    if words.replace(" ", "").replace("\n", "").isalpha():  # as most prose, and quickly found
        return _number(())
    return _number(sorted(token for token in _symbols(words) if token not in EMPHASIS))


class Words(NamedTuple):
    """A normalized text, a number of its tokens in order, and one that is equal for texts that may be the same."""

    text: str
    tokens: int
    group: int


def words_of(text: str, same: Callable[[str, str], bool]) -> Words:
    """Return a text as `Index` compares it by the test `same`."""
    words = normalize(text)
    return Words(words, _number([words.replace("\n", " ")]), (_letters if same is same_text else _figures)(words))


@cache
def _bands(threshold: float) -> tuple[int, int]:
    """Return the number of bands and their size, which take a tenth of a second to compute."""
    from datasketch import MinHashLSH

    lsh = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, weights=(0.1, 0.9))
    return lsh.b, lsh.r


Candidates = tuple[Sequence[int], Callable[[int], object]]  # texts to compare with, and what adds this one


@dataclass
class Index:
    """Index of the texts kept so far. Each new text is compared with a few candidates, however many texts there are.

    Two texts are near duplicates if their similarity is at least `threshold` and `same` holds for their normalized
    forms. For `same_text`, candidates are all texts with the same tokens up to slips. For `same_question`, they are
    texts with the same symbols that MinHash proposes: for short texts by all 4-grams, for others by those that begin a
    token. It uses a threshold 0.1 lower, so that it rarely misses a near duplicate: at 0.6, it has 25 bands of 5, which
    propose 1 - (1 - 0.7^5)^25 = 99% of the pairs that share exactly 0.7 of those 4-grams.
    """

    threshold: float
    same: Callable[[str, str], bool] = same_question
    texts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._position: dict[int, int] = {}
        # Texts that `same` may hold for: a list of their numbers, or MinHashes of long or of short ones.
        self._groups: dict[int | tuple[int, bool], Any] = {}
        if self.same is not same_text:
            from datasketch import MinHash, MinHashLSH

            params = _bands(self.threshold - 0.1)
            self._new_lsh = partial(MinHashLSH, num_perm=PERMUTATIONS, params=params)
            # The hashes of a text are one array: MinHash keeps the lowest of each permutation, as of single numbers.
            self._minhash = MinHash(PERMUTATIONS, hashfunc=np.asarray)

    def first_similar(self, text: str | Words, add: bool = True) -> tuple[int, float] | None:
        """Return the position and similarity of the first near duplicate of the text among those kept, or None.

        If there is none and `add` is true, the text is kept. Kept texts are numbered from 0 in the order they were
        added. `Words` are a text that `words_of` prepared, in this process or another one.
        """
        words = text if isinstance(text, Words) else words_of(text, self.same)
        if words.tokens in self._position:
            return self._position[words.tokens], 1.0
        candidates, keep = (self._copies if self.same is same_text else self._questions)(words, add)
        for number in candidates:
            if self.same(words.text, self.texts[number]):
                similarity = jaccard(shingles(words.text), shingles(self.texts[number]))
                if similarity >= self.threshold:
                    return number, similarity
        if add:
            keep(len(self.texts))
            self._position[words.tokens] = len(self.texts)
            self.texts.append(words.text)
        return None

    def _copies(self, words: Words, add: bool) -> Candidates:
        if not add:
            return self._groups.get(words.group, ()), int
        group: list[int] = self._groups.setdefault(words.group, [])
        return group, group.append

    def _questions(self, words: Words, add: bool) -> Candidates:
        short = len(words.text) <= SHORT
        group = self._groups.get((words.group, short))
        found = sorted(group.query(self._signature(words.text, short))) if group is not None else ()
        return found, partial(self._keep_question, words) if add else int

    def _keep_question(self, words: Words, number: int) -> None:
        """Keep a text for later ones that are long, and also for short ones if it is not much longer than they are."""
        for short in (False, True) if len(words.text) <= 2 * SHORT else (False,):
            if (words.group, short) not in self._groups:
                self._groups[words.group, short] = self._new_lsh()
            group = self._groups[words.group, short]
            group.insert(number, self._signature(words.text, short), check_duplication=False)

    def _signature(self, text: str, short: bool) -> Any:
        """Return the MinHash of a text, which holds until the next call."""
        self._minhash.clear()
        self._minhash.update_batch([_hashes(_points(text)) if short else _initial_hashes(text)])
        return self._minhash
