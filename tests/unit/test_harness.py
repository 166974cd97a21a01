"""The harness command: lm-eval's own numbers for both models, and paired differences on the same samples."""

import importlib.util
import json
from types import SimpleNamespace

import pytest

from qlora_helpers import UserError
from qlora_helpers.__main__ import build_parsers, main
from qlora_helpers.evaluation import harness
from qlora_helpers.files import ROOT

TASKS = ROOT / "tests" / "harness"
installed = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed; requirements-full.txt has it"
)


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Paths of the project's own tasks, which read the project's own rows."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    paths = []
    for name in ("numbers", "echo"):
        text = (TASKS / f"{name}.yaml").read_text("utf-8").replace("DATA", str(TASKS / "numbers.jsonl"))
        (tmp_path / f"{name}.yaml").write_text(text, "utf-8")
        paths.append(str(tmp_path / f"{name}.yaml"))
    return paths


@pytest.fixture(scope="module")
def run(make_run):
    return make_run()


def logged(task, metric, values, reported, kind="none"):
    """Results in the layout of lm-eval, of one metric."""
    samples = [{"doc_id": i, "doc_hash": str(i), "filter": kind, metric: value} for i, value in enumerate(values)]
    stored = {f"{metric},{kind}": reported, f"{metric}_stderr,{kind}": 0.1, "alias": task, "sample_len": len(values)}
    return {"results": {task: stored}, "samples": {task: samples}}


def test_shares_are_compared_in_pairs():
    base, adapter = (logged("t", "acc", values, sum(values) / 40) for values in ([0] * 40, [1] * 30 + [0] * 10))
    (result,) = harness.compare(base, adapter)
    assert (result.task, result.metric, result.base, result.adapter) == ("t", "acc", 0, 0.75)
    assert (result.difference.value, result.difference.answers) == (0.75, 40)
    assert result.difference.remains
    assert "t acc: 0 and 0.75" in str(result)


def test_the_order_of_the_samples_does_not_matter():
    base = logged("t", "acc", [0.5, 0.25, 0.75], 0.5, "strict")
    adapter = logged("t", "acc", [0.5, 0.25, 0.75], 0.5, "strict")
    adapter["samples"]["t"].reverse()
    (result,) = harness.compare(base, adapter)
    assert result.metric == "acc (strict)"
    assert (result.difference.low, result.difference.high) == (0, 0)


@pytest.mark.parametrize("values", [[0, 1], [[0, 1], [1, 1]], [(1.0, 2)] * 2, []])
def test_a_metric_that_is_no_mean_over_samples_has_no_interval(values):
    made = logged("t", "bleu", values, 12.5)
    (result,) = harness.compare(made, made)
    assert (result.base, result.difference) == (12.5, None)
    assert "no interval" in str(result)


def test_other_samples_are_refused():
    base, adapter = logged("t", "acc", [0, 1], 0.5), logged("t", "acc", [0, 1], 0.5)
    adapter["samples"]["t"][0]["doc_hash"] = "another"
    with pytest.raises(UserError, match=r"different samples. Fix:"):
        harness.compare(base, adapter)


def test_without_lm_eval_the_command_says_how_to_get_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    assert main(["harness", str(tmp_path), "--tasks", "arc_easy"]) == 2
    assert "Fix: pip install 'qlora-helpers[harness]'" in capsys.readouterr().err


def test_several_tasks_are_understood():
    words = ["harness", "runs/x", "--tasks", "arc_easy", "my.yaml", "--limit", "5"]
    args = build_parsers()[0].parse_args(words)
    assert (args.tasks, args.limit, args.chat) == (["arc_easy", "my.yaml"], 5, False)
    assert main(["harness", "runs/x", "--tasks", "arc_easy", "--limit", "0"]) == 2


def test_a_task_file_is_a_path_like_any_other(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.yaml").touch()
    loaded = []
    manager = SimpleNamespace(all_tasks=["arc"], load=loaded.extend)
    assert harness._names(manager, ["arc", "~/own.yaml"]) == loaded == ["arc", str(tmp_path / "own.yaml")]
    with pytest.raises(UserError, match=r"^harness: 'a\S+' cannot be used \(.*\). Fix: check the path.$"):
        harness._names(manager, ["a\0"])


@installed
def test_the_numbers_are_lm_evals(run, tasks, capsys):
    """Against lm-eval alone, which loads base model and adapter itself."""
    import lm_eval

    assert main(["harness", str(run.path), "--tasks", *tasks]) == 0
    printed = capsys.readouterr().out
    stored = json.loads((run / "harness.json").read_text("utf-8"))
    by_name = {(result["task"], result["metric"]): result for result in stored["results"]}
    assert set(by_name) == {("numbers", "acc"), ("numbers", "acc_norm"), ("echo", "exact_match"), ("echo", "bleu")}
    model = {"pretrained": run.config().model, "tokenizer": str(run.adapter), "dtype": "float32"}
    for side, more in (("base", {}), ("adapter", {"peft": str(run.adapter)})):
        alone = lm_eval.simple_evaluate("hf", model_args=model | more, tasks=tasks, device="cpu", batch_size=8)
        for (task, metric), result in by_name.items():
            assert result[side] == alone["results"][task][f"{metric},none"], (task, metric, side)
    acc = by_name["numbers", "acc"]
    assert acc["base"] != acc["adapter"]  # else the test could not tell them apart
    assert acc["difference"]["value"] == pytest.approx(acc["adapter"] - acc["base"])
    assert acc["difference"]["answers"] == 20
    assert by_name["echo", "bleu"]["difference"] is None
    assert all(f"\n{task} {metric}: " in printed for task, metric in by_name)


@installed
@pytest.mark.slow
def test_the_limit_is_the_number_of_samples(run, tasks):
    results = harness.evaluate(run, tasks[:1], limit=3)
    assert {result.difference.answers for result in results} == {3}


@installed
@pytest.mark.slow
def test_the_chat_template_changes_the_prompts(run, tasks, monkeypatch):
    import lm_eval

    seen, real = [], lm_eval.simple_evaluate

    def watched(*args, **options):
        results = real(*args, **options)
        seen.append(results["samples"]["numbers"][0]["arguments"][0][0])
        return results

    monkeypatch.setattr(lm_eval, "simple_evaluate", watched)
    harness.evaluate(run, tasks[:1], limit=1, chat=True)
    assert all(prompt.startswith("<|im_start|>user") for prompt in seen)
    assert len(seen) == 2


@installed
@pytest.mark.slow
def test_unknown_tasks_and_missing_data_are_one_line(run, tasks, tmp_path):
    with pytest.raises(UserError, match=r"no task 'arc_eazy'. Did you mean 'arc_easy'\? Fix:"):
        harness.evaluate(run, ["arc_eazy"])
    missing = tmp_path / "missing.yaml"
    missing.write_text((TASKS / "numbers.yaml").read_text("utf-8"), "utf-8")
    with pytest.raises(UserError, match=r"cannot be loaded .*Fix:"):
        harness.evaluate(run, [str(missing)])
