"""BLEU and chrF of many rows of n-gram counts at once, as sacrebleu computes them, and the interval of its bootstrap.

sacrebleu scores one row at a time, and its bootstrap needs 1,000 scores for each metric of each model.
"""

import statistics
from collections.abc import Callable

import numpy as np

from qlora_helpers.evaluation.intervals import Interval

RESAMPLES, SEED = 1000, 12345  # of sacrebleu's own bootstrap
BLOCK = 50_000  # resampled answers in memory at a time; 5 MB
BETA = 2  # of chrF: how much recall counts beside precision


def bleu(counts: np.ndarray) -> np.ndarray:
    """BLEU of each row, 0 to 100: sacrebleu's `compute_bleu` with effective order and exponential smoothing.

    A row holds the lengths of answer and reference, then the right and all n-grams of each order: shape (rows, 10).
    """
    length, wanted = counts[:, :2].astype(float).T
    right, total = counts[:, 2:6], counts[:, 6:]
    used = np.logical_and.accumulate(total > 0, axis=1)
    smoothed = used & (right == 0)
    doubled = np.ldexp(counts.dtype.type(1), smoothed.cumsum(axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        precisions = np.where(smoothed, 100 / (doubled * total), 100 * right / total).astype(float)
        logs = np.log(precisions, out=np.zeros_like(precisions), where=used).sum(axis=1)
        brevity = np.where(length < wanted, np.exp(1 - wanted / length), 1.0)
        return np.where(right.any(axis=1), brevity * np.exp(logs / used.sum(axis=1)), 0.0)


def chrf(counts: np.ndarray) -> np.ndarray:
    """chrF of each row, 0 to 100: sacrebleu's `_compute_f_score` without smoothing.

    A row holds the n-grams of answer, reference and both, for each order: shape (rows, 18).
    """
    answer, reference, both = counts.reshape(len(counts), -1, 3).transpose(2, 0, 1)
    used = (answer > 0) & (reference > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = (
            np.where(used, both / n, 0).sum(axis=1) / used.sum(axis=1, dtype=counts.dtype) for n in (answer, reference)
        )
        f = (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)
    return np.where(precision + recall > 0, 100 * f, 0).astype(float)


def over_all(score: Callable[[np.ndarray], np.ndarray], counts: np.ndarray) -> Interval:
    """Score over all answers with the 95% interval of sacrebleu's bootstrap, without its memory for all resamples."""
    (value,), low, high = score(counts.sum(axis=0, keepdims=True)), 0.0, 100.0
    if len(counts) > 1:  # one answer says nothing about others
        step = max(BLOCK // len(counts), 1)
        rng, rows = np.random.default_rng(SEED), counts.astype("float32")  # as in sacrebleu
        sizes = (min(step, RESAMPLES - start) for start in range(0, RESAMPLES, step))
        resamples = (rows[rng.integers(0, len(rows), (size, len(rows)))].sum(1) for size in sizes)
        scores = sorted(one for block in resamples for one in score(block).tolist())
        tail, mean = RESAMPLES // 40, statistics.mean(scores)
        reach = 0.5 * (scores[-tail - 1] - scores[tail])
        low, high = mean - reach, mean + reach
    return Interval(*(min(max(float(number), 0.0), 100.0) for number in (value, low, high)))  # rounding, and few rows
