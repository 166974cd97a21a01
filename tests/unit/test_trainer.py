"""A run and the files it writes; interrupted and resumed; faults that must not go unnoticed."""

import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from qlora_helpers import UserError, files, runs
from qlora_helpers.data import cleaning
from qlora_helpers.device import detect
from qlora_helpers.evaluation import losses
from qlora_helpers.evaluation.context import RunContext
from qlora_helpers.evaluation.row_losses import RowLoss, mean_loss, read_losses
from qlora_helpers.models import qlora
from qlora_helpers.planning import compute_dtype
from qlora_helpers.runs import RunFolder
from qlora_helpers.training import callbacks, libraries, qlora_trainer, trainer

METRICS = {
    "train_rows", "steps", "epochs", "train_loss", "eval_loss", "base_eval_loss", "trainable_parameters", "seconds",
    "tokens_per_second", "peak_memory_gib", "eval_seconds", "eval_peak_memory_gib", "seed", "device",
}  # fmt: skip


class Keep(TrainerCallback):
    """Holds on to the model that is trained."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.model = model


class Interrupt(TrainerCallback):
    """Ctrl-C when a step begins."""

    def __init__(self, after):
        self.after = after

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.after:
            raise KeyboardInterrupt


class Count(TrainerCallback):
    """Steps that were computed, not loaded."""

    steps = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.steps += 1


class NeverTrain(TrainerCallback):
    def on_train_begin(self, *args, **kwargs):
        raise AssertionError("trained again")


@pytest.fixture(scope="module")
def config(config):
    """Two epochs of four steps, a held-out loss after every step."""
    return config.replace(epochs=2, eval_steps=1)


@pytest.fixture(scope="module")
def train(config, data, tokenizer, runs):
    """Train into a fresh folder, or into `run`."""

    def run_it(run=None, callbacks=(), rows=data, **changes):
        run = run or RunFolder(runs / f"run{len(list(runs.iterdir()))}")
        return trainer.train(config.replace(**changes), rows, tokenizer, run, callbacks)

    return run_it


@pytest.fixture(scope="module")
def trained(train):
    """The run that most tests look at, and its model."""
    keep = Keep()
    return SimpleNamespace(run=train(callbacks=[keep]), model=keep.model)


def adapter(run):
    return load_file(run.adapter / "adapter_model.safetensors")


def same(a, b):
    """Whether two adapters agree to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def steps(run, key="loss"):
    return [line for line in run.log() if key in line]


def without_timing(values):
    timing = ("seconds", "tokens_per_second", "peak_memory_gib", "train_runtime", "train_tokens_per_second")
    timing += ("eval_seconds", "eval_peak_memory_gib", "peak_gib")
    return {key: value for key, value in values.items() if key not in timing}


def test_metrics(trained, config, data):
    metrics = trained.run.read("metrics.json")
    assert metrics.keys() >= METRICS
    assert metrics["steps"] == config.steps(len(data.train)) == 8
    assert (metrics["train_rows"], metrics["epochs"], metrics["seed"]) == (16, 2, config.seed)
    assert metrics["trainable_parameters"] == 2 * config.rank * (128 + 96)
    logged = [line["loss"] for line in steps(trained.run)]
    assert metrics["train_loss"] == pytest.approx(sum(logged) / len(logged))
    assert min(metrics[key] for key in ("seconds", "tokens_per_second", "peak_memory_gib")) > 0
    assert all(math.isfinite(v) for v in metrics.values() if isinstance(v, float))


@pytest.mark.parametrize(("step", "heldout", "keep_best"), [(3.0, 5.0, False), (5.0, 3.0, False), (5.0, 3.0, True)])
def test_evaluations_time_and_memory_are_apart_from_trainings(train, monkeypatch, step, heldout, keep_best):
    """As on a GPU, where the peak can be forgotten, whichever of a step and held-out losses takes more GiB."""
    now, peak = SimpleNamespace(seconds=0.0), SimpleNamespace(gib=0.0)

    def use(gib, seconds, real):
        def used(*args, **kwargs):
            peak.gib = max(peak.gib, gib)
            now.seconds += seconds
            return real(*args, **kwargs)

        return used

    monkeypatch.setattr(qlora_trainer.Trainer, "training_step", use(step, 1.0, qlora_trainer.Trainer.training_step))
    monkeypatch.setattr(losses, "heldout_losses", use(heldout, 10.0, losses.heldout_losses))
    monkeypatch.setattr(losses, "measure_answers", use(2.0, 100.0, lambda *a: None))
    monkeypatch.setattr(qlora_trainer, "peak_memory_gib", lambda device: peak.gib)
    for module in (trainer, qlora_trainer, callbacks):
        monkeypatch.setattr(module, "forget_peak", lambda device: setattr(peak, "gib", 1.0))
    monkeypatch.setattr(qlora_trainer.time, "perf_counter", lambda: now.seconds)
    metrics = train(epochs=1, keep_best=keep_best, seed=7 + int(step)).read("metrics.json")
    assert (metrics["peak_memory_gib"], metrics["eval_peak_memory_gib"]) == (step, heldout)
    assert (metrics["seconds"], metrics["eval_seconds"]) == (4.0, 110.0)


def test_files(trained, data):
    run = trained.run
    for name in ("config.json", "manifest.json", "log.jsonl", "heldout_losses.jsonl", "answers.jsonl"):
        assert (run / name).stat().st_size
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"):
        assert (run.adapter / name).stat().st_size
    manifest = run.read("manifest.json")
    assert manifest["data"]["train_ids"] == [example.row.id for example in data.train]
    assert manifest["data"]["heldout_fingerprint"] == data.heldout_fingerprint
    assert {"versions", "device", "git_commit", "model"} <= manifest.keys()


def test_a_line_a_step_and_a_gradient_after_every_evaluation(trained):
    lines = steps(trained.run)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["step"] for line in steps(trained.run, "eval_loss")] == list(range(9))
    assert all(line["grad_norm"] > 0 for line in lines)


def test_it_learns(trained):
    metrics = trained.run.read("metrics.json")
    assert metrics["eval_loss"] < metrics["base_eval_loss"]
    first, last = (steps(trained.run, "eval_loss")[i]["eval_loss"] for i in (0, -1))
    assert (first, last) == (metrics["base_eval_loss"], metrics["eval_loss"])


def test_the_adapter_moved_and_the_base_did_not(trained, config):
    saved = adapter(trained.run)
    assert all(p.abs().max() > 0 for name, p in saved.items() if "lora_B" in name)
    fresh = dict(qlora.load_base(config, detect("float32")).named_parameters())
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p
        for name, p in trained.model.named_parameters()
        if ".lora_" not in name
    }
    assert after.keys() == fresh.keys()
    assert all(torch.equal(after[name], fresh[name]) for name in fresh)


def test_the_learning_rate_falls_to_zero(trained, config):
    rates = [line["learning_rate"] for line in steps(trained.run)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.8 * config.learning_rate
    assert rates[-1] <= config.learning_rate / len(rates)


def test_the_saved_adapter_is_the_one_that_was_measured(trained, config, data, device):
    device = detect(config.compute_dtype)
    loaded = qlora.load_adapter(qlora.load_base(config, device), trained.run.adapter)
    again = losses.heldout_losses(loaded, data.heldout, device)
    measured = read_losses(trained.run)
    assert [row.id for row in again] == [row.id for row in measured]
    assert [row.loss_sum for row in again] == pytest.approx([row.loss_sum for row in measured], rel=1e-5)
    ids = torch.tensor([data.heldout[0].input_ids])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trained.model.eval()(ids).logits)


def test_the_base_is_measured_once_for_all_runs(trained, config, data):
    where = losses.baseline_folder(config, data, detect(config.compute_dtype), trained.run.path.parent)
    measured = mean_loss(read_losses(where))
    assert measured == trained.run.read("metrics.json")["base_eval_loss"]
    more = config.replace(n_samples=8, seed=5)
    assert losses.baseline_folder(more, data, detect("float32"), trained.run.path.parent) == where
    other = config.replace(quantization="none")
    assert losses.baseline_folder(other, data, detect("float32"), trained.run.path.parent) != where


def test_a_complete_run_is_not_trained_again(trained, train, capsys):
    before = (trained.run / "metrics.json").read_bytes()
    assert train(trained.run, [NeverTrain()]) == trained.run
    assert (trained.run / "metrics.json").read_bytes() == before
    assert "nothing to train" in capsys.readouterr().out


@pytest.mark.slow
def test_a_damaged_adapter_is_saved_again_from_the_last_checkpoint(trained, train, tmp_path):
    run = RunFolder(shutil.copytree(trained.run.path, tmp_path / "run"))
    weights = run.adapter / "adapter_model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(UserError, match=r"is damaged.*delete .*metrics.json and run again"):
        train(run, [NeverTrain()])
    (run / "metrics.json").unlink()
    count = Count()
    train(run, [count])
    assert count.steps == 0
    assert same(adapter(run), adapter(trained.run))


def test_another_configs_complete_run_is_not_taken_for_ours(trained, train):
    with pytest.raises(UserError):
        train(trained.run, [NeverTrain()], seed=1)


def test_another_configs_cut_off_run_is_kept(train, run):
    with pytest.raises(KeyboardInterrupt):
        train(run, [Interrupt(3)])
    before = (run / "config.json").read_bytes()
    with pytest.raises(UserError):
        train(run, [NeverTrain()], seed=1)
    assert (run / "config.json").read_bytes() == before


def test_a_cut_off_run_ends_like_any_other(trained, train, run, capsys):
    with pytest.raises(KeyboardInterrupt):
        train(run, [Interrupt(5)])
    assert [line["step"] for line in steps(run)] == [1, 2, 3, 4, 5]  # one past the checkpoint
    assert not run.finished
    count = Count()
    train(run, [count])
    assert count.steps == 4
    assert "Resuming from checkpoint-4" in capsys.readouterr().out
    assert same(adapter(run), adapter(trained.run))
    assert [without_timing(line) for line in run.log()] == [without_timing(line) for line in trained.run.log()]
    assert without_timing(run.read("metrics.json")) == without_timing(trained.run.read("metrics.json"))


def test_trained_biases_outlast_a_cut(train, tmp_path):
    """As in the preset of BLOOM: PEFT up to 0.20 forgets them."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    shape = BloomConfig(vocab_size=1100, hidden_size=32, n_layer=2, n_head=4, eos_token_id=1)
    BloomForCausalLM(shape).save_pretrained(tmp_path / "bloom")
    own = {"model": str(tmp_path / "bloom"), "target_modules": ["query_key_value"], "bias": "lora_only"}
    whole, cut = (RunFolder(tmp_path / name / "run") for name in ("whole", "cut"))
    train(whole, **own)
    with pytest.raises(KeyboardInterrupt):
        train(cut, [Interrupt(5)], **own)
    train(cut, **own)
    assert same(adapter(cut), adapter(whole))
    biases = [value for name, value in adapter(whole).items() if name.endswith("query_key_value.base_layer.bias")]
    assert len(biases) == 2
    assert all(value.abs().max() > 0 for value in biases)


def test_a_run_cut_off_while_saving_goes_on_from_the_checkpoint_before(trained, train, run):
    with pytest.raises(KeyboardInterrupt):
        train(run, [Interrupt(7)])
    (run / "checkpoints/checkpoint-6/optimizer.pt").write_bytes(b"half")
    count = Count()
    train(run, [count])
    assert count.steps == 4
    assert same(adapter(run), adapter(trained.run))


def test_a_run_cut_off_after_its_last_step_is_only_finished(trained, train, run, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_save_results", interrupt)
        patch.setattr(qlora_trainer, "peak_memory_gib", lambda device: 987.0)
        with pytest.raises(KeyboardInterrupt):
            train(run)
    count = Count()
    train(run, [count])
    assert count.steps == 0
    assert same(adapter(run), adapter(trained.run))
    assert run.read("metrics.json")["eval_loss"] == trained.run.read("metrics.json")["eval_loss"]
    assert run.read("metrics.json")["peak_memory_gib"] == 987.0  # of the steps, not of what was left to do


def test_the_seed_decides_the_result(trained, train):
    assert same(adapter(train()), adapter(trained.run))
    other = train(seed=1)
    assert not same(adapter(other), adapter(trained.run))
    assert steps(other)[0]["loss"] != steps(trained.run)[0]["loss"]  # other rows come first


def test_how_a_batch_is_split_hardly_matters(train):
    losses = [
        [line["loss"] for line in steps(train(batch_size=b, gradient_accumulation=a, dropout=0.0, epochs=1))]
        for b, a in ((4, 1), (2, 2), (1, 4))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert losses[2] == pytest.approx(losses[0], rel=0.01)


def test_checkpointing_gradients_changes_nothing(train):
    plain, frugal = (train(gradient_checkpointing=g, epochs=1) for g in (False, True))
    want = [line["loss"] for line in steps(plain)]
    assert [line["loss"] for line in steps(frugal)] == pytest.approx(want, rel=0.01)
    assert all(line["grad_norm"] > 0 for line in steps(frugal))


@pytest.mark.parametrize("recipe", [{"lr_scheduler": "cosine", "warmup_ratio": 0.25}, {"lr_scheduler": "constant"}])
def test_the_best_checkpoint_on_the_selection_rows_is_the_result(train, config, tokenizer, recipe):
    # a learning rate this high passes the lowest loss on the way
    chooses = {"keep_best": True, "early_stopping_patience": 2, "learning_rate": 0.5, "save_steps": 50, "epochs": 10}
    rows = cleaning.prepare(config.replace(**chooses), tokenizer)
    assert len(rows.selection) == len(rows.heldout) == 6
    run = train(rows=rows, **chooses, **recipe)
    metrics = run.read("metrics.json")
    logged = [line["eval_loss"] for line in steps(run, "eval_loss")]
    assert len(logged) == metrics["steps"] + 1
    assert min(logged) < logged[-1]
    device = detect(config.compute_dtype)
    base = qlora.load_base(config, device)
    first = mean_loss(losses.heldout_losses(base, rows.selection, device))
    loaded = qlora.load_adapter(base, run.adapter)
    chosen, again = (mean_loss(losses.heldout_losses(loaded, part, device)) for part in (rows.selection, rows.heldout))
    assert (first, chosen) == pytest.approx((logged[0], min(logged[1:])), rel=1e-5)
    assert again == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert run.read("manifest.json")["data"]["selection_ids"] == [example.row.id for example in rows.selection]
    assert not (run / "evaluations.jsonl").exists()


def noise(level=5.0):
    """A substitute for `heldout_losses`: rows of one token, whose losses say nothing about the weights."""
    draws = np.random.default_rng(1)

    def measured(model, examples, device, batch_size=1):
        return [RowLoss(example.row.id, level + draws.normal(), 1, 1) for example in examples]

    return measured


@pytest.mark.parametrize("chosen_on", ["selection rows", "the other half"])
def test_the_best_of_many_noisy_losses_is_not_reported(train, config, tokenizer, monkeypatch, capsys, chosen_on):
    monkeypatch.setattr(losses, "heldout_losses", noise())
    monkeypatch.setattr(losses, "measure_answers", lambda *args: None)
    own = {"n_heldout": 60, "keep_best": True, "epochs": 5}
    rows = cleaning.prepare(config.replace(**own), tokenizer)
    if chosen_on == "the other half":
        rows = dataclasses.replace(rows, selection=[])
    run = train(rows=rows, **own)
    reported = run.read("metrics.json")["eval_loss"]
    assert reported == mean_loss(read_losses(run))
    error = 1 / math.sqrt(60)
    assert reported > 5 - error
    assert min(line["eval_loss"] for line in steps(run, "eval_loss")) < 5 - 1.5 * error
    assert ("judged by the checkpoint that the other half" in capsys.readouterr().out) == (not rows.selection)


def test_rows_that_judge_cannot_choose(train, data):
    with pytest.raises(UserError, match="chosen on"):
        train(rows=dataclasses.replace(data, selection=data.heldout), keep_best=True)


def test_a_cut_off_run_still_knows_its_best(train, run):
    recipe = {"keep_best": True, "learning_rate": 0.5, "lr_scheduler": "constant", "save_steps": 50}
    whole = train(**recipe)
    with pytest.raises(KeyboardInterrupt):
        train(run, [Interrupt(5)], **recipe)
    train(run, **recipe)
    assert same(adapter(run), adapter(whole))
    assert without_timing(run.read("metrics.json")) == without_timing(whole.read("metrics.json"))
    for name in ("evaluations.jsonl", "heldout_losses.jsonl"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    seen = files.read_jsonl(run / "evaluations.jsonl")
    assert [line["step"] for line in seen[::6]] == list(range(1, 9))
    assert {(line["id"], line["loss_sum"]) for line in seen} >= {(row.id, row.loss_sum) for row in read_losses(run)}


def test_keeping_the_best_logs_each_step_once(train):
    run = train(keep_best=True, learning_rate=0.5)
    assert [line["step"] for line in steps(run, "eval_loss")] == list(range(9))
    assert [line["step"] for line in steps(run)] == list(range(1, 9))


def test_early_stopping_stops(train):
    run = train(early_stopping_patience=1, learning_rate=1.0, lr_scheduler="constant", epochs=10)
    held = [line["eval_loss"] for line in steps(run, "eval_loss")[1:]]
    assert run.read("metrics.json")["steps"] == len(held) < 40
    assert held[-1] >= min(held[:-1])


def test_a_second_gpu_does_not_double_the_batch(config, data, device, tokenizer, tmp_path, monkeypatch, capsys):
    class TwoGpus(libraries.SFTConfig):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 2

    monkeypatch.setattr(libraries, "SFTConfig", TwoGpus)
    context = RunContext(config, data, tokenizer, device, RunFolder(tmp_path))
    model = qlora.attach_lora(qlora.load_base(config, device), config)
    built = trainer.build_trainer(model, context)
    assert built.args.train_batch_size == config.batch_size
    assert "2 GPUs are visible. This run uses the first" in capsys.readouterr().out


def test_training_on_all_tokens(train, config, tokenizer):
    everything = config.replace(train_on="all", epochs=1)
    run = train(rows=cleaning.prepare(everything, tokenizer), train_on="all", epochs=1)
    assert len(steps(run)) == 4


@pytest.mark.parametrize("loss", [0.0, float("nan"), float("inf")])
def test_a_loss_that_teaches_nothing_stops_the_run(loss):
    with pytest.raises(UserError, match="step 3") as caught:
        trainer.Guard().on_log(None, SimpleNamespace(global_step=3), None, logs={"loss": loss})
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("logs", [{"loss": 1.5}, {"eval_loss": 0.0}, {}, None])
def test_other_lines_do_not(logs):
    trainer.Guard().on_log(None, SimpleNamespace(global_step=3), None, logs=logs)


def test_an_adapter_that_does_not_move_is_no_result(train, run):
    with pytest.raises(UserError, match="initial weights"):
        train(run, learning_rate=0.0, epochs=1)
    assert not run.finished


def test_a_folder_in_use_is_refused(train, run):
    with runs.lock(run), pytest.raises(UserError, match="in use"):
        train(run)
    assert not (run / "config.json").exists()


def test_the_log_is_valid_json(trained):
    for line in (trained.run / "log.jsonl").read_text("utf-8").splitlines():
        json.loads(line)


def test_a_base_that_computes_otherwise_is_measured_for_itself(config, data, tmp_path):
    """Without a GPU, a run that trains biases has its base in float32: losses in bf16 are not its own."""
    own = config.replace(compute_dtype="bfloat16")
    here = [compute_dtype.device_for(own.replace(bias=bias)) for bias in ("none", "all")]
    assert [device.dtype for device in here] == ["bfloat16", "float32"]
    plain, biased = (losses.baseline_folder(config, data, device, tmp_path) for device in here)
    assert plain.name != biased.name


def test_peak_memory_counts_from_the_first_step_on(config, data, tokenizer, run, device, monkeypatch):
    """After the library has prepared the model: FSDP then has sharded it, and the whole one is only cached."""
    seen = []
    monkeypatch.setattr(callbacks, "forget_peak", lambda given: seen.append((given, ready.lr_scheduler is not None)))
    built = qlora.attach_lora(qlora.load_base(config, device), config)
    ready = trainer.build_trainer(built, RunContext(config, data, tokenizer, device, run))
    assert ready.lr_scheduler is None
    ready.train()
    assert seen == [(device, True)]
