"""Rows that are read while they are trained on: the same run as with rows in memory, and no held-out row trained."""

import contextlib
import json
import os
import pickle
import random
import socket
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback

from qlora_helpers import UserError, distributed
from qlora_helpers.__main__ import main
from qlora_helpers.config import Config
from qlora_helpers.data import cleaning, prompts, sources, streaming
from qlora_helpers.data.cleaned import Data
from qlora_helpers.data.leaks import HeldOut
from qlora_helpers.models import hub
from qlora_helpers.runs import RunFolder
from qlora_helpers.training import batches, cuda_graphs, paths, trainer
from qlora_helpers.training.cuda_graphs import Passes
from qlora_helpers.training.paths import Choice
from qlora_helpers.training.qlora_trainer import QloraTrainer

WORDS = [a + b + c for a in "bdfglmprt" for b in "aeiou" for c in ("mp", "lt", "sk", "rm", "x")]


def made(number, seed=0):
    """Rows of random words, unlike each other."""
    rng = random.Random(seed)
    text = lambda n: " ".join(rng.choices(WORDS, k=n))  # noqa: E731
    return [{"instruction": text(8), "output": text(12)} for _ in range(number)]


@pytest.fixture(scope="module")
def streamed(config, tmp_path_factory):
    """16 of 60 rows, in 4 steps."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made(60)), "utf-8")
    return config.replace(dataset=str(path), streaming=True, few_shot=False, n_answers=0, dropout=0.0)


@pytest.fixture
def small_head(monkeypatch):
    """A head of 20 rows, so that most rows of a small file come after it."""
    monkeypatch.setattr(streaming, "HEAD", 20)
    monkeypatch.setattr(streaming, "HEAD_SHARE", 1)


class Interrupt(TrainerCallback):
    """Ctrl-C when step 4 begins."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def losses(run):
    return [line["loss"] for line in run.log() if "loss" in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of all runs, which share the losses of the base model."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(streamed, tokenizer, folder):
    """A finished streamed run, and its data."""
    data = cleaning.prepare(streamed, tokenizer)
    return trainer.train(streamed, data, tokenizer, RunFolder(folder / "streamed")), data


def test_a_streamed_run_has_the_losses_of_the_same_rows_in_memory(run, streamed, tokenizer, folder, monkeypatch):
    finished, data = run
    in_memory = Data(list(data.trained_on), data.heldout, data.cleaned)
    monkeypatch.setattr(QloraTrainer, "_get_train_sampler", lambda self, rows=None: SequentialSampler(rows))
    plain = trainer.train(streamed, in_memory, tokenizer, RunFolder(folder / "plain"))
    assert losses(plain) == losses(finished)
    assert len(losses(plain)) == 4
    names = ("train_rows", "eval_loss", "base_eval_loss", "steps")
    assert [plain.read("metrics.json")[n] for n in names] == [finished.read("metrics.json")[n] for n in names]


def test_a_streamed_run_of_recorded_passes_is_the_librarys(run, streamed, tokenizer, folder, monkeypatch):
    """On a GPU, these passes are replayed from graphs of the lengths that rows in memory would have."""
    finished, data = run
    asked = []

    def choose(model, device, backward, wanted, rows, lengths, passes_left):
        asked.append((lengths, passes_left))
        return Passes(model, device, backward), Choice("graphs", "for this test")

    monkeypatch.setattr(paths, "choose", choose)
    own = trainer.train(streamed, cleaning.prepare(streamed, tokenizer), tokenizer, RunFolder(folder / "passes"))
    longest = max(len(example.input_ids) for example in data.trained_on)
    assert asked == [(cuda_graphs.lengths_for(longest), 4 * streamed.gradient_accumulation)]
    assert losses(own) == pytest.approx(losses(finished), rel=1e-4)
    assert own.read("manifest.json")["training_path"]["path"] == "graphs"


def test_the_first_pass_finds_the_longest_row_and_the_largest_token(run):
    _, data = run
    in_memory = Data(list(data.trained_on), data.heldout, data.cleaned)
    assert paths._longest_and_largest(data) == paths._longest_and_largest(in_memory)


def test_an_interrupted_streamed_run_ends_like_an_undisturbed_one(run, streamed, tokenizer, folder, capsys):
    finished, data = run
    cut = RunFolder(folder / "cut")
    with contextlib.suppress(KeyboardInterrupt):
        trainer.train(streamed, data, tokenizer, cut, [Interrupt()])
    again = cleaning.prepare(streamed, tokenizer)
    trainer.train(streamed, again, tokenizer, cut)
    assert "Resuming from checkpoint-2." in capsys.readouterr().out
    whole, resumed = (load_file(run.adapter / "adapter_model.safetensors") for run in (finished, cut))
    assert all(whole[name].equal(resumed[name]) for name in whole)
    assert losses(cut) == losses(finished)


def test_held_out_rows_and_their_copies_are_never_trained_on(streamed, tokenizer, write_rows, small_head):
    rows = made(40)
    copies = [
        {"instruction": "Again: " + a["instruction"], "output": b["output"]}
        for a, b in zip(rows, made(40, 1), strict=True)
    ]
    answers = [{"instruction": a["instruction"], "output": b["output"]} for a, b in zip(made(40, 2), rows, strict=True)]
    own = streamed.replace(dataset=write_rows(rows + rows + copies + answers), n_samples=100, n_selection=3)
    own = own.replace(keep_best=True)
    data = cleaning.prepare(own, tokenizer)
    held = [example.row for example in [*data.heldout, *data.selection]]
    trained = [example.row for example in data.trained_on]
    assert (len(data.heldout), len(data.selection), len(trained)) == (6, 3, 100)
    assert not {row.question["content"] for row in held} & {row.question["content"] for row in trained}
    assert not {row.answer for row in held} & {row.answer for row in trained}
    counts = data.to_manifest()["counts"]
    assert counts[f"skipped: {streaming.HELD_OUT}"] == 18  # each is there twice
    assert counts["rows read"] >= 100 + sum(n for reason, n in counts.items() if "skipped" in reason)


def test_a_search_for_leaks_remembers_no_row(write_rows):
    """However long a stream is, its rows take no memory."""
    short = [{**row, "output": " ".join(row["output"].split()[:2])} for row in made(200)]
    rows = sources.load(Config(dataset=write_rows([*made(200, 1), *short]))).rows
    held_out = HeldOut(rows, 0.7)
    held_out.add(rows[0])
    held_out.add(rows[-1])
    size = len(pickle.dumps(held_out))
    assert not any(held_out.leak(row) for row in rows[1:-1])
    assert len(pickle.dumps(held_out)) < 1.1 * size


def test_the_head_is_split_like_the_whole_of_a_small_data_set(run, streamed, tokenizer):
    plain = cleaning.prepare(streamed.replace(streaming=False), tokenizer)
    assert run[1].heldout_fingerprint == plain.heldout_fingerprint


def test_other_draws_train_other_rows_of_the_same_source(run, streamed, tokenizer):
    other = cleaning.prepare(streamed.replace(seed=1), tokenizer)
    assert other.heldout_fingerprint == run[1].heldout_fingerprint
    assert other.source_fingerprint == run[1].source_fingerprint
    assert other.to_manifest()["train_ids"] != run[1].to_manifest()["train_ids"]


def test_a_row_changed_after_the_head_makes_another_run(streamed, tokenizer, write_rows, small_head):
    rows = made(60)
    before = cleaning.prepare(streamed.replace(dataset=write_rows(rows)), tokenizer)
    rows[-1]["output"] = rows[-1]["output"][::-1]
    after = cleaning.prepare(streamed.replace(dataset=write_rows(rows)), tokenizer)
    assert before.heldout_fingerprint == after.heldout_fingerprint
    assert before.source_fingerprint != after.source_fingerprint
    assert streamed.identity != streamed.replace(streaming=False).identity


@pytest.mark.parametrize("processes", [2, 3])
def test_the_shares_of_the_processes_are_all_rows_once(run, streamed, processes, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    seen = []
    for rank in range(processes):
        monkeypatch.setenv("RANK", str(rank))
        rows = batches.StreamedRows(run[1].trained_on)
        for start in range(0, len(rows), 6):
            batch = [rows[number] for number in range(start, min(start + 6, len(rows)))]
            seen += batches.Share(lambda own: own)(batch)
    assert sorted(row["input_ids"] for row in seen if len(row["input_ids"]) > 2) == sorted(
        example.input_ids for example in run[1].trained_on
    )


def test_rows_are_found_by_number_in_any_order(run):
    rows = batches.StreamedRows(run[1].trained_on)
    whole = [batches.as_features(example) for example in run[1].trained_on]
    assert [rows[number] for number in (0, 3, 15, 2)] == [whole[number] for number in (0, 3, 15, 2)]


GOOD = made(30, 5)
ROWS = st.lists(
    st.sampled_from([*GOOD, {"instruction": "", "output": ""}, {"instruction": "Same words", "output": "same words"}, 7,
                     {"instruction": "Is a marker a turn?", "output": "### Human: yes, it is one"}]),
    max_size=12,
)  # fmt: skip


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ROWS)
def test_every_row_read_is_trained_on_held_out_or_counted_with_a_reason(streamed, tokenizer, write_rows, rows):
    own = streamed.replace(dataset=write_rows([*made(20, 7), *rows]), n_samples=10)
    data = cleaning.prepare(own, tokenizer)
    seen = streaming.Seen()
    usable = [example.row.id for example in data.stream.usable(seen)]
    assert seen.read == 20 + len(rows)
    assert seen.read == len(usable) + sum(seen.skipped.values())
    assert seen.skipped[streaming.HELD_OUT] >= 6
    assert not {example.row.id for example in data.heldout} & set(usable)
    assert data.counts()["usable, not asked for"] == (len(usable) > 10)


def test_reasons_that_quote_rows_are_counted_together_after_many():
    seen = streaming.Seen()
    for number in range(1000):
        seen.skip(f"unknown role {number}")
    assert (len(seen.skipped), seen.skipped.total()) == (streaming.REASONS + 1, 1000)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_samples": None}, "n_samples=None .* Fix: n_samples=N"),
        ({"epochs": 2}, "epochs=2 .* Fix: epochs=1"),
        ({"sampling": "group_by_length"}, "sampling=group_by_length .* Fix: sampling=random"),
        ({"group_by": "source"}, "group_by .* Fix: leave it out"),
        ({"rehearsal": 0.5}, "rehearsal .* Fix: rehearsal=0"),
        ({"dataset": "python-stdlib"}, "python-stdlib .* Fix: streaming=false"),
    ],
)
def test_settings_that_need_all_rows_are_refused_in_one_line(streamed, tokenizer, changes, words):
    with pytest.raises(UserError, match=f"^streaming: {words}") as caught:
        cleaning.prepare(streamed.replace(**changes), tokenizer)
    assert "\n" not in str(caught.value)


def test_the_first_pass_reads_no_more_rows_than_it_needs(streamed, tokenizer, write_rows, small_head, monkeypatch):
    """Rows are shuffled in a buffer, and tokenized in batches."""
    taken = []

    def records(config):
        for item in of_file(config):
            taken.append(item)
            yield item

    monkeypatch.setattr(streaming, "BUFFER", 30)
    monkeypatch.setattr(prompts, "BATCH", 10)
    data = cleaning.prepare(streamed.replace(dataset=write_rows(made(400))), tokenizer)
    of_file = streaming._records
    monkeypatch.setattr(streaming, "_records", records)
    seen = data.seen
    assert 16 + seen.skipped.total() <= seen.read <= 16 + seen.skipped.total() + 10
    assert seen.read <= len(taken) <= seen.read + 30 + 1
    assert not seen.ends


def test_a_stream_with_too_few_rows_is_refused_before_training(streamed, tokenizer, tmp_path):
    own = streamed.replace(n_samples=55)
    data = cleaning.prepare(own, tokenizer)
    with pytest.raises(
        UserError, match=r"but 54 usable in the stream \(60 read; 6 × held out.*Fix: n_samples=54 or less"
    ):
        trainer.train(own, data, tokenizer, RunFolder(tmp_path / "run"))
    assert not list(tmp_path.glob("base-*"))


def test_a_folder_with_a_test_split_is_refused(streamed, tokenizer, tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made(30)), "utf-8")
    own = streamed.replace(dataset=str(tmp_path))
    with pytest.raises(UserError, match=r"has a test split.* Fix: split=train"):
        cleaning.prepare(own, tokenizer)
    assert len(list(cleaning.prepare(own.replace(split="train"), tokenizer).trained_on)) == 16


@pytest.mark.parametrize("command", [["run", "--samples", "8", "16"], ["batch", "--samples", "8"]])
def test_commands_that_read_all_rows_refuse_a_stream_before_they_write(streamed, tmp_path, capsys, command):
    settings = ["--model", streamed.model, "--dataset", streamed.dataset, "--n-heldout", "6", "--profile", "cpu"]
    assert main([*command, *settings, "--streaming", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        "error: streaming: this command reads all rows. Fix: use train, or streaming=false.\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_data_set_on_the_hub_is_streamed(streamed, tokenizer, monkeypatch):
    import datasets

    asked = []

    def load(name, subset, **options):
        asked.append((name, subset, options))
        return iter(made(60))

    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load)
    data = cleaning.prepare(streamed.replace(dataset="somebody/rows", dataset_revision="abc"), tokenizer)
    assert len(list(data.trained_on)) == 16
    assert asked[0] == ("somebody/rows", None, {"revision": "abc", "split": "train", "streaming": True})


@pytest.mark.slow
def test_two_processes_train_a_stream_like_one(run, streamed, tmp_path):
    one, _ = run
    words = [part for name, value in streamed.params.items() if value is not None for part in option(name, value)]
    config_file = str(distributed.CONFIGS / "ddp.yaml")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    launch = ["accelerate.commands.launch", "--config_file", config_file, "--main_process_port", port]
    out = RunFolder(tmp_path / "two")
    subprocess.run(
        [sys.executable, "-m", *launch, "-m", "qlora_helpers", "train", "--out", str(out.path), *words],
        check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert losses(out) == pytest.approx(losses(one), abs=1e-5)
    assert out.read("manifest.json")["processes"] == 2
    assert out.identity() == one.identity()


def option(name, value):
    """A setting as it is written on a command line."""
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag[2:]]
    return [flag, ",".join(value) if isinstance(value, list) else str(value)]
