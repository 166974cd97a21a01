"""What a run has to beat: forms of its base model, measured once, and a headline against the best of them."""

import json
import random
from dataclasses import replace
from itertools import permutations

import pytest

from qlora_helpers import files
from qlora_helpers.data import cleaning, prompts
from qlora_helpers.evaluation import comparison, losses, report, rivals
from qlora_helpers.evaluation.context import RunContext
from qlora_helpers.evaluation.row_losses import OWN_TEMPLATE, read_losses
from qlora_helpers.experiments import matrix
from qlora_helpers.models import qlora
from qlora_helpers.runs import RunFolder
from qlora_helpers.training import trainer

FORMS = ("base", "base, own template", "base, 16 bits", "base, 16 bits, own template")


@pytest.fixture(scope="module")
def config(config):
    """Held-out rows that are whole in both prompt formats, and little of everything else."""
    return config.replace(max_length=512, n_samples=4, n_heldout=4, n_answers=2, max_new_tokens=2)


@pytest.fixture
def context(config, data, tokenizer, device, tmp_path):
    """A run that has not begun."""
    return RunContext(config, data, tokenizer, device, RunFolder(tmp_path / "exp1"))


def test_every_form_of_the_base_model_is_measured_once_and_shared(config, tokenizer, device, tmp_path, monkeypatch):
    """Three runs load the base model three times in 4 bits, and once in 16."""
    loaded = []
    real = qlora.load_base

    def load_base(config, *others):
        loaded.append(config.quantization)
        return real(config, *others)

    for module in (qlora, trainer):
        monkeypatch.setattr(module, "load_base", load_base)
    sizes = {"a": config, "b": config.replace(n_samples=8)}
    done = matrix.train_missing(matrix.plan_runs({**sizes, "c": config.replace(rank=2)}, tmp_path))
    assert loaded == ["none", "nf4", "nf4", "nf4"]
    manifests = [run.read("manifest.json") for (run,) in done.values()]
    assert all(tuple(m["rivals"]) == FORMS for m in manifests)
    assert {m["baseline"] for m in manifests} == {m["rivals"]["base"] for m in manifests}
    assert len({tuple(m["rivals"].values()) for m in manifests}) == 1
    assert len(list(tmp_path.glob("base-*"))) == 4

    rows = cleaning.prepare(config, tokenizer).heldout
    own = list(prompts.encode([example.row for example in rows], config.replace(template="auto"), tokenizer))
    for name, examples in (("base, 16 bits", rows), ("base, 16 bits, own template", own)):
        want = losses.heldout_losses(real(config.replace(quantization="none"), device), examples, device)
        got = read_losses(RunFolder(tmp_path / manifests[0]["rivals"][name]))
        assert [row.id for row in got] == [example.row.id for example in rows]
        assert [row.loss_sum for row in got] == pytest.approx([row.loss_sum for row in want], rel=1e-4)
        assert all(row.bytes for row in got)


def test_a_run_in_16_bits_has_no_rival_in_4(context):
    half = replace(context, config=context.config.replace(quantization="none"))
    assert rivals.in_16_bits(half) == rivals.Rivals()
    found = rivals.of_base(qlora.load_base(half.config, half.device), half)
    assert tuple(found.folders) == FORMS[:2]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"template": "auto"}, "the run already uses the model's own chat template"),
        ({"train_on": "all"}, "the template's own tokens count in the loss"),
        ({"max_length": 8}, "no held-out row is whole in both prompt formats"),
    ],
)
def test_what_is_no_rival_is_named_with_the_reason(context, tokenizer, capsys, changes, reason):
    config = context.config.replace(**changes)
    short = replace(
        context.data, heldout=list(prompts.encode([e.row for e in context.data.heldout], config, tokenizer))
    )
    there = replace(context, config=config, data=short)
    found = rivals.of_base(qlora.load_base(config, context.device), there)
    assert tuple(found.folders) == ("base",)
    assert reason in found.absent["base, own template"]
    said = f"base, own template: not measured: {found.absent['base, own template']}." in capsys.readouterr().out
    assert said is (config.template != "auto")  # then nothing is missing: the base model is in this form already


def test_a_tokenizer_without_a_chat_template_has_no_form_of_its_own(context, make_tokenizer):
    plain = make_tokenizer()
    plain.chat_template = None
    found = rivals.of_base(qlora.load_base(context.config, context.device), replace(context, tokenizer=plain))
    assert found.absent == {"base, own template": "the model has no chat template"}


def test_a_base_model_that_does_not_fit_in_16_bits_is_named_and_not_loaded(context, capsys, monkeypatch):
    monkeypatch.setattr(qlora, "load_base", None)
    small = replace(context, device=replace(context.device, free_gib=1e-6))
    found = rivals.in_16_bits(small)
    assert set(found.absent) == set(FORMS[2:])
    assert "GiB of memory, and 0.0 are there" in found.absent["base, 16 bits"]
    assert "base, 16 bits: not measured: it needs" in capsys.readouterr().out
    assert found.folders == {}


def test_a_row_that_one_format_cuts_is_left_out_of_the_other(context, tokenizer):
    """Held-out rows cut at 60 tokens: only the whole ones are measured in the model's own template."""
    rows = [example.row for example in context.data.heldout]
    lengths = sorted(len(example.input_ids) for example in context.data.heldout)
    cut = context.config.replace(max_length=lengths[1])
    data = replace(context.data, heldout=list(prompts.encode(rows, cut, tokenizer)))
    _, shown = rivals.own_template(cut, data, tokenizer)
    assert {e.row.id for e in shown.heldout} == {e.row.id for e in data.heldout if not e.cut}
    assert 0 < len(shown.heldout) < len(rows)


ROWS = 30


def planted(folder, config, name="exp1", draw=0, rows=ROWS, questions=5, answers=5, **means):
    """A finished run with planted mean losses, and its rivals beside it.

    `means` are the mean losses of the run and of the base model's forms. All share the noise of their rows.
    """
    run = RunFolder(folder / name)

    def write(where, mean, count, file="heldout_losses.jsonl"):
        noise, own = random.Random(0), random.Random(str(mean))
        lines = [(10 + i, mean + noise.gauss(0, 0.3) + own.gauss(0, 0.01)) for i in range(count)]
        made = [{"id": str(i), "loss_sum": n * loss, "tokens": n, "bytes": 4 * n} for i, (n, loss) in enumerate(lines)]
        files.write_jsonl(where / file, made)

    named = {form: f"base-{number}" for number, form in enumerate(FORMS) if form in means}
    for form, base in named.items():
        count = rows if form in OWN_TEMPLATE.values() else ROWS
        write(RunFolder(folder / base), means[form], count)
    write(RunFolder(folder / "base-0"), 3.0, questions, "general_losses.jsonl")
    write(run, means["run"], ROWS)
    write(run, 3.1, questions, "general_losses.jsonl")
    answer = {"prompt": "p", "reference": "r", "answer": "r", "stopped": True, "invented": False, "thought": ""}
    files.write_jsonl(run / "answers.jsonl", [answer] * answers)
    own = config.replace(seed=draw, margin=means.get("margin"))
    files.write_json(run / "config.json", {"identity": {}, "config": own.to_dict()})
    data = {"heldout_fingerprint": "x", "source_fingerprint": "y", "source": "rows", "train_ids": [f"{draw}"]}
    data["counts"] = {"usable, not asked for": means.get("left", 9)}
    manifest = {"data": data, "baseline": "base-0", "rivals": named, "versions": {"torch": "2"}}
    manifest["device"] = {"name": "a CPU", "dtype": "float32", "reason": "no GPU"}
    manifest["model"] = {"name": "tiny", "revision": None}
    files.write_json(run / "manifest.json", manifest)
    numbers = dict.fromkeys((*comparison.MEANS, "peak_memory_gib"), 1.0) | {"seed": draw}
    files.write_json(run / "metrics.json", numbers)
    return run


def test_better_than_4_bits_but_worse_than_16_is_worse(config, tmp_path):
    """The first sentence of the report says so, and the two lines say what was lost and won back."""
    run = planted(tmp_path, config, run=2.2, **{"base": 2.4, "base, 16 bits": 2.0})
    result = comparison.compare({"exp1": [run]})
    assert {(d.a, d.verdict) for d in result.differences} == {("base", "better"), ("base, 16 bits", "worse")}
    assert result.best_rival == {"exp1": "base, 16 bits"}
    (headline,) = report.headlines(result)
    assert headline.startswith("exp1 is worse than “base, 16 bits”, the best of 2 rivals (+0.")
    assert report.markdown(result, []).splitlines()[2] == f"- {headline}."
    cost, won = report.quantizing(result)
    assert cost.startswith("What quantizing cost: base is worse than “base, 16 bits” (+0.")
    assert won.startswith("What training won back: exp1 is better than base (-0.")
    assert report.verdicts(result) == [headline, cost, won]


@pytest.mark.parametrize("order", list(permutations(range(4)))[::5])
def test_the_best_rival_is_the_one_with_the_lowest_loss(config, tmp_path, order):
    run = planted(
        tmp_path, config, run=2.0, **{form: 2.1 + 0.1 * place for form, place in zip(FORMS, order, strict=True)}
    )
    result = comparison.compare({"exp1": [run]})
    assert result.best_rival["exp1"] == FORMS[order.index(0)]
    assert [d.a for d in result.headlines] == [FORMS[order.index(0)]]
    json.dumps(result.to_dict(), allow_nan=False)
    assert comparison.Comparison.from_dict(json.loads(json.dumps(result.to_dict()))).headlines == result.headlines


def test_rivals_on_fewer_rows_are_compared_on_these_rows(config, tmp_path):
    """The rows of the own template are 12 of 30; the best rival is chosen on them, and the sentence says so."""
    run = planted(tmp_path, config, run=2.0, rows=12, **dict.fromkeys(FORMS[:3], 2.5), **{FORMS[3]: 2.1})
    result = comparison.compare({"exp1": [run]})
    assert {d.a: d.rows for d in result.differences} == {FORMS[0]: 30, FORMS[1]: 12, FORMS[2]: 30, FORMS[3]: 12}
    assert result.best_rival["exp1"] == FORMS[3]
    tokens = sum(10 + i for i in range(12))
    assert f"; 12 of 30 held-out rows with {tokens} tokens" in report.headlines(result)[0]


def test_all_verdicts_of_a_report_are_one_family(config, tmp_path):
    """Each interval is wider than that of the same difference alone."""
    means = dict(zip(FORMS, (2.4, 2.3, 2.2, 2.1), strict=True))
    runs = {name: [planted(tmp_path, config, name, run=loss, **means)] for name, loss in (("a", 2.0), ("b", 1.9))}
    result = comparison.compare(runs)
    every = [*result.differences, *result.forgetting, result.quantizing]
    assert len(every) == 4 * 2 + 1 + 2 + 1
    assert {d.family for d in every} == {result.family} == {len(every)}
    assert f"all {len(every)} verdicts" in report.basis(result)
    (alone,) = comparison.compare({"a": runs["a"]}).headlines
    assert alone.high - alone.low < result.headlines[0].high - result.headlines[0].low
    assert result.rose == {"a": 5, "b": 5}
    assert "it rose on 5 of them" in report.forgetting(result)[0]


def test_effects_within_the_margin_are_the_same(config, tmp_path):
    run = planted(tmp_path, config, run=2.0, base=2.0 + 1e-9, margin=0.2)
    assert [d.verdict for d in comparison.compare({"exp1": [run]}).differences] == ["the same"]
    assert [d.verdict for d in comparison.compare({"exp1": [run]}, 1e-4).differences] == ["not distinguishable"]


@pytest.mark.parametrize(("answers", "words"), [(4, "1.00"), (5, "1.00 (1.00 to 1.00)")])
def test_four_answers_have_no_interval(config, tmp_path, answers, words):
    run = planted(tmp_path, config, run=2.0, base=2.1, answers=answers)
    result = comparison.compare({"exp1": [run]})
    assert f"| exp1 | {words} |" in report.text_table_markdown(result)
    text = report.markdown(result, [])
    assert ("4 held-out questions, too few for intervals" in text) is (answers == 4)


def test_answers_are_compared_in_one_family_and_with_references_at_the_limit(config, tokenizer, tmp_path):
    """Two runs and the base model: three pairs with seven metrics each, and two limits of tokens."""
    runs = {}
    for name, limit in (("a", 2), ("b", 500)):
        run = planted(tmp_path, config.replace(max_new_tokens=limit), name, run=2.0, base=2.1)
        runs[name] = [run]
        tokenizer.save_pretrained(run.adapter)
    answer = {"reference": "It is a long way.", "stopped": True, "invented": False, "thought": "", "score": 1.0}
    for where, text in ((tmp_path / "base-0", "No."), (runs["a"][0], "It is"), (runs["b"][0], "It is a long way.")):
        rows = [answer | {"prompt": str(i), "answer": text, "outcome": "right"} for i in range(6)]
        files.write_jsonl(where / "answers.jsonl", rows)
    result = comparison.compare(runs)
    assert [(pair.a, pair.b) for pair in result.answer_differences] == [("base", "a"), ("base", "b"), ("a", "b")]
    metrics = [one for pair in result.answer_differences for one in pair.metrics]
    assert {one.family for one in metrics} == {len(metrics)} == {3 * 8}
    assert [one.metric for one in metrics[:8]][-1] == "score"
    assert metrics[-8].metric == "ROUGE-L"
    assert metrics[-8].b == 1 > metrics[-8].a
    cut, whole = result.at_limit.values()
    assert list(result.at_limit) == [f"reference at the limit, {limit} tokens" for limit in (2, 500)]
    assert cut["length"].value < whole["length"].value == 1
    again = comparison.Comparison.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False)))
    assert again.answer_differences == result.answer_differences
    assert again.to_dict() == result.to_dict()
    files.write_jsonl(runs["b"][0] / "answers.jsonl", rows[:4])
    fewer = comparison.compare(runs)
    assert [(pair.a, pair.b) for pair in fewer.answer_differences] == [("base", "a")]
    assert fewer.answered == 4
    assert all(one.low == -float("inf") for one in fewer.at_limit["reference at the limit, 500 tokens"].values())


def test_a_checkpoint_chosen_by_cross_fitting_is_named(config, tmp_path):
    run = planted(tmp_path, config, run=2.0, base=2.1)
    assert not comparison.compare({"exp1": [run]}).table[-1].cross_fitted
    files.write_jsonl(run / "evaluations.jsonl", [])
    assert comparison.compare({"exp1": [run]}).table[-1].cross_fitted


def test_a_draw_of_rows_counts_as_a_seed(config, tmp_path):
    """Three draws are one experiment, its arms are labeled by draw and seed, and the report says what they cover."""
    runs = [planted(tmp_path, config, f"d{draw}", draw=draw, run=2.0 + 0.01 * draw, base=2.2) for draw in range(3)]
    assert comparison.group(runs) == {"d0": runs}
    assert comparison.arm("d0", runs).labels == (0, 1, 2)
    result = comparison.compare({"d0": runs})
    assert result.table[-1].draws == 3
    assert "d0: 3 draws of 1 training row, one seed each" in report.scope(result)
    stored = runs[1].read("config.json")
    stored["config"] |= {"seed": 0, "draw": 0}
    files.write_json(runs[1] / "config.json", stored)  # the same draw and seed again is no other one
    assert comparison.group(runs) == {"d0": [runs[0], runs[2]], "d1": [runs[1]]}


def test_results_of_an_older_version_are_read():
    """They name no rivals, so that no headline and no cost of quantizing is written."""
    result = comparison.read(files.ROOT / "results" / "h100-smollm2-fp16")
    assert (result.headlines, result.quantizing, result.family) == ([], None, 1)
    assert len(report.verdicts(result)) == len(result.differences)
    assert "it rose on" not in report.forgetting(result)[0]
    assert "these adapters only" in report.scope(result)
