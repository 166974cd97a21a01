"""Verdicts that follow from intervals, and a report that its data cannot break."""

import json
import math
import random
import shutil
import warnings
from dataclasses import replace

import pytest

from qlora_helpers import UserError, __main__, files
from qlora_helpers.evaluation import answer_metrics, comparison, differences, report
from qlora_helpers.evaluation.differences import Arm, Difference
from qlora_helpers.evaluation.row_losses import RowLoss, mean_loss, read_losses
from qlora_helpers.experiments import matrix
from qlora_helpers.runs import RunFolder
from qlora_helpers.training import trainer


def row_losses(per_token, tokens=(20, 30, 50, 10, 40, 25)):
    return [RowLoss(str(i), loss * n, n, 4 * n) for i, (loss, n) in enumerate(zip(per_token, tokens, strict=False))]


def difference(a, losses_a, b, losses_b, **options):
    """With one seed each."""
    return differences.difference(Arm(a, [losses_a]), Arm(b, [losses_b]), **options)


BASE = row_losses([2.0, 2.5, 1.8, 2.2, 2.4, 2.1])


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.2, -0.1, "better"),
        (0.1, 0.2, "worse"),
        (-0.1, 0.1, "not distinguishable"),
        (-0.1, 0.0, "not distinguishable"),
        (0.0, 0.1, "not distinguishable"),
        (0.0, 0.0, "not distinguishable"),
    ],
)
def test_the_verdict_follows_from_the_interval(low, high, verdict):
    change = Difference("base", "exp1", (low + high) / 2, low, high, rows=6, seeds=1)
    assert change.verdict == verdict
    assert f"exp1 is {verdict} " in str(change)


@pytest.mark.parametrize(
    ("shifts", "verdict"),
    [
        ([-0.3, -0.2, -0.4, -0.3, -0.2, -0.3], "better"),
        ([0.3, 0.2, 0.4, 0.3, 0.2, 0.3], "worse"),
        ([-0.3, 0.2, -0.1, 0.3, -0.2, 0.1], "not distinguishable"),
    ],
)
def test_differences(shifts, verdict):
    other = row_losses([a.loss_sum / a.tokens + shift for a, shift in zip(BASE, shifts, strict=True)])
    change = difference("base", BASE, "exp1", other)
    assert change.verdict == verdict
    assert change.low <= change.value <= change.high
    tokens = [row.tokens for row in BASE]
    assert change.value == pytest.approx(sum(s * n for s, n in zip(shifts, tokens, strict=True)) / sum(tokens))
    back = difference("exp1", other, "base", BASE)
    assert back.value == pytest.approx(-change.value)
    assert difference("base", BASE, "exp1", other) == change  # the same interval each time


def test_identical_losses_are_not_distinguishable():
    change = difference("a", BASE, "b", list(BASE))
    assert (change.value, change.low, change.high) == (0, 0, 0)
    assert change.verdict == "not distinguishable"


def test_the_same_gain_on_every_token_is_a_gain():
    """Every resample gives the same difference: the interval is that one value, not no number."""
    other = [RowLoss(row.id, row.loss_sum - 0.5 * row.tokens, row.tokens, row.bytes) for row in BASE]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        change = difference("a", BASE, "b", other)
    assert change.verdict == "better"


def test_one_row_says_nothing_about_others():
    change = difference("a", BASE[:1], "b", row_losses([1.0]))
    assert change.verdict == "not distinguishable"
    assert change.to_dict()["low"] is None  # JSON has no infinity


@pytest.mark.parametrize("rows", [2, 3, 5, 100])
def test_intervals_contain_their_value(rows):
    draw = random.Random(rows)
    tokens = [draw.randint(1, 200) for _ in range(rows)]
    a = row_losses([draw.gauss(2, 0.5) for _ in range(rows)], tokens)
    b = row_losses([draw.gauss(2, 0.5) for _ in range(rows)], tokens)
    change = difference("a", a, "b", b)
    assert change.low <= change.value <= change.high


@pytest.mark.parametrize(
    "other", [BASE[:-1], BASE[::-1], [RowLoss("x", 1, 20, 80), *BASE[1:]], [RowLoss("0", 40, 21, 84), *BASE[1:]]]
)
def test_other_rows_are_refused(other):
    with pytest.raises(UserError, match="different held-out rows"):
        difference("a", BASE, "b", other)


def test_the_spread_of_seeds_widens_the_interval():
    """Three adapters of one recipe that differ a lot say less about the recipe than three that agree."""
    agree = [row_losses([row.loss_sum / row.tokens - 0.3 + s for row in BASE]) for s in (-0.01, 0, 0.01)]
    differ = [row_losses([row.loss_sum / row.tokens - 0.3 + s for row in BASE]) for s in (-0.2, 0, 0.2)]
    base = Arm("base", [BASE], trained=False)
    close, wide = (differences.difference(base, Arm("exp", seeds)) for seeds in (agree, differ))
    assert close.value == pytest.approx(wide.value) == pytest.approx(-0.3)
    assert (close.verdict, wide.verdict) == ("better", "not distinguishable")
    assert close.seeds == wide.seeds == 3
    # Student's t with two degrees of freedom: 4.303 x 0.2 / sqrt(3); every row shifts alike, so rows add nothing
    assert wide.high - wide.value == pytest.approx(4.303 * 0.2 / 3**0.5, rel=1e-3)


def test_bits_per_byte_compare_other_tokenizers():
    """Twice the tokens, half the loss each: the same bits for the same text. A row that one of them cut is left out."""
    other = [RowLoss(row.id, row.loss_sum, 2 * row.tokens, row.bytes) for row in BASE]
    for unit in ("token", "byte"):
        change = difference("a", BASE, "b", other, unit=unit)
        assert (change.value, change.rows) == (0, 6)
    with pytest.raises(UserError, match="different held-out rows"):  # another part of a cut row
        difference("a", BASE, "b", [replace(row, bytes=0) for row in other])
    worse = [RowLoss(row.id, row.loss_sum + 4 * row.tokens, 2 * row.tokens, row.bytes) for row in BASE]
    worse[0] = RowLoss("0", 1e9, 3, 0)
    change = difference("a", BASE, "b", worse, unit="byte")
    assert change.value == pytest.approx(1 / math.log(2))
    assert change.rows == 5
    cut = [RowLoss(row.id, row.loss_sum, row.tokens, 0) for row in BASE]
    with pytest.raises(UserError, match="no held-out row is whole"):
        difference("a", BASE, "b", cut, unit="byte")


@pytest.fixture(scope="module")
def trained(config, tokenizer, tmp_path_factory):
    """Two seeds of one config and one seed of another, trained on the tiny model."""
    folder = tmp_path_factory.mktemp("runs")
    small = config.replace(
        n_seeds=2, n_answers=2, few_shot=True, max_length=512
    )  # held-out rows are whole in both formats
    needed = matrix.plan_runs({"exp1": small.replace(n_samples=8), "exp2": small}, folder)
    assert [(w.experiment, w.name, w.config.seed) for w in needed] == [
        ("exp1", "exp1", 0),
        ("exp1", "exp1-seed1", 1),
        ("exp2", "exp2", 0),
        ("exp2", "exp2-seed1", 1),
    ]
    return folder, matrix.train_missing(needed), needed


def test_runs_are_compared_from_their_folders(trained):
    folder, trained_runs, _ = trained
    result = comparison.compare(trained_runs)
    json.dumps(result.to_dict(), allow_nan=False)
    rivals = ["base", "base, own template", "base, 16 bits", "base, 16 bits, own template", "base + 3 examples"]
    assert [model.name for model in result.table] == [*rivals, "exp1", "exp2"]
    assert [model.seeds for model in result.table] == [*[[]] * 5, [0, 1], [0, 1]]
    pairs = [(d.a, d.b) for d in result.differences]
    assert pairs == [*((rival, name) for rival in rivals for name in ("exp1", "exp2")), ("exp1", "exp2")]
    assert set(result.best_rival) == {"exp1", "exp2"}
    assert result.family == len(pairs) + len(result.forgetting) + 1  # and what quantizing cost
    assert {d.family for d in (*result.differences, *result.forgetting, result.quantizing)} == {result.family}
    assert [d.b for d in result.forgetting] == ["exp1", "exp2"]
    assert {d.rows for d in result.forgetting} == {48}
    assert comparison.group(run for runs_ in trained_runs.values() for run in runs_) == trained_runs
    written = report.write(result, trained_runs, folder / "out")
    page = (folder / "out" / "report.html").read_text("utf-8")
    assert written.read_text("utf-8").count("data:image") == 0
    assert page.count("data:image/png;base64,") == 2
    assert "<table>" in page


def test_equal_steps_and_reuse(trained):
    folder, _, needed = trained
    again = matrix.plan_runs(
        {n: w.config.replace(equal_steps=True) for n, w in (("exp1", needed[0]), ("exp2", needed[2]))}, folder
    )
    control = [item for item in again if item.experiment == "exp1, equal steps"]
    assert [item.name for item in control] == ["exp1-equal-steps", "exp1-equal-steps-seed1"]
    assert {item.config.steps(8) for item in control} == {needed[2].config.steps(16)}
    assert all(item.run.finished for item in again if item not in control)
    assert not any(item.run.finished for item in control)


def test_the_minutes_are_said_before_anything_is_trained(trained, config, tmp_path, capsys, monkeypatch):
    """Of what is missing alone, all runs together."""
    _, trained_runs, needed = trained
    assert matrix.train_missing(needed) == trained_runs
    assert capsys.readouterr().out == "4 finished runs found: nothing to train.\n"
    slow = {"seconds_per_step": 60.0, "n_seeds": 2, "n_answers": 2}
    more = matrix.plan_runs({name: config.replace(n_samples=n, **slow) for name, n in (("a", 8), ("b", 16))}, tmp_path)

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        matrix.train_missing(more)
    first, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("4 of 4 runs missing: about 14 min")  # 2 + 2 + 4 + 4 steps, and four starts
    with pytest.raises(KeyboardInterrupt):
        matrix.train_missing([*needed, *more[:1]])
    assert capsys.readouterr().out.startswith("1 of 5 runs missing: about 3 min")


def test_rehearsal_is_judged_on_the_general_questions(trained, tmp_path):
    """With and without, row by row: losses that are all lower with it are better."""
    _, trained_runs, _ = trained
    (without, *_), (with_it, *_) = trained_runs["exp1"], trained_runs["exp2"]
    own = comparison.rehearsed([without], [with_it])
    gaps = [mean_loss(read_losses(run, "general_losses.jsonl")) for run in (without, with_it)]
    assert own.value == pytest.approx(gaps[1] - gaps[0])
    assert (own.rows, own.seeds) == (48, 1)
    copy = RunFolder(shutil.copytree(without.path, tmp_path / "lower"))
    rows = files.read_jsonl(copy / "general_losses.jsonl")
    files.write_jsonl(copy / "general_losses.jsonl", [row | {"loss_sum": 0.9 * row["loss_sum"]} for row in rows])
    assert comparison.rehearsed([without], [copy]).verdict == "better"
    assert comparison.rehearsed([copy], [without]).verdict == "worse"


def test_other_heldout_sets_are_refused_with_their_fingerprints(trained, config, tmp_path):
    _, trained_runs, _ = trained
    other = matrix.train_missing(matrix.plan_runs({"other": config.replace(n_heldout=5, n_answers=2)}, tmp_path))
    names = [trained_runs["exp1"][0], other["other"][0]]
    prints = [run.read("manifest.json")["data"]["heldout_fingerprint"] for run in names]
    with pytest.raises(UserError, match=f"exp1: {prints[0]}, other: {prints[1]}"):
        comparison.compare(comparison.group(names))


def test_only_another_seed_of_the_same_recipe_and_data_is_a_seed(trained, tmp_path):
    """A copy is not a second seed, and two runs called exp1 are not one experiment."""
    _, trained_runs, _ = trained
    first, second = trained_runs["exp1"]
    other = RunFolder(shutil.copytree(trained_runs["exp2"][0].path, tmp_path / "elsewhere" / "exp1"))
    copy = RunFolder(shutil.copytree(first.path, tmp_path / "base"))
    groups = comparison.group([first, other, second, copy])
    assert groups == {"exp1": [first, second], "elsewhere/exp1": [other], f"{tmp_path.name}/base": [copy]}
    data = other.read("manifest.json")
    data["data"]["source_fingerprint"] = "other rows"
    files.write_json(other / "manifest.json", data)
    assert len(comparison.group([trained_runs["exp2"][0], other])) == 2
    (other / "config.json").write_text('{"config": {"no_such_setting": 1}}')
    with pytest.raises(UserError, match="written by another version"):
        comparison.group([other])


def test_what_only_says_where_and_how_long_makes_no_other_recipe(trained, tmp_path):
    _, trained_runs, _ = trained
    first, second = trained_runs["exp1"]
    moved = RunFolder(shutil.copytree(second.path, tmp_path / "second"))
    stored = moved.read("config.json")
    stored["config"] |= {"profile": "gpu", "n_seeds": 7, "save_steps": 99}
    files.write_json(moved / "config.json", stored)
    assert comparison.group([first, moved]) == {"exp1": [first, moved]}


def test_the_compare_command(trained, tmp_path, capsys):
    _, trained_runs, _ = trained
    words = [str(run.path) for runs_ in trained_runs.values() for run in runs_]
    assert __main__.main(["compare", *words, "--out", str(tmp_path / "out")]) == 0
    assert "exp2 is" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "comparison.json",
        "report.md",
        "report.html",
        "figures",
    }
    assert __main__.main(["compare", str(tmp_path), "--out", str(tmp_path / "no")]) == 2
    assert not (tmp_path / "no").exists()


def test_the_same_seed_gives_the_same_metrics(trained, config, tokenizer, tmp_path):
    """A/A: on a CPU a run repeated is the same run."""
    _, trained_runs, needed = trained
    (again,) = matrix.train_missing(matrix.plan_runs({"exp1": needed[0].config.replace(n_seeds=1)}, tmp_path))["exp1"]
    first = trained_runs["exp1"][0]
    for name in ("heldout_losses.jsonl", "general_losses.jsonl", "answers.jsonl"):
        assert (again / name).read_text() == (first / name).read_text()
    timed = ("seconds", "tokens_per_second", "peak_memory_gib", "eval_seconds", "eval_peak_memory_gib")
    a, b = ({k: v for k, v in run.read("metrics.json").items() if k not in timed} for run in (again, first))
    assert a == b


def test_if_one_model_thinks_every_answering_model_has_a_share():
    answer = {"prompt": "p", "reference": "r", "answer": "r", "stopped": True, "invented": False}
    plain, thought = ([answer | {"thought": text}] * 5 for text in ("", "Hm."))
    texts = answer_metrics.of_models({"base": thought, "silent": [], "exp1": plain})
    assert [texts["base"]["thinks"].value, texts["exp1"]["thinks"].value] == [1, 0]
    assert texts["silent"] == {}
    assert "thinks" not in answer_metrics.of_models({"silent": [], "exp1": plain})["exp1"]


def test_three_scored_answers_of_many_have_no_interval():
    answer = {"prompt": "p", "reference": "r", "answer": "r", "stopped": True, "invented": False, "thought": ""}
    rows = [answer | {"score": 1.0, "outcome": "right"}] * 3 + [answer | {"score": None, "outcome": "unusable"}] * 3
    found = answer_metrics.of_model(rows)
    assert (found["score"].low, found["ROUGE-L"].low) == (-math.inf, 1)
    (compared,) = answer_metrics.between({"a": rows, "b": rows}, [("a", "b")])
    assert "score" not in [one.metric for one in compared.metrics]
