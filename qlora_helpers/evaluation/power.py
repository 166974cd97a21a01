"""How many held-out rows and training runs a comparison needs to detect an effect, from pilot runs."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np

from qlora_helpers.errors import UserError
from qlora_helpers.evaluation import comparison
from qlora_helpers.evaluation.differences import Arm, Contrast, contrast
from qlora_helpers.evaluation.intervals import CONFIDENCE, POWER
from qlora_helpers.evaluation.row_losses import BASE, read_losses
from qlora_helpers.runs import RunFolder
from qlora_helpers.wording import counted

ROWS = (50, 100, 200, 400, 800, 1600)
DRAWS = (1, 2, 3, 5, 10)
MOST_ROWS = 1_000_000
_SIMULATED = 50_000


@dataclass(frozen=True)
class Pilot:
    """Variance components of a difference in loss (nats per token), and where they come from.

    `row` is the variance that one held-out row, or one group of rows, adds, `draw` that of one training run of each
    model, with its own draw of training rows and its own seed, and `both` that of their combination. `draw` is 0 and
    not estimated with a single run. `group` is the mean number of rows in a group.
    """

    source: str
    row: float
    draw: float
    both: float
    runs: int
    group: float = 1.0
    draws_vary: bool = True

    def deviations(self, rows: float, draws: int) -> np.ndarray:
        """Simulated deviations of the difference from the truth, as in `intervals.simultaneous`.

        One draw cannot show how draws differ: its interval is about these adapters alone.
        """
        n = max(rows / self.group, 2)
        normal, student = _standard(draws - 1)
        if draws == 1 or not self.draw:
            return np.abs(math.sqrt((self.row + self.both / draws) / n) * normal)
        return np.abs(math.sqrt(self.row / n) * normal + math.sqrt((self.draw + self.both / n) / draws) * student)

    def half_width(self, rows: float, draws: int) -> float:
        """Half of the width that the 95% interval will have."""
        return float(np.quantile(self.deviations(rows, draws), CONFIDENCE))

    def detectable(self, rows: float, draws: int) -> float:
        """Smallest effect with an 80% chance to be detected."""
        deviations = self.deviations(rows, draws)
        return float(np.quantile(deviations, CONFIDENCE) + np.quantile(deviations, 2 * POWER - 1))

    def rows_for(self, effect: float, draws: int) -> int | None:
        """Smallest number of held-out rows that detects the effect with 80% power; None if a million do not."""
        if self.detectable(MOST_ROWS, draws) > effect:
            return None
        low, high = 1, MOST_ROWS  # the first is too few, the second enough
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.detectable(middle, draws) <= effect else (middle, high)
        return high


@cache
def _standard(freedom: int) -> tuple[np.ndarray, np.ndarray]:
    """Independent draws of a normal distribution and of Student's t, with a fixed seed; no t without freedom."""
    rng = np.random.default_rng(0)
    student = rng.standard_t(freedom, _SIMULATED) if freedom else np.zeros(_SIMULATED)
    return rng.standard_normal(_SIMULATED), student


# Of results/h100-smollm2-study: 200 against 100 rows, both for 500 steps, nine draws each.
ASSUMED = Pilot(
    "assumed: two adapters of a 135M model on conversations", row=0.00019, draw=0.000015, both=0.00068, runs=9
)


def components(made: Contrast, runs: int, source: str, draws_vary: bool = True) -> Pilot:
    """Variance components of a contrast that was measured with `runs` training runs of each trained model."""
    estimate = made.estimate
    n, crossed = len(estimate.above), estimate.crossed_variances
    parts = [(error**2, part, count) for (error, count), part in zip(estimate.seed_errors, crossed, strict=True)]
    return Pilot(
        source,
        row=estimate.row_error**2 * n,
        draw=sum(max(over - part, 0.0) * count for over, part, count in parts),
        both=sum(part * count for _, part, count in parts) * n,
        runs=runs,
        group=made.rows / n,
        draws_vary=draws_vary,
    )


def pilot(folders: Sequence[RunFolder]) -> Pilot:
    """Variance components of pilot runs: one experiment against its base model, or two against each other.

    Raises `UserError` for more than two experiments, and for runs that cannot be compared.
    """
    experiments = comparison.group(folders)
    if len(experiments) > 2:
        names = ", ".join(experiments)
        raise UserError(f"pilot: {len(experiments)} experiments ({names}). Fix: give runs of one or two experiments.")
    runs = [run for group in experiments.values() for run in group]
    arms = [comparison.arm(name, group) for name, group in experiments.items()]
    if len(arms) == 1:
        base = RunFolder(runs[0].path.parent / runs[0].read("manifest.json")["baseline"])
        arms = [Arm(BASE, [read_losses(base)], trained=False), *arms]
    made = contrast(arms, [-1, 1])
    fewest = min(len(arm.seeds) for arm in arms if arm.trained)
    measured = f"{counted(made.rows, 'held-out row')} with {counted(made.tokens, 'token')}"
    source = f"{arms[1].name} against {arms[0].name}, {measured}"
    return components(made, fewest, source, len({run.config().training_draw for run in runs}) > 1)


@dataclass(frozen=True)
class Design:
    """The designs that a comparison may have: held-out rows that are `needed` by number of draws, None for too many."""

    effect: float
    pilot: Pilot
    needed: dict[int, int | None]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        table = [
            {
                "rows": rows,
                "draws": draws,
                "half_width": self.pilot.half_width(rows, draws),
                "detectable": self.pilot.detectable(rows, draws),
            }
            for rows in ROWS
            for draws in self.needed
        ]
        needed = [{"draws": draws, "rows": rows} for draws, rows in self.needed.items()]
        return {"effect": self.effect, "pilot": asdict(self.pilot), "table": table, "needed": needed}

    def __str__(self) -> str:
        """The table, the rows that each number of draws needs, and what the pilot leaves open."""
        heads = "".join(f"{counted(draws, 'draw'):>18}" for draws in self.needed)
        lines = [f"Half of the 95% interval / detectable effect, nats per token ({self.pilot.source})"]
        lines += ["", f"{'held-out rows':>13}{heads}"]
        for rows in ROWS:
            cells = [(self.pilot.half_width(rows, d), self.pilot.detectable(rows, d)) for d in self.needed]
            lines.append(f"{rows:>13,}" + "".join(f"{f'{half:.4f} / {least:.4f}':>18}" for half, least in cells))
        lines += ["", f"To detect {self.effect:g} with 80% power:"]
        for draws, enough in self.needed.items():
            words = counted(enough, "held-out row") if enough else "no number of rows is enough"
            lines.append(f"  {counted(draws, 'draw')}: {words}")
        return "\n".join([*lines, "", *self._limits()])

    def _limits(self) -> list[str]:
        from scipy.stats import chi2

        if self.pilot.runs == 1:
            return [
                "Only the rows are estimated, from one run of each model: the table is about these adapters, and a "
                "claim about the recipe needs more. Fix: give pilot runs of several seeds with --pilot."
            ]
        freedom = self.pilot.runs - 1
        tail = (1 - CONFIDENCE) / 2
        low, high = (math.sqrt(freedom / chi2.ppf(share, freedom)) for share in (1 - tail, tail))
        lines = [
            "A draw is one training run of each model, with its own rows and its own seed. With 1 draw, a verdict is "
            "about these adapters, and their spread is left out.",
            f"The spread between draws comes from {self.pilot.runs} runs: the true one may be {low:.1f} to {high:.1f} "
            "times as large."
            if self.pilot.draw
            else f"No spread between draws shows in {self.pilot.runs} runs, which does not mean that there is none.",
        ]
        if not self.pilot.draws_vary:
            lines.append("All runs of the pilot have the same training rows, so other rows are left out.")
        return lines


def design(effect: float, folders: Sequence[RunFolder] = ()) -> Design:
    """How many held-out rows and draws detect an effect of `effect` nats per token with 80% power.

    Without pilot runs, the variances are those of a recorded study, which may be far from yours. Raises `UserError` for
    an effect that is not positive, and for pilots that cannot be compared.
    """
    if not (math.isfinite(effect) and effect > 0):
        raise UserError(f"detect: {effect:g} is not an effect. Fix: use a number of nats per token above 0.")
    known = pilot(folders) if folders else ASSUMED
    draws = DRAWS if known.runs > 1 else DRAWS[:1]  # one run says nothing about several
    return Design(effect, known, {number: known.rows_for(effect, number) for number in draws})
