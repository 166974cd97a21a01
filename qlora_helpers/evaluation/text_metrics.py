"""Metrics of answers beside their references: wording, endings, invented turns, repetition, length, thoughts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from math import inf
from typing import Any

import numpy as np
import regex

from qlora_helpers.data.turns import split_thought
from qlora_helpers.evaluation import intervals, ngram_scores, paired
from qlora_helpers.evaluation.intervals import Interval
from qlora_helpers.evaluation.paired import Answers, MetricDifference

MOST = {"ROUGE-L": 1, "sentence BLEU": 100, "sentence chrF": 100, "repeats itself": 1}  # largest value of a mean
SHARES = {"ends by itself": "stopped", "invents a turn": "invented", "thinks": "thought"}  # name: key of an answer
AT_LIMIT = ("ROUGE-L", "BLEU", "chrF", "ends by itself", "length")  # what a limit of tokens can lower

KANA = r"\p{Hiragana}\p{Katakana}ーｰ"  # Unicode assigns the two long vowel marks to no script
SOUTHEAST_ASIAN = r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
UNSPACED = rf"\p{{Han}}{KANA}{SOUTHEAST_ASIAN}"  # scripts without blanks between words
_UNSPACED = regex.compile(f"[{UNSPACED}]")
_UNITS = regex.compile(rf"[{UNSPACED}]\p{{M}}*|[^{UNSPACED}]+")
# Letters, digits, marks and joiners make a word, but only the first two begin one: those in an emoji are no words.
# The underscore separates words, as in rouge-score.
_WORDS = regex.compile(
    rf"[{UNSPACED}]\p{{M}}*|(?![\p{{M}}\p{{Join_Control}}])[\w--[\p{{Pc}}{UNSPACED}]]+", regex.VERSION1
)
# The tokenizer of sacrebleu for words that begin with such a letter. All other words are for the one of WMT, 13a.
_SCRIPTS = {
    "zh": regex.compile(r"\p{Han}"),
    "ja-mecab": regex.compile(rf"[{KANA}]"),
    "ko-mecab": regex.compile(r"\p{Hangul}"),
    "char": regex.compile(rf"[{SOUTHEAST_ASIAN}]"),
}


def text_metrics(answers: list[dict[str, Any]]) -> dict[str, Interval]:
    """Metrics over the answers that have a reference, each with its 95% interval; empty without such answers.

    - ROUGE-L, 0 to 1: F1 of the longest common subsequence of words, mean over answers (Lin, "ROUGE: a package for
      automatic evaluation of summaries", 2004).
    - BLEU, 0 to 100: brevity penalty times the geometric mean of the precisions of 1- to 4-grams over all answers
      (Papineni et al., "BLEU: a method for automatic evaluation of machine translation", 2002; the library sacrebleu).
      If no answer has four tokens, the mean ends at the longest n-grams that there are.
    - chrF, 0 to 100: F2 of the character 1- to 6-grams over all answers (Popović, "chrF: character n-gram F-score for
      automatic MT evaluation", 2015; sacrebleu).
    - ends by itself, invents a turn: shares of the answers, with Wilson's interval.
    - repeats itself, 0 to 1: share of the 4-grams of words that occurred before in the answer, mean over answers
      (seq-rep-4; Welleck et al., "Neural text generation with unlikelihood training", 2020, eq. 10).
    - length: words of all answers per word of all references.
    - thinks: share of the answers after a thought, with Wilson's interval; only if an answer or a reference has one.

    A thought counts in `thinks` only. Where a script has no blanks between words, each character, with its marks, is a
    word. BLEU splits an answer with sacrebleu's tokenizer for the script of its reference.
    """
    rows = _scored(answers)
    if not rows:
        return {}
    counts = _counted(tuple(row["answer"] for row in rows), tuple(row["reference"] for row in rows))
    ones = [1.0] * len(rows)
    metrics = {
        "ROUGE-L": intervals.ratio(counts.rouge, ones).within(0, 1),
        "BLEU": ngram_scores.over_all(ngram_scores.bleu, counts.bleu),
        "chrF": ngram_scores.over_all(ngram_scores.chrf, counts.chrf),
        "ends by itself": intervals.share(sum(row["stopped"] for row in rows), len(rows)),
        "invents a turn": intervals.share(sum(row["invented"] for row in rows), len(rows)),
        "repeats itself": intervals.ratio(counts.repeated, ones).within(0, 1),
        "length": intervals.ratio(counts.lengths, counts.of_references).within(0, inf),
    }
    if any(row["thought"] or row["reference_thought"] for row in rows):
        metrics["thinks"] = thinks(answers)
    return metrics


def differences(a: Answers, b: Answers) -> list[MetricDifference]:
    """Metrics of model `b` minus those of model `a`, which answered the same questions; empty without references.

    The metrics are those of `text_metrics`, compared answer by answer, with Holm's correction over all of them. BLEU
    and chrF are means of the scores of each answer, and so are named otherwise: a difference of scores over all answers
    has no value per answer. Raises `UserError` if the two answered different questions.
    """
    pairs = paired.matched(a, b)
    left, right = (_scored([dict(pair[side]) for pair in pairs]) for side in (0, 1))
    if not left:
        return []
    groups = [row.get("group", "") for row in left]
    references = tuple(row["reference"] for row in left)
    one, other = (_counted(tuple(row["answer"] for row in side), references) for side in (left, right))
    made = []
    for (name, x), y in zip(one.means.items(), other.means.values(), strict=True):
        per = one.of_references if name == "length" else None
        made.append(paired.ratio(name, x, y, groups, per, MOST.get(name, inf)))
    for name, key in SHARES.items():
        if key == "thought" and not any(row[key] or row["reference_thought"] for row in (*left, *right)):
            continue
        happened = [[bool(row[key]) for row in side] for side in (left, right)]
        made.append(paired.share(name, happened[0], happened[1], groups))
    return paired.holm(made)


def at_limit(answers: Answers, tokenizer: Any, limit: int) -> dict[str, Interval]:
    """Metrics that each reference itself would get, as an answer that ends after `limit` tokens.

    No model that writes like the references scores better within this limit. `tokenizer` is the run's own, and `limit`
    its `max_new_tokens`. Empty without answers that have a reference.
    """
    rows = []
    for row in _scored([dict(answer) for answer in answers]):
        ids = tokenizer(row["reference"], add_special_tokens=False)["input_ids"]
        text = tokenizer.decode(ids[:limit]) if len(ids) > limit else row["reference"]
        ends = len(ids) < limit  # the end is a token too
        rows.append(row | {"answer": text, "thought": "", "stopped": ends, "invented": False})
    metrics = text_metrics(rows)
    return {name: metrics[name] for name in AT_LIMIT if name in metrics}


def thinks(answers: list[dict[str, Any]]) -> Interval:
    """Share of the answers with a reference that come after a thought, with Wilson's interval."""
    rows = _scored(answers)
    return intervals.share(sum(bool(row["thought"]) for row in rows), len(rows))


def mostly_unspaced(texts: list[str]) -> bool:
    """Whether most words of the texts are single characters, because their script has no blanks between words."""
    units = [unit for text in texts for unit in _units(text)]
    return 2 * sum(bool(_UNSPACED.match(unit)) for unit in units) > len(units)


def _scored(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers whose reference has words after its thought, which is split off as `reference_thought`."""
    rows = []
    for row in answers:
        thought, words = split_thought((row["reference"] or "").strip())
        if words:
            rows.append({"thought": "", **row, "reference": words, "reference_thought": thought})
    return rows


def _units(text: str) -> list[str]:
    """What blanks separate, and each character of a script without blanks."""
    return [unit for part in text.split() for unit in _UNITS.findall(part)]


def _repeated(units: list[str]) -> float:
    grams = [tuple(units[i : i + 4]) for i in range(len(units) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _words(text: str) -> list[str]:
    """Words for ROUGE in any script. The tokenizer of rouge-score drops all but ASCII letters and digits."""
    return _WORDS.findall(text.lower()) or text.split()  # a text of symbols has no words, but can be right


def _rouge(words: list[str], wanted: list[str]) -> float:
    """F1 of the longest common subsequence. rouge-score finds the same one in a hundred times the time."""
    from rapidfuzz.distance import LCSseq

    common = LCSseq.similarity(words, wanted)
    if not common:
        return 0.0
    precision, recall = common / len(words), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


@dataclass(frozen=True)
class _Counts:
    """What the metrics need of each answer. `bleu` and `chrf` are sacrebleu's counts, in arrays with a row for each."""

    rouge: Sequence[float]
    repeated: Sequence[float]
    lengths: Sequence[int]
    of_references: Sequence[int]
    bleu: np.ndarray
    chrf: np.ndarray

    @cached_property
    def means(self) -> dict[str, Sequence[float]]:
        """Values of each answer, by metric. For `length`, the words of the answer."""
        return {
            "ROUGE-L": self.rouge,
            "sentence BLEU": ngram_scores.bleu(self.bleu).tolist(),
            "sentence chrF": ngram_scores.chrf(self.chrf).tolist(),
            "repeats itself": self.repeated,
            "length": self.lengths,
        }


@lru_cache(maxsize=512)  # a model of a report is compared with several others, in any order
def _counted(texts: tuple[str, ...], references: tuple[str, ...]) -> _Counts:
    """Count answer by answer: the n-grams of all of them would fill the memory."""
    bleu, chrf = _metrics()
    rows = []
    for text, reference in zip(texts, references, strict=True):
        wanted, units = _reference(reference), _units(text)
        counts = (
            bleu._compute_segment_statistics(wanted.cut(text.rstrip()), wanted.bleu),
            chrf._compute_segment_statistics(text, wanted.chrf),
        )
        rows.append((_rouge(_words(text), wanted.words), _repeated(units), len(units), wanted.length, *counts))
    rouge, repeated, lengths, of_references, *arrays = zip(*rows, strict=True)
    of_bleu, of_chrf = (np.array(counts, dtype=float) for counts in arrays)
    return _Counts(rouge, repeated, lengths, of_references, of_bleu, of_chrf)


@dataclass(frozen=True)
class _Reference:
    """A reference: its words for ROUGE, its length, its tokenizer for BLEU, and its n-grams as sacrebleu counts them.

    sacrebleu's own tokenizing is turned off, so that each reference can have the tokenizer of its script.
    """

    words: list[str]
    length: int
    cut: Callable[[str], str]
    bleu: dict[str, Any]
    chrf: dict[str, Any]


@lru_cache(maxsize=64)  # every model answers the same questions
def _reference(text: str) -> _Reference:
    bleu, chrf = _metrics()
    cut = _bleu_tokenizer(_script(text))
    grams = bleu._extract_reference_info([cut(text.rstrip())]), chrf._extract_reference_info([text])
    return _Reference(_words(text), len(_units(text)), cut, *grams)


@cache
def _metrics() -> tuple[Any, Any]:
    """sacrebleu's BLEU and chrF. Only its private functions return counts, and count a reference once for all."""
    from sacrebleu.metrics import BLEU, CHRF

    return BLEU(tokenize="none", force=True), CHRF()


def _script(reference: str) -> str:
    words = _WORDS.findall(reference)
    counts = {name: sum(bool(script.match(word)) for word in words) for name, script in _SCRIPTS.items()}
    others = len(words) - sum(counts.values())
    if 10 * counts["ja-mecab"] > counts["zh"]:  # Japanese is written in both, Chinese without kana
        counts["ja-mecab"] += counts.pop("zh")
    name = max(counts, key=lambda name: counts[name])
    return name if counts[name] > others else "13a"


@cache
def _bleu_tokenizer(name: str) -> Callable[[str], str]:
    """sacrebleu's tokenizer of this name; characters if it needs MeCab and that is not installed."""
    from sacrebleu.metrics import BLEU

    try:
        return BLEU(tokenize=name).tokenizer
    except RuntimeError:  # sacrebleu's, for a missing package
        return BLEU(tokenize="char").tokenizer
