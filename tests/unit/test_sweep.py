"""A batch plans the right runs, reuses finished ones under any name, and resumes after an interruption."""

from pathlib import Path

import pytest

from qlora_helpers import Config, UserError, __main__, files, runs
from qlora_helpers.data import cleaning
from qlora_helpers.evaluation import comparison, learning_curve
from qlora_helpers.experiments import matrix, series
from qlora_helpers.runs import RunFolder

SEEDS = [0]


@pytest.fixture(scope="module")
def cleaned(config, tokenizer):
    return cleaning.clean(config, tokenizer)


def planned(config, cleaned, tokenizer, folder, counts=(4, 8), seeds=SEEDS, **lists):
    settings = [*matrix.size_settings(config, counts), *matrix.one_at_a_time(config, max(counts), lists)]
    return matrix.batch_runs(settings, seeds, cleaned, tokenizer, folder)


def test_the_profile_s_sizes(config, cleaned):
    assert matrix.training_sizes(config, cleaned) == ([8, 16, 32], [])
    for profile in ("t4", "gpu"):
        sizes, _ = matrix.training_sizes(Config.from_params(profile=profile, n_heldout=6), cleaned)
        assert sizes[:4] == [25, 50, 100, 200]


def test_sizes_above_the_data_give_way_to_all_there_is(config, cleaned):
    left = len(cleaned.train)
    sizes, remarks = matrix.training_sizes(config, cleaned, [8, 100_000, left + 1])
    assert sizes == [8, left]
    assert remarks == [f"sample_counts: {left} instead of {left + 1}, 100000, the number of training rows"]
    assert matrix.training_sizes(config, cleaned, [left, 8]) == ([8, left], [])


def test_a_size_named_twice_is_run_once(config, cleaned):
    assert matrix.training_sizes(config, cleaned, [8, 4, 8]) == (
        [4, 8],
        ["sample_counts: 8 given more than once, run once"],
    )


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([0, 8], "n_samples: 0 is too small"),
        ([-4, 8], "n_samples: -4 is too small"),
        (["4", 8], "n_samples: expected a whole number, got '4'"),
        ([4, True], "n_samples: expected a whole number"),
        ([4, None], "expected a list of numbers"),
        ([], "expected a list of numbers"),
        ("4 8", "expected a list of numbers such as .1, 2., got '4 8'"),
        ([8], "a curve needs at least two sizes, but only 8 is left of 8 "),
        ([8, 8], "a curve needs at least two sizes"),
        ([10_000, 20_000], "is left of 10000, 20000"),
    ],
)
def test_an_invalid_list_of_sizes_is_refused(config, cleaned, asked, message):
    with pytest.raises(UserError, match=message):
        matrix.training_sizes(config, cleaned, asked)


def test_too_few_rows_are_counted(config, tokenizer):
    cleaned = cleaning.clean(config.replace(n_heldout=10_000), tokenizer)
    with pytest.raises(UserError, match="0 usable rows left"):
        matrix.training_sizes(config.replace(n_heldout=10_000), cleaned)


def test_equal_steps_repeat_the_smaller_sizes(config):
    """16 rows in batches of 4 for 3 epochs are 12 steps, as are 4 rows for 12 epochs and 9 rows for 4 epochs."""
    result = matrix.equal_step_settings(config.replace(epochs=3), [4, 9, 16])
    assert [(s.name, s.folder, s.config.n_samples, s.config.epochs) for s in result] == [
        ("4 rows, 12 steps", "n4-epochs12", 4, 12),
        ("9 rows, 12 steps", "n9-epochs4", 9, 4),
        ("16 rows", "n16", 16, 3),
    ]
    assert result[-1] == matrix.size_settings(config.replace(epochs=3), [16])[0]


def test_each_setting_changes_one_value(config):
    lists = {"learning_rates": [1e-3, 0.01], "ranks": [8], "epochs_list": None, "effective_batches": [8, 6, 5]}
    base, *changed = matrix.one_at_a_time(config, 8, lists)
    assert (base.name, base.config) == ("8 rows", config.replace(n_samples=8))
    plain = base.config.to_dict()
    differ = {s.name: {k: v for k, v in s.config.to_dict().items() if v != plain[k]} for s in changed}
    assert differ == {  # 0.01 is the learning rate of the base setting
        "learning rate 0.001": {"learning_rate": 0.001},
        "rank 8": {"rank": 8},
        "effective batch 8": {"gradient_accumulation": 2},
        "effective batch 6": {"batch_size": 3, "gradient_accumulation": 2},
        "effective batch 5": {"batch_size": 1, "gradient_accumulation": 5},
    }
    assert [s.folder for s in changed][:3] == ["n8-lr0.001", "n8-rank8", "n8-batch8"]


def test_without_changes_there_are_no_settings(config):
    assert matrix.one_at_a_time(config, 8, dict.fromkeys(matrix.SETTINGS)) == []
    assert matrix.one_at_a_time(config, 8, {"ranks": [config.rank]}) == []


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"ranks": [0]}, "rank: 0 is too small"),
        ({"ranks": 8}, "ranks: expected a list"),
        ({"learning_rates": ["2e-4"]}, "in YAML write 2.0e-4"),
        ({"effective_batches": [0]}, "effective_batches: expected a number of rows, got 0"),
        ({"effective_batches": [2.5]}, "effective_batches: expected a number of rows, got 2.5"),
        ({"epochs_list": [None]}, "epochs_list: expected a list"),
    ],
)
def test_bad_values_are_refused(config, lists, message):
    with pytest.raises(UserError, match=message):
        matrix.one_at_a_time(config, 8, lists)


def test_every_run_is_planned_once(config, cleaned, tokenizer, tmp_path):
    """The run on 8 rows is a point of the curve and also the base setting for the ranks."""
    needed = planned(config, cleaned, tokenizer, tmp_path, seeds=[3, 4], ranks=[8])
    assert [item.name for item in needed] == [
        "n4-seed3", "n4-seed4", "n8-seed3", "n8-seed4", "n8-rank8-seed3", "n8-rank8-seed4",
    ]  # fmt: skip
    assert [item.config.seed for item in needed] == [3, 4] * 3
    assert [len(item.data.train) for item in needed] == [4, 4, 8, 8, 8, 8]
    for item in needed:
        whole = cleaning.prepare(item.config, tokenizer)
        assert item.data.to_manifest() == whole.to_manifest()
        assert Config.from_params(**item.config.params) == item.config


def test_each_seed_trains_on_rows_of_its_own(config, cleaned, tokenizer, tmp_path):
    def rows(own):
        comparison = matrix.plan_runs({"exp1": own.replace(n_seeds=2)}, tmp_path)
        batch = planned(own, cleaned, tokenizer, tmp_path, counts=[own.n_samples], seeds=[0, 1])
        return [[{e.row.id for e in item.data.train} for item in plan] for plan in (comparison, batch)]

    for first, second in rows(config):
        assert first != second
    for first, second in rows(config.replace(draw=5)):
        assert first == second


class Stopped(Exception):
    pass


@pytest.fixture
def batch(config, cleaned, tokenizer, monkeypatch):
    """`series.train` with notebook 05 replaced by its work. `stop_at` interrupts the batch before that run."""

    def run(folder, stop_at=None, **plan):
        started = []

        def execute(name, target, params, label, bar):
            assert name == "05_train_exp1"
            if len(started) == stop_at:
                raise Stopped
            params = dict(params)
            where, run_name = Path(params.pop("workdir")), params.pop("run_name")
            assert target == where / run_name / "notebook.ipynb"
            from qlora_helpers.training import trainer

            its = Config.from_params(**params)
            data = cleaning.prepare(its, tokenizer)
            result = runs.choose(where, run_name, cleaning.identity(its, data))
            assert result.name == run_name
            started.append(run_name)
            trainer.train(its, data, tokenizer, result)

        monkeypatch.setattr(series, "execute", execute)
        small = config.replace(n_answers=2, few_shot=True)
        try:
            return started, series.train(planned(small, cleaned, tokenizer, folder, **plan))
        except Stopped:
            return started, None

    return run


def test_an_interrupted_batch_resumes_and_reuses_finished_runs(batch, config, cleaned, tokenizer, tmp_path, capsys):
    assert batch(tmp_path, stop_at=1) == (["n4-seed0"], None)
    (tmp_path / "n4-seed0").rename(tmp_path / "exp1")
    needed = planned(config.replace(n_answers=2), cleaned, tokenizer, tmp_path, ranks=[8])
    absent, minutes = matrix.missing_runs(needed)
    assert [item.name for item in absent] == ["n8-seed0", "n8-rank8-seed0"]
    assert minutes.startswith("about 70 s")  # two starts of 35 s; the steps of such a small model take no time
    half = tmp_path / "half"  # an interrupted run, with its config but without metrics
    half.mkdir()
    files.write_json(
        half / "config.json",
        {"identity": cleaning.identity(absent[0].config, absent[0].data), "config": absent[0].config.to_dict()},
    )
    started, result = batch(tmp_path, ranks=[8])
    assert started == ["half", "n8-rank8-seed0"]
    assert "[1/3] exp1: complete, not run again" in capsys.readouterr().out
    assert {name: [run.name for run in group] for name, group in result.items()} == {
        "4 rows": ["exp1"],
        "8 rows": ["half"],
        "rank 8": ["n8-rank8-seed0"],
    }
    assert batch(tmp_path, ranks=[8])[0] == []
    assert matrix.missing_runs(needed)[0] == []
    _curve_of(result)


def _curve_of(result):
    """Check that the curve of notebook 09 agrees with the metrics in the run folders."""
    sizes = {name: result[name] for name in ("4 rows", "8 rows")}
    line = learning_curve.build("equal epochs", sizes)
    losses = [result[name][0].read("metrics.json")["eval_loss"] for name in sizes]
    assert line.doubling.value == pytest.approx(losses[1] - losses[0])
    assert line.base_loss == pytest.approx(result["4 rows"][0].read("metrics.json")["base_eval_loss"])
    assert list(line.arms) == [4, 8]
    assert {name: line.rivals[name] for name in ("base + 3 examples", "base, 16 bits")} == {
        model.name: pytest.approx(model.heldout_loss)
        for model in comparison.compare(sizes).table
        if model.name in ("base + 3 examples", "base, 16 bits")
    }
    assert line.to_dict()["against_base"]["8"]["value"] == pytest.approx(losses[1] - line.base_loss)
    (turned,) = learning_curve.compare_settings({name: result[name] for name in ("8 rows", "rank 8")})
    assert (turned.a, turned.b) == (learning_curve.BASE_SETTING, "rank 8")
    changed = result["rank 8"][0].read("metrics.json")["eval_loss"]
    assert turned.value == pytest.approx(changed - losses[1])
    assert learning_curve.compare_settings({}) == []
    rivals = {"base", "base, own template", "base, 16 bits", "base, 16 bits, own template", "base + 3 examples"}
    pairs = {(d.a, d.b) for d in comparison.compare(sizes).differences}
    assert pairs == {(rival, size) for rival in rivals for size in sizes} | {("4 rows", "8 rows")}


def test_the_batch_command_refuses_a_folder_of_another_run(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(series, "execute", lambda *args: pytest.fail("a notebook was executed"))
    out = tmp_path / "out"
    words = ["batch", "--profile", "cpu", "--model", config.model, "--samples", "4", "8", "--out", str(out)]
    for wrong in (["--ranks", "0"], ["--effective-batches", "0"], ["--n-heldout", "100000"]):
        assert __main__.main([*words, *wrong]) == 2
        assert not out.exists()
    settings = Config.from_params(profile="cpu", model=config.model, n_samples=8, rank=2)
    files.write_json(out / "n8-seed0" / "config.json", {"identity": {"config": "x"}, "config": settings.to_dict()})
    assert __main__.main(words) == 2
    assert "rank 2 there, 16 here" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["n8-seed0"]
    assert not RunFolder(out / "n8-seed0").finished
