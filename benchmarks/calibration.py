"""How often are the verdicts right? Simulated runs with a known difference, judged as real ones are.

usage: python benchmarks/calibration.py [--trials 2000]

Rows have lengths like those of conversations, and gaps in loss with tails heavier than a normal's and a skew; training
Rows have lengths like those of conversations, and gaps in loss with heavier tails than a normal and a skew; training
training seed and with three: how often the 95% interval covers the truth, how often "better" or "worse" is said where
there is no difference, and how often the right word comes where the difference is three standard errors.
"""

import argparse

import numpy as np

from qlora_helpers.evaluation.comparison import Arm, Difference, difference
from qlora_helpers.evaluation.losses import RowLoss

ROW_NOISE = 0.1  # nats per token: standard deviation of a row's own gap
SEED_NOISE = 0.004  # of a training seed, on all rows alike
BOTH_NOISE = 0.02  # of a training seed on one row


def draw(rng: np.random.Generator, rows: int, seeds: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Tokens of each row, and for each training seed the gap of each row where there is no true difference."""
    tokens = np.clip(np.exp(rng.normal(5, 0.7, rows)), 5, 256).round()
    heavy = rng.standard_t(5, rows) / np.sqrt(5 / 3)
    own = ROW_NOISE * (0.9 * heavy + 0.44 * (rng.exponential(1, rows) - 1))
    # What one seed shifts is unknown to a single adapter: with one seed the truth is that adapter's own.
    shifts = rng.normal(0, SEED_NOISE, seeds) if seeds > 1 else np.zeros(1)
    return tokens, [own + shift + rng.normal(0, BOTH_NOISE, rows) for shift in shifts]


def simulate(rng: np.random.Generator, rows: int, seeds: int, truth: float) -> Difference:
    """A base and an experiment whose true difference per token is `truth`, judged."""
    tokens, gaps = draw(rng, rows, seeds)
    base = rng.normal(2.2, 0.5, rows)
    trained = Arm("run", [_losses(base + truth + gap, tokens) for gap in gaps])
    return difference(Arm("base", [_losses(base, tokens)], trained=False), trained)


def standard_error(rng: np.random.Generator, rows: int, seeds: int) -> float:
    """Of the estimated difference, from simulation."""
    drawn = (draw(rng, rows, seeds) for _ in range(2000))
    return float(np.std([np.average(np.mean(gaps, axis=0), weights=tokens) for tokens, gaps in drawn]))


def _losses(per_token: np.ndarray, tokens: np.ndarray) -> list[RowLoss]:
    return [RowLoss(str(i), x * n, int(n), 0) for i, (x, n) in enumerate(zip(per_token, tokens, strict=True))]


def main() -> None:
    """Print a line for each number of rows and seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=2000)
    trials = parser.parse_args().trials
    print("| rows | seeds | covers the truth | false verdicts | right verdicts at 3 standard errors |")
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
