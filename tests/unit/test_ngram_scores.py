"""BLEU and chrF of many rows: the library's score of each row, and the library's bootstrap."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF

from qlora_helpers.evaluation import ngram_scores

ANSWERS = ["The cat sat on the mat.", "one two three four one two three four", "No idea", "Yes it is so."]
REFERENCES = ["A cat sat on the mat.", "Count to four.", "Nobody has any idea of that.", "Yes it is so."]
METRICS = [(BLEU(effective_order=True), ngram_scores.bleu), (CHRF(), ngram_scores.chrf)]
TEXT = st.lists(st.sampled_from("ab "), max_size=9).map("".join)


def counts_of(metric, answers, references):
    return np.array(metric._extract_corpus_statistics(answers, [references]), dtype=float)


@pytest.mark.parametrize(("metric", "score"), METRICS)
@given(texts=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5))
def test_each_row_has_the_librarys_score(metric, score, texts):
    answers, references = map(list, zip(*texts, strict=True))
    expected = [metric.sentence_score(*pair).score for pair in zip(answers, [[r] for r in references], strict=True)]
    assert score(counts_of(metric, answers, references)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("metric", "score"), METRICS)
def test_intervals_are_those_of_the_librarys_bootstrap(metric, score, monkeypatch):
    monkeypatch.setattr(ngram_scores, "BLOCK", 30)  # in several blocks, the last one smaller
    scored = metric.corpus_score(ANSWERS, [REFERENCES], n_bootstrap=ngram_scores.RESAMPLES)
    interval = ngram_scores.over_all(score, counts_of(metric, ANSWERS, REFERENCES))
    ends = max(scored._mean - scored._ci, 0), min(scored._mean + scored._ci, 100)
    assert (interval.value, interval.low, interval.high) == pytest.approx((scored.score, *ends), rel=1e-6)  # of float32
