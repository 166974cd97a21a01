"""Calibration of the verdicts: simulated runs whose true losses are known, judged like real ones.

usage: python benchmarks/calibration.py [TABLE …] [--trials 1000]

Held-out rows are drawn with replacement from the 100 rows of results/h100-smollm2-seeds, with their lengths and with
the losses that its models had on them, heavy tails included. Training seeds and draws of training rows shift all rows
alike and each row by itself. Each table is written to results/calibration/, and all tables to docs/statistics.md.
"""

import argparse
import json
import math
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import scipy
from scipy import stats

from qlora_helpers import files
from qlora_helpers.evaluation import intervals
from qlora_helpers.evaluation.differences import Arm, contrast, difference, family
from qlora_helpers.evaluation.intervals import Estimate, Interval
from qlora_helpers.evaluation.row_losses import RowLoss
from qlora_helpers.files import ROOT

STUDY, OUT, PAGE = ROOT / "results" / "h100-smollm2-seeds", ROOT / "results" / "calibration", "docs/statistics.md"
BASE, FEW_SHOT, SMALL, LONGER, LARGE, ALL = (
    "base", "base/few_shot", "100-rows", "100-rows-250-steps", "200-rows", "all-283-rows",
)  # fmt: skip
AGAINST = {BASE: "base model", LONGER: "another recipe"}
DRAW_SD = 0.0104  # nats per token, of a draw of 24 training rows, alike for all held-out rows
SEED_SD = 0.0029  # of a training seed, with 24 training rows
ROW_BY_SEED = 0.065  # of a row with a seed, divided by the root of the row's tokens: fitted to the study's three seeds
ROW_BY_DRAW = 3 * ROW_BY_SEED  # assumed: as much larger as a draw's own deviation is
Design = tuple[str, int]
ONE: Design = ("one run", 1)
DESIGNS: tuple[Design, ...] = (ONE, ("seeds", 3), ("draws", 3), ("draws", 5), ("draws", 10))
Effect = np.ndarray | float


@dataclass(frozen=True)
class Rows:
    """Held-out rows of one trial: `tokens`, their `groups`, and the expected loss per token of each model."""

    tokens: np.ndarray
    losses: dict[str, np.ndarray]
    groups: Sequence[str]

    def arm(self, name: str, effects: Sequence[Effect] = (), labels: tuple[int, ...] = (), shift: float = 0.0) -> Arm:
        """The model `name`, with one run for each of `effects`, which are added to its expected losses."""
        runs = [self.losses[name] + shift + effect for effect in effects] or [self.losses[name] + shift]
        columns = (range(len(self.tokens)), self.tokens.tolist(), self.groups)
        seeds = [
            [RowLoss(str(i), x * n, n, 0, g) for i, n, g, x in zip(*columns, run.tolist(), strict=True)] for run in runs
        ]
        return Arm(name, seeds, trained=bool(effects), labels=labels)

    def draws(self, rng: np.random.Generator, design: Design) -> list[Effect]:
        """What each draw of training rows adds to every row's loss per token; nothing unless draws vary."""
        kind, count = design
        return [self._effect(rng, DRAW_SD, ROW_BY_DRAW) if kind == "draws" else 0.0 for _ in range(count)]

    def runs(self, rng: np.random.Generator, design: Design, draws: list[Effect]) -> list[Effect]:
        """What each run adds, with a seed of its own. One adapter's shift belongs to the truth: nothing reveals it."""
        return [draw + self._effect(rng, SEED_SD * (design != ONE), ROW_BY_SEED) for draw in draws]

    def _effect(self, rng: np.random.Generator, alike: float, by_row: float) -> Effect:
        return alike * rng.normal() + by_row * heavy(rng, len(self.tokens)) / np.sqrt(self.tokens)


def heavy(rng: np.random.Generator, size: int) -> np.ndarray:
    """Student's t with 5 degrees of freedom, scaled to a variance of 1. The study's seeds have such tails."""
    return rng.standard_t(5, size) / math.sqrt(5 / 3)


def recorded() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Tokens of the study's rows, and their loss per token with each model, the mean of its seeds."""
    tokens, losses = np.zeros(0), {}
    for name in (BASE, FEW_SHOT, SMALL, LONGER, LARGE, ALL):
        runs = [STUDY / f"{name}{end}" / "heldout_losses.jsonl" for end in ("", "-seed1", "-seed2")]
        rows = [files.read_jsonl(run) for run in runs if run.exists()]
        tokens = np.array([row["tokens"] for row in rows[0]], dtype=float)
        losses[name] = np.mean([[row["loss_sum"] for row in run] for run in rows], axis=0) / tokens
    return tokens, losses


TOKENS, LOSSES = recorded()


def true_loss(name: str) -> float:
    """Expected loss of a model per token."""
    return float(np.average(LOSSES[name], weights=TOKENS))


def draw_rows(rng: np.random.Generator, rows: int, equal: bool = False) -> Rows:
    """Draw held-out rows; if `equal`, every model has the same expected loss, though not on every row."""
    drawn = rng.integers(0, len(TOKENS), rows)
    losses = {name: values[drawn] - equal * true_loss(name) for name, values in LOSSES.items()}
    return Rows(TOKENS[drawn].astype(int), losses, [""] * rows)


def judge(a: Arm, b: Arm) -> dict[str, Interval]:
    """Interval of the difference as this package computes it, and as two simpler methods would."""
    estimate = contrast([a, b], [-1, 1]).estimate
    ((ours,),) = intervals.simultaneous([[estimate]])
    ((rows,),) = intervals.simultaneous([[replace(estimate, seeds={})]]) if estimate.seeds else ((ours,),)
    return {"here": ours, "rows alone": rows, "Welch's t": welch(estimate)}


def welch(estimate: Estimate) -> Interval:
    """Welch's t with Satterthwaite's degrees of freedom; the rows-by-seeds variance comes off the variance of seeds."""
    rows, n = float((estimate.residuals**2).sum()), len(estimate.above)
    variance, spread = rows, rows**2 / (n - 1)
    for (error, count), sums in zip(estimate.seed_errors, estimate.seeds.values(), strict=True):
        shared = max(rows - replace(estimate, seeds={(): sums}).row_error ** 2, 0)
        if error**2 > shared:
            variance += error**2 - shared
            spread += error**4 / (count - 1) + shared**2 / ((count - 1) * (n - 1))
    reach = float(stats.t.ppf(0.975, variance**2 / spread)) * math.sqrt(variance)
    return Interval(estimate.value, estimate.value - reach, estimate.value + reach, math.sqrt(variance))


def multi_bootstrap(estimate: Estimate, resamples: int = 1000) -> Interval:
    """Percentile interval with rows and seeds drawn with replacement (Sellam et al., arXiv 2106.16163)."""
    rng, n = np.random.default_rng(0), len(estimate.above)
    above = np.tile(estimate.above, (resamples, 1))
    for sums in estimate.seeds.values():
        count = len(sums)
        drawn = rng.multinomial(count, np.full(count, 1 / count), resamples) / count
        above += drawn @ sums - sums.mean(axis=0)
    rows = rng.multinomial(n, np.full(n, 1 / n), resamples)
    low, high = np.quantile((rows * above).sum(axis=1) / (rows @ estimate.below), [0.025, 0.975])
    return Interval(estimate.value, float(low), float(high))


def misses(interval: Interval, truth: float = 0.0) -> bool:
    """Whether the true value is outside."""
    return not interval.low <= truth <= interval.high


def coverage(trials: int) -> Iterator[dict[str, object]]:
    """How often does the 95% interval contain the true difference? Goal: 93% to 97%."""
    for pair, sizes in (((BASE, SMALL), (24, 100, 400)), ((LONGER, LARGE), (100,))):
        for rows, design in ((rows, design) for rows in sizes for design in DESIGNS):
            rng, missed, reach = np.random.default_rng(0), Counter[str](), 0.0
            for _ in range(trials):
                drawn = draw_rows(rng, rows)
                found = judge(*recipes(rng, drawn, pair, design))
                truth = true_loss(pair[1]) - true_loss(pair[0])
                missed.update(name for name, interval in found.items() if misses(interval, truth))
                reach += (found["here"].high - found["here"].low) / 2 / trials
            yield {
                "against": AGAINST[pair[0]], "rows": rows, "runs": _words(design),
                **{name: 1 - missed[name] / trials for name in found}, "half-width, nats": reach,
            }  # fmt: skip


def recipes(
    rng: np.random.Generator, drawn: Rows, pair: tuple[str, str], design: Design, effect: float = 0.0
) -> tuple[Arm, Arm]:
    """Two models of `pair` on the same draws, each with seeds of its own; `effect` is added to the second."""
    draws = drawn.draws(rng, design)
    first = [] if pair[0] == BASE else drawn.runs(rng, design, draws)
    return drawn.arm(pair[0], first), drawn.arm(pair[1], drawn.runs(rng, design, draws), shift=effect)


def same_recipe(trials: int) -> Iterator[dict[str, object]]:
    """How often is a recipe called different from itself, trained on other draws of rows? Goal: at most 5%."""
    for count in (1, 2, 3, 5, 10):
        rng, missed = np.random.default_rng(1), Counter[str]()
        for _ in range(trials):
            a, b = same_recipe_pair(rng, count)
            found = judge(a, b) | {"Multi-Bootstrap": multi_bootstrap(contrast([a, b], [-1, 1]).estimate)}
            missed.update(name for name, interval in found.items() if misses(interval))
        yield {"runs on each side": _words(("draws", count))} | {name: missed[name] / trials for name in found}


def same_recipe_pair(rng: np.random.Generator, count: int) -> tuple[Arm, Arm]:
    """The same recipe on two sets of draws."""
    drawn, design = draw_rows(rng, 100), ("draws", count)
    a, b = (
        drawn.arm(SMALL, drawn.runs(rng, design, drawn.draws(rng, design)), tuple(range(start, start + count)))
        for start in (0, count)
    )
    return a, b


def report_family(trials: int) -> Iterator[dict[str, object]]:
    """How often is any of the 11 verdicts of a report wrong, if all models are equally good? Goal: at most 5%."""
    for design in (ONE, ("draws", 3), ("draws", 5), ("draws", 10)):
        rng, joint, single, wider = np.random.default_rng(2), 0, 0, 0.0
        for _ in range(trials):
            pairs = report_pairs(rng, design)
            (together,) = family([pairs])
            alone = [difference(a, b) for a, b in pairs]
            joint += any(d.low > 0 or d.high < 0 for d in together)
            single += any(d.low > 0 or d.high < 0 for d in alone)
            wider += float(np.mean([(x.high - x.low) / (y.high - y.low) for x, y in zip(together, alone, strict=True)]))
        yield {
            "runs": _words(design), "simultaneous intervals": joint / trials, "single intervals": single / trials,
            "half-widths, ratio": round(wider / trials, 2),
        }  # fmt: skip


def report_pairs(rng: np.random.Generator, design: Design) -> list[tuple[Arm, Arm]]:
    """The 11 pairs of the study's report, with four recipes that share their draws and are all as good as the base."""
    drawn = draw_rows(rng, 100, equal=True)
    draws = drawn.draws(rng, design)
    arms = [drawn.arm(name, drawn.runs(rng, design, draws)) for name in (SMALL, LONGER, LARGE, ALL)]
    pairs = [(drawn.arm(rival), arm) for rival in (BASE, FEW_SHOT) for arm in arms]
    return pairs + list(pairwise(arms))


def checkpoints(trials: int) -> Iterator[dict[str, object]]:
    """How often is the best of 5 equally good checkpoints called better? Goal: at most 2.5%, on one side."""
    for rows, selection in ((100, 50), (50, 25)):
        wrong = {"selection rows": 0, "verdict rows": 0}
        rng = np.random.default_rng(3)
        for _ in range(trials):
            for where, change in chosen_checkpoint(rng, rows, selection).items():
                wrong[where] += change.high < 0
        yield {"verdict rows": rows, "selection rows": selection} | {
            f"chosen on {where}": count / trials for where, count in wrong.items()
        }


def chosen_checkpoint(rng: np.random.Generator, rows: int, selection: int) -> dict[str, Interval]:
    """Interval of the best of five checkpoints minus another run, by the rows that the checkpoint was chosen on.

    Checkpoints differ from each other on every row as two recipes of the study do, but not in their expected loss.
    """
    drawn = draw_rows(rng, rows + selection)
    by_row = math.sqrt(np.average((LOSSES[LARGE] - LOSSES[LONGER] - _gap()) ** 2 * TOKENS))
    noise = by_row * np.array([heavy(rng, rows + selection) for _ in range(5)]) / np.sqrt(drawn.tokens)
    where = {"selection rows": slice(rows, None), "verdict rows": slice(0, rows)}
    found = {}
    for name, part in where.items():
        best = int(np.argmin(np.average(noise[:, part], axis=1, weights=drawn.tokens[part])))
        gaps = noise[best, :rows] * drawn.tokens[:rows]
        found[name] = intervals.ratio(gaps, drawn.tokens[:rows])
    return found


def _gap() -> float:
    return true_loss(LARGE) - true_loss(LONGER)


def clusters(trials: int) -> Iterator[dict[str, object]]:
    """How often does the interval contain the truth if rows of a group are alike (ICC 0.3)? Goal: at least 93%."""
    for groups in (10, 15, 30, 60):
        rng, missed, rows = np.random.default_rng(4), Counter[str](), 0
        for _ in range(trials):
            a, b = grouped_pair(rng, groups)
            rows += len(a.seeds[0])
            ungrouped = [replace(arm, seeds=[[replace(row, group="") for row in arm.seeds[0]]]) for arm in (a, b)]
            missed["groups"] += misses(contrast([a, b], [-1, 1]).interval)
            missed["rows"] += misses(contrast(ungrouped, [-1, 1]).interval)
        yield {
            "groups": groups, "rows, mean": round(rows / trials), "over groups": 1 - missed["groups"] / trials,
            "over rows, groups ignored": 1 - missed["rows"] / trials,
        }  # fmt: skip


def grouped_pair(rng: np.random.Generator, groups: int) -> tuple[Arm, Arm]:
    """Two models without a true difference, on groups of 1 to 20 rows whose differences correlate by 0.3."""
    sizes = np.minimum(rng.geometric(1 / 6, groups), 20)
    drawn = draw_rows(rng, int(sizes.sum()))
    drawn = replace(drawn, groups=[f"group {g}" for g, size in enumerate(sizes) for _ in range(size)])
    spread = float(np.std(LOSSES[SMALL] - LOSSES[BASE]))
    gap = spread * (
        math.sqrt(0.3) * np.repeat(heavy(rng, groups), sizes) + math.sqrt(0.7) * heavy(rng, int(sizes.sum()))
    )
    return drawn.arm(BASE), drawn.arm(BASE, [gap])


def detectable(trials: int) -> Iterator[dict[str, object]]:
    """How often is an effect of the stated detectable size detected? Goal: 75% to 85%."""
    for pair in ((BASE, SMALL), (LONGER, LARGE)):
        for design in DESIGNS:
            rng = np.random.default_rng(5)

            def measured(effect: float, pair: tuple[str, str] = pair, design: Design = design) -> Interval:
                return contrast(recipes(rng, draw_rows(rng, 100, equal=True), pair, design, effect), [-1, 1]).interval  # noqa: B023

            stated = [measured(0.0).detectable for _ in range(trials)]
            effect = float(np.mean(stated))
            yield {
                "against": AGAINST[pair[0]], "runs": _words(design), "stated effect, nats": effect,
                "10% state less than, nats": float(np.quantile(stated, 0.1)),
                "detected": sum(measured(-effect).high < 0 for _ in range(trials)) / trials,
            }  # fmt: skip


def _words(design: Design) -> str:
    kind, count = design
    return kind if design == ONE else f"{count} {kind if count > 1 else kind[:-1]}"


TABLES: dict[str, Callable[[int], Iterator[dict[str, object]]]] = {
    "coverage": coverage,
    "same-recipe": same_recipe,
    "report": report_family,
    "checkpoints": checkpoints,
    "clusters": clusters,
    "detectable": detectable,
}


def table(name: str) -> str:
    """A stored table in Markdown."""
    stored = json.loads((OUT / f"{name}.json").read_text("utf-8"))
    lines = [[_cell(key, value) for key, value in row.items()] for row in stored["rows"]]
    head = list(stored["rows"][0])
    made = f"{stored['question']} {stored['trials']:,} trials per line, numpy {stored['versions']['numpy']}."
    return "\n".join(["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines)] + ["", made])


def _cell(key: str, value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if "nats" in key else f"{value:.2f}" if "ratio" in key else f"{value:.1%}"


def page() -> str:
    """docs/statistics.md with the stored tables."""
    text = (ROOT / PAGE).read_text("utf-8")
    for name in TABLES:
        mark = re.compile(rf"(<!-- {name}: .*? -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        text, found = mark.subn(lambda match, name=name: f"{match[1]}\n{table(name)}\n\n{match[2]}", text)
        if found != 1:
            raise SystemExit(f"error: {PAGE} needs the marks of '{name}' once. Fix: <!-- {name}: … -->.")
    return text


def main() -> None:
    """Write the tables, then the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"one of {', '.join(TABLES)} (default: all)")
    parser.add_argument("--trials", type=int, default=1000)
    given = parser.parse_args()
    versions = {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__}
    OUT.mkdir(exist_ok=True)
    for name in given.tables or TABLES:
        rows = list(TABLES[name](given.trials))
        question = (TABLES[name].__doc__ or "").strip()
        content = {"question": question, "trials": given.trials, "versions": versions, "rows": rows}
        files.write_json(OUT / f"{name}.json", content)
        print(table(name), flush=True)
    (ROOT / PAGE).write_text(page(), "utf-8")


if __name__ == "__main__":
    main()
