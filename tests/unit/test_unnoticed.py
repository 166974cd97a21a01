"""Faults that a mutation run planted in the core and that no other test noticed. See `make mutants`."""

import hashlib
import json
import shutil
from types import SimpleNamespace

import filelock
import pytest
import torch

from qlora_helpers import UserError, files, runs
from qlora_helpers.data import cleaning, prompts
from qlora_helpers.evaluation import answers, rivals
from qlora_helpers.evaluation.row_losses import BASE
from qlora_helpers.export import merge, parity
from qlora_helpers.models import safetensors_io
from qlora_helpers.runs import RunFolder
from qlora_helpers.training import callbacks, libraries, qlora_trainer, trainer


def test_a_run_on_a_local_model_notes_the_fingerprint_of_its_weights(
    config, data, tokenizer, device, model_folder, tmp_path, monkeypatch
):
    """Export and resuming compare with it: without one, other weights in the same folder pass."""
    context = rivals.RunContext(config, data, tokenizer, device, RunFolder(tmp_path / "run"))
    monkeypatch.setattr(trainer.qlora, "four_bit_share", lambda base: 1.0)
    trainer._write_manifest(context, SimpleNamespace(config=SimpleNamespace()), rivals.Rivals({BASE: "base-0"}))
    noted = context.run.read("manifest.json")["model"]
    assert noted["fingerprint"] == safetensors_io.fingerprint(model_folder)
    assert len(noted["fingerprint"]) == 16


def test_a_fingerprint_hashes_64_samples_of_64_kib_up_to_the_end_of_the_file(tmp_path):
    """Run folders hold it: another rule would take the same weights for others."""
    content = bytes(range(256)) * 1024
    (tmp_path / "model.safetensors").write_bytes(content)
    starts = [sample * (len(content) - 65536) // 63 for sample in range(64)]
    hashed = b"model.safetensors 262144" + b"".join(content[start : start + 65536] for start in starts)
    assert safetensors_io.fingerprint(tmp_path) == hashlib.sha256(hashed).hexdigest()[:16]


# What the library trains with, by setting: a value that is not the default of either.
PASSED_ON = {
    "epochs": ("num_train_epochs", 3),
    "batch_size": ("per_device_train_batch_size", 3),
    "gradient_accumulation": ("gradient_accumulation_steps", 2),
    "learning_rate": ("learning_rate", 3e-3),
    "lr_scheduler": ("lr_scheduler_type", "cosine"),
    "sampling": ("train_sampling_strategy", "group_by_length"),
    "weight_decay": ("weight_decay", 0.03),
    "max_grad_norm": ("max_grad_norm", 0.3),
    "optimizer": ("optim", "paged_adamw_8bit"),
    "gradient_checkpointing": ("gradient_checkpointing", True),
    "keep_best": ("load_best_model_at_end", True),
    "seed": ("seed", 7),
    "save_steps": ("save_steps", 3),
    "eval_steps": ("eval_steps", 1),
}


def arguments(config, device, tmp_path):
    rows = SimpleNamespace(trained_on=range(16))
    return libraries.run_arguments(rivals.RunContext(config, rows, None, device, RunFolder(tmp_path)))


@pytest.mark.parametrize("setting", PASSED_ON)
def test_every_setting_of_training_reaches_the_library(config, device, tmp_path, setting):
    name, value = PASSED_ON[setting]
    given = arguments(config.replace(**{setting: value}), device, tmp_path)
    assert getattr(given, name) == value
    assert getattr(arguments(config, device, tmp_path), name) != value


def test_warmup_is_a_share_of_the_steps(config, device, tmp_path):
    given = arguments(config.replace(warmup_ratio=0.5, epochs=2), device, tmp_path)
    assert given.warmup_steps == 4  # of 8


@pytest.mark.parametrize(("epochs", "steps"), [(1, 4), (2, 4), (3, 4)])
def test_without_eval_steps_there_is_an_evaluation_at_the_end_of_every_epoch(config, device, tmp_path, epochs, steps):
    given = arguments(config.replace(eval_steps=None, epochs=epochs), device, tmp_path)
    assert given.eval_steps == steps  # of 16 rows, 4 at a time


@pytest.mark.parametrize("rank", [1, 64])
def test_an_object_that_says_more_or_less_than_the_config_is_refused(config, device, rank):
    given = libraries.Libraries(lora=libraries.lora_config(config.replace(rank=rank)))
    with pytest.raises(UserError, match=f"lora: r is {rank} in the cell and {config.rank} in the config"):
        given.check(config, device, 16)
    libraries.Libraries(lora=libraries.lora_config(config)).check(config, device, 16)


def test_a_run_that_another_process_holds_is_refused_at_once(tmp_path, monkeypatch):
    asked = []

    def hold(path, timeout):
        asked.append(timeout)
        raise filelock.Timeout(str(path))

    monkeypatch.setattr(runs.locks, "hold", hold)
    with pytest.raises(UserError, match="is in use by another process"), runs.lock(RunFolder(tmp_path / "run")):
        pass
    assert asked == [0]


def test_every_checkpoint_has_an_evaluation_if_the_best_is_kept(config, device, tmp_path):
    given = arguments(config.replace(keep_best=True, eval_steps=2, save_steps=3), device, tmp_path)
    assert (given.eval_steps, given.save_steps) == (2, 4)


def test_a_log_begins_at_epoch_0_with_the_loss_before_training(tmp_path):
    writer = callbacks.LogWriter(tmp_path / "log.jsonl", 2.5)
    writer.on_train_begin(None, SimpleNamespace(log_history=[]), None)
    assert files.read_jsonl(tmp_path / "log.jsonl") == [{"step": 0, "epoch": 0.0, "eval_loss": 2.5}]


@pytest.mark.parametrize(
    ("last", "evaluated"), [({"step": 4, "eval_loss": 1.0}, False), ({"step": 2, "eval_loss": 1.0}, True)]
)
def test_the_last_step_is_evaluated_unless_it_was(last, evaluated):
    """The log then ends with the held-out loss of the final weights."""
    calls = []
    state = SimpleNamespace(global_step=4, log_history=[last, {"step": 4, "loss": 1.0}])
    ready = SimpleNamespace(
        state=state, evaluations=None, evaluated_step=4, last_evaluation=["losses"], evaluate=lambda: calls.append(True)
    )
    context = SimpleNamespace(config=SimpleNamespace(keep_best=False), data=SimpleNamespace(selection=[]))
    assert trainer._heldout_losses(ready, context) == ["losses"]
    assert bool(calls) == evaluated


@pytest.mark.parametrize(
    "kind",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}},
        {"modules_to_save": ["lm_head"]},
        {"lora_bias": True},
    ],
    ids=lambda kind: next(iter(kind)),
)
def test_an_adapter_that_is_not_plain_lora_is_refused(make_run, tmp_path, kind):
    """Its merged weights would be wrong without a word."""
    run = RunFolder(shutil.copytree(make_run().path, tmp_path / "run"))
    settings = json.loads((run.adapter / "adapter_config.json").read_text("utf-8"))
    files.write_json(run.adapter / "adapter_config.json", settings | kind)
    with pytest.raises(UserError, match=f"sets {next(iter(kind))}, which is not supported"):
        merge.source(run)


@pytest.fixture(scope="module")
def merging():
    """A tokenizer that joins the end of a question and the start of an answer, and begins every text with a space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [(c, -5.0) for c in "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789?.,!'#:"]
    words = Tokenizer(models.Unigram([("<unk>", -20.0), ("</s>", -20.0), ("?Yes", -1.0), *letters], unk_id=0))
    words.add_special_tokens(["</s>"])
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    words.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    fast.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    )
    return fast


def test_a_row_whose_answer_shares_a_token_with_its_question_is_dropped(config, merging, write_rows):
    """No label is right for such a token: trained, it teaches a part of the question, and masked, not the answer."""
    rows = [{"question": f"Is this number {i}, or not?", "answer": f"No, it is not {i}."} for i in range(8)]
    rows[3] = {"question": "Is this one straddling?", "answer": "Yes, it does."}
    own = config.replace(dataset=write_rows(rows), template="auto", max_length=200, n_heldout=2, n_samples=3)
    cleaned = cleaning.clean(own, merging)
    reasons = {d["row"]["answer"]: d["reason"] for d in cleaned.dropped}
    assert reasons == {"Yes, it does.": "an answer shares a token with its question"}
    assert len(cleaned.train) + len(cleaned.heldout) == 7
    (example,) = prompts.encode([item.row for item in cleaned.train[:1]], own, merging)
    assert example.problem is None


def test_answers_are_greedy_whatever_the_base_samples_with(setup, config, device, tokenizer):
    """A base's generation config may ask for sampling."""
    model, _ = setup
    asked = [{"prompt": "What is a variable in programming?", "reference": "r"}]
    greedy = answers.generate(model, tokenizer, config, device, asked)
    settings = model.generation_config
    before = settings.do_sample, settings.temperature
    settings.do_sample, settings.temperature = True, 50.0
    try:
        sampled = answers.generate(model, tokenizer, config, device, asked)
        tokens, _ = parity._answers(model, [[1, 5, 9]], [])[0]
        again, _ = parity._answers(model, [[1, 5, 9]], [])[0]
    finally:
        settings.do_sample, settings.temperature = before
    assert sampled == greedy
    assert tokens == again


@pytest.mark.parametrize("lost", ["model-00002-of-00002.safetensors", "model.safetensors"])
def test_a_model_folder_without_one_of_its_weight_files_is_refused(tmp_path, lost):
    """Nothing may be merged or fingerprinted from what is left."""
    if lost != "model.safetensors":
        shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        index = {"weight_map": {f"layer{i}": name for i, name in enumerate(shards)}}
        files.write_json(tmp_path / "model.safetensors.index.json", index)
        (tmp_path / shards[0]).write_bytes(b"weights")
    for read in (safetensors_io.files, safetensors_io.fingerprint):
        with pytest.raises(UserError, match=rf"has no {lost}\. Fix: download the complete model"):
            read(tmp_path)


@pytest.mark.parametrize(("processes", "loss"), [(1, 3.0), (2, 6.0), (3, 9.0)])
def test_several_processes_exchange_the_gradients_of_their_graphs(monkeypatch, processes, loss):
    """The library takes the mean of their losses, each of which is a share of the sum."""
    exchanged = []

    class Graphs:
        exchange = staticmethod(exchanged.append)

        def __call__(self, *batch):
            return torch.tensor(3.0)

    monkeypatch.setattr(qlora_trainer.distributed, "count", lambda: processes)
    state = SimpleNamespace(global_step=0)
    accelerator = SimpleNamespace(sync_gradients=True)
    fake = SimpleNamespace(_began=1.0, graphs=Graphs(), accelerator=accelerator, _passes=[], state=state)
    fake._get_learning_rate = lambda: 0.1
    batch = {"input_ids": None, "labels": None}
    assert qlora_trainer.QloraTrainer.training_step(fake, None, batch).item() == loss
    assert exchanged == [accelerator] * (processes > 1)
