"""Planned intervals against simulated ones, variance components against the truth, and the command."""

import json

import numpy as np
import pytest

from qlora_helpers import UserError, files
from qlora_helpers.__main__ import main
from qlora_helpers.evaluation import differences, power
from qlora_helpers.evaluation.differences import Arm
from qlora_helpers.evaluation.power import Pilot
from qlora_helpers.evaluation.row_losses import RowLoss, to_rows
from qlora_helpers.files import ROOT
from qlora_helpers.runs import RunFolder

ROW, DRAW, BOTH = 0.1, 0.01, 0.05  # standard deviations in nats per token


def compared(rng, rows, draws, group=1):
    """A base model and a model with several draws: contrast of the two. Rows of a group differ alike."""
    tokens = rng.integers(20, 60, rows)
    own = np.repeat(rng.normal(0, ROW, rows // group), group)
    hard = rng.normal(2, 0.5, rows)

    def losses(level):
        names = [str(i // group) if group > 1 else "" for i in range(rows)]
        return [
            RowLoss(str(i), x * n, int(n), 0, g) for i, (x, n, g) in enumerate(zip(level, tokens, names, strict=True))
        ]

    shifts = rng.normal(0, DRAW, draws)
    seeds = [losses(hard + own + shift + rng.normal(0, BOTH, rows)) for shift in shifts]
    return differences.contrast([Arm("base", [losses(hard)], trained=False), Arm("run", seeds)], [-1, 1])


@pytest.mark.parametrize(("rows", "draws"), [(400, 3), (800, 5), (200, 1)])
def test_the_realized_half_width_is_the_planned_one(rows, draws):
    """Pilots of 100 rows and 6 draws plan comparisons of other sizes; medians, since a few draws spread widely."""
    rng = np.random.default_rng(0)
    pilots = [power.components(compared(rng, 100, 6 if draws > 1 else 1), 6, "pilot") for _ in range(40)]
    planned = np.median([pilot.half_width(rows, draws) for pilot in pilots])
    intervals = [compared(rng, rows, draws).interval for _ in range(40)]
    realized = np.median([(interval.high - interval.low) / 2 for interval in intervals])
    assert realized == pytest.approx(planned, rel=0.2)


def test_an_effect_of_the_planned_size_is_detected_in_80_percent():
    rng, trials = np.random.default_rng(1), 150
    truth = Pilot("truth", ROW**2, DRAW**2, BOTH**2, runs=6)
    effect = truth.detectable(200, 5)
    found = [compared(rng, 200, 5).interval for _ in range(trials)]
    assert 0.7 <= np.mean([interval.low > -effect for interval in found]) <= 0.9


def test_components_are_those_of_the_simulation():
    """Means of variances over many pilots; token weights make a row count a little more than once."""
    rng = np.random.default_rng(2)
    pilots = [power.components(compared(rng, 100, 6), 6, "pilot") for _ in range(150)]
    assert np.mean([p.row for p in pilots]) == pytest.approx(ROW**2, rel=0.2)
    assert np.mean([p.both for p in pilots]) == pytest.approx(BOTH**2, rel=0.2)
    assert np.mean([p.draw for p in pilots]) == pytest.approx(DRAW**2, rel=0.3)


def test_rows_of_a_group_count_once():
    """Groups of 4 rows: as many groups as rows are needed, so about four times the rows."""
    rng = np.random.default_rng(3)
    single, grouped = (power.components(compared(rng, 800, 1, group), 1, "pilot") for group in (1, 4))
    assert grouped.group == 4
    assert grouped.rows_for(0.02, 1) == pytest.approx(4 * single.rows_for(0.02, 1), rel=0.35)


def test_more_rows_do_not_replace_draws():
    pilot = Pilot("by hand", row=0.01, draw=0.0001, both=0.0, runs=3)
    assert pilot.rows_for(0.02, 2) is None  # two draws: Student's t with one degree of freedom, 12.7 x 0.007
    assert pilot.rows_for(0.02, 10) < pilot.rows_for(0.02, 5)
    enough = pilot.rows_for(0.02, 5)
    assert pilot.detectable(enough, 5) <= 0.02 < pilot.detectable(enough - 1, 5)
    assert "2 draws: no number of rows" in str(power.Design(0.02, pilot, {2: None}))


@pytest.fixture
def runs(config, tmp_path):
    """Folders of three finished seeds of one recipe, their base model, and one run of another recipe."""
    rng = np.random.default_rng(0)
    hard = rng.normal(2, 0.5, 40)

    def write(name, level):
        losses = [RowLoss(str(i), 30 * x, 30, 0) for i, x in enumerate(level)]
        files.write_jsonl(tmp_path / name / "heldout_losses.jsonl", to_rows(losses))

    write("base-0", hard)
    for name, own in [(f"s{seed}", config.replace(seed=seed)) for seed in range(3)] + [("r8", config.replace(rank=8))]:
        write(name, hard + rng.normal(-0.1, 0.1, 40) + rng.normal(0, 0.02))
        files.write_json(tmp_path / name / "config.json", {"config": own.to_dict()})
        manifest = {"baseline": "base-0", "data": {"source_fingerprint": "x"}}
        files.write_json(tmp_path / name / "manifest.json", manifest)
    return tmp_path


def plan(capsys, *words):
    code = main(["plan", "--detect", "0.05", *map(str, words)])
    return code, capsys.readouterr()


def test_the_command_plans_from_several_seeds(runs, capsys):
    code, printed = plan(capsys, "--pilot", runs / "s0", runs / "s1", runs / "s2")
    assert code == 0
    assert "s0 against base, 40 held-out rows with 1,200 tokens" in printed.out
    assert "10 draws" in printed.out
    assert "3 runs" in printed.out
    _, printed = plan(capsys, "--json", "--pilot", runs / "s0", runs / "s1", runs / "s2")
    planned = json.loads(printed.out)
    assert planned["pilot"]["runs"] == 3
    assert planned["pilot"]["draws_vary"]
    assert [line["draws"] for line in planned["needed"]] == list(power.DRAWS)
    assert len(planned["table"]) == len(power.ROWS) * len(power.DRAWS)


def test_one_run_plans_rows_only_and_says_so(runs, capsys):
    for words in (("--pilot", runs / "s0"), ("--pilot", runs / "s0", runs / "r8")):
        code, printed = plan(capsys, *words)
        assert code == 0
        assert "Only the rows are estimated" in printed.out
        assert " 2 draws" not in printed.out


def test_without_a_pilot_the_recorded_study_is_assumed(capsys):
    folder = ROOT / "results" / "h100-smollm2-study"
    names = ("n100-epochs20", "n200-epochs10")
    recorded = power.pilot([RunFolder(run) for name in names for run in sorted(folder.glob(f"{name}-seed*"))])
    for part in ("row", "draw", "both", "runs"):
        assert getattr(power.ASSUMED, part) == pytest.approx(getattr(recorded, part), rel=0.03)
    code, printed = plan(capsys)
    assert code == 0
    assert "assumed: two adapters of a 135M model" in printed.out
    assert "comes from 9 runs" in printed.out


def test_seeds_with_the_same_rows_do_not_speak_for_draws(runs, capsys, config):
    for seed in range(3):
        own = config.replace(seed=seed, draw=0)
        files.write_json(runs / f"s{seed}" / "config.json", {"config": own.to_dict()})
    printed = str(power.design(0.05, [power.RunFolder(runs / f"s{seed}") for seed in range(3)]))
    assert "same training rows" in printed


def test_wrong_pilots_and_effects_are_refused(runs, capsys, config):
    files.write_json(runs / "s1" / "config.json", {"config": config.replace(rank=2).to_dict()})
    code, printed = plan(capsys, "--pilot", runs / "s0", runs / "s1", runs / "r8")
    assert code == 2
    assert "3 experiments" in printed.err
    assert plan(capsys, "--pilot", runs / "none")[0] == 2
    for effect in ("0", "-1", "nan", "inf"):
        assert main(["plan", "--detect", effect]) == 2
    assert main(["plan", "--pilot", str(runs / "s0")]) == 2
    with pytest.raises(UserError, match="not an effect"):
        power.design(0)
