"""Calibration of the verdicts: simulated runs with a known difference in loss, judged like real ones.

usage: python benchmarks/calibration.py [--trials 2000]

Row lengths are similar to those of conversations. The rows' differences in loss are skewed and have heavier tails than
a normal distribution; training seeds shift all rows alike and each row by itself. For one and for three training seeds,
the table shows how often the 95% interval covers the true difference, how often the verdict is "better" or "worse"
although there is no difference, and how often it is right for a difference of three standard errors.
"""

import argparse

import numpy as np

from qlora_helpers.evaluation.differences import Arm, Difference, difference
from qlora_helpers.evaluation.losses import RowLoss

ROW_NOISE = 0.1  # standard deviation of the difference of a row, in nats per token
SEED_NOISE = 0.004  # of a training seed, the same for all rows
BOTH_NOISE = 0.02  # of a training seed, for each row


def draw(rng: np.random.Generator, rows: int, seeds: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Draw the tokens of each row and, for each seed, the difference of each row when the true difference is 0."""
    tokens = np.clip(np.exp(rng.normal(5, 0.7, rows)), 5, 256).round()
    heavy = rng.standard_t(5, rows) / np.sqrt(5 / 3)
    own = ROW_NOISE * (0.9 * heavy + 0.44 * (rng.exponential(1, rows) - 1))
    # A single adapter cannot reveal its seed's shift: with one seed, the true difference is that of the adapter.
    shifts = rng.normal(0, SEED_NOISE, seeds) if seeds > 1 else np.zeros(1)
    return tokens, [own + shift + rng.normal(0, BOTH_NOISE, rows) for shift in shifts]


def simulate(rng: np.random.Generator, rows: int, seeds: int, truth: float) -> Difference:
    """Simulate a base model and an experiment whose true difference is `truth` nats per token, and judge them."""
    tokens, gaps = draw(rng, rows, seeds)
    base = rng.normal(2.2, 0.5, rows)
    trained = Arm("run", [_losses(base + truth + gap, tokens) for gap in gaps])
    return difference(Arm("base", [_losses(base, tokens)], trained=False), trained)


def standard_error(rng: np.random.Generator, rows: int, seeds: int) -> float:
    """Estimate the standard error of the difference by simulation."""
    drawn = (draw(rng, rows, seeds) for _ in range(2000))
    return float(np.std([np.average(np.mean(gaps, axis=0), weights=tokens) for tokens, gaps in drawn]))


def _losses(per_token: np.ndarray, tokens: np.ndarray) -> list[RowLoss]:
    return [RowLoss(str(i), x * n, int(n), 0) for i, (x, n) in enumerate(zip(per_token, tokens, strict=True))]


def main() -> None:
    """Print one line for each number of rows and seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=2000)
    trials = parser.parse_args().trials
    print("| rows | seeds | coverage | false verdicts | correct verdicts at 3 standard errors |")
    print("|---|---|---|---|---|")
    for seeds in (1, 3):
        for rows in (64, 100, 400):
            rng = np.random.default_rng(rows + seeds)
            far = -3 * standard_error(rng, rows, seeds)
            none = [simulate(rng, rows, seeds, 0.0) for _ in range(trials)]
            better = [simulate(rng, rows, seeds, far) for _ in range(trials)]
            covered = sum(d.low <= 0 <= d.high for d in none) + sum(d.low <= far <= d.high for d in better)
            wrong = sum(d.verdict != "not distinguishable" for d in none)
            right = sum(d.verdict == "better" for d in better)
            print(
                f"| {rows} | {seeds} | {covered / trials / 2:.1%} | {wrong / trials:.1%} | {right / trials:.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
