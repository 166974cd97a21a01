"""The file with which TRL's command line starts the same training."""

import json

import pytest
from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser, get_peft_config

from qlora_helpers.runs import RunFolder
from qlora_helpers.training import trainer, trl_config


@pytest.fixture(scope="module")
def run(config, data, tokenizer, tmp_path_factory):
    """A finished run."""
    settings = config.replace(
        warmup_ratio=0.5, lr_scheduler="cosine", keep_best=True, batch_size=2, sampling="group_by_length"
    )
    return trainer.train(settings, data, tokenizer, RunFolder(tmp_path_factory.mktemp("runs") / "exp1"))


def parsed(run, monkeypatch):
    """The run's file as TRL's command line reads it, in the run's folder."""
    monkeypatch.chdir(run.path)
    return TrlParser((ScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config(["--config", "trl_sft.yaml"])


def test_trl_reads_the_settings_of_the_run(run, monkeypatch):
    script, arguments, model = parsed(run, monkeypatch)
    config = run.config()
    assert (model.model_name_or_path, model.dtype) == (config.model, "float32")
    assert (model.load_in_4bit, model.bnb_4bit_quant_type, model.use_bnb_nested_quant) == (True, "nf4", True)
    lora = get_peft_config(model)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (config.rank, config.alpha, config.dropout)
    assert lora.target_modules == set(config.target_modules)
    assert (arguments.num_train_epochs, arguments.per_device_train_batch_size) == (config.epochs, 2)
    assert arguments.gradient_accumulation_steps == config.gradient_accumulation
    assert (arguments.learning_rate, arguments.lr_scheduler_type) == (config.learning_rate, "cosine")
    assert arguments.warmup_steps == config.steps(16) / 2
    assert (arguments.seed, arguments.optim, arguments.max_length) == (config.seed, "adamw_torch", None)
    assert (arguments.bf16, arguments.fp16, arguments.use_cpu) == (False, False, True)
    assert (arguments.gradient_checkpointing, arguments.eval_strategy) == (False, "no")
    assert script.dataset_name == "trl_rows"


@pytest.mark.parametrize(("quantization", "in_4_bits"), [("nf4", True), ("fp4", True), ("none", False)])
def test_trl_loads_in_4_bits_what_the_run_does(config, device, quantization, in_4_bits):
    written = trl_config._model(config.replace(quantization=quantization), device)
    assert written["load_in_4bit"] is in_4_bits
    assert written.get("bnb_4bit_quant_type") == (quantization if in_4_bits else None)


def test_the_rows_for_trl_are_the_tokens_and_labels_of_the_run(run, data, monkeypatch, tmp_path):
    script, _, _ = parsed(run, monkeypatch)
    rows = load_dataset(script.dataset_name, cache_dir=tmp_path)[script.dataset_train_split]
    assert rows["input_ids"][:] == [example.input_ids for example in data.trained_on]
    assert rows["labels"][:] == [example.labels for example in data.trained_on]


def test_the_file_says_what_trl_cannot_express(run):
    text = (run / "trl_sft.yaml").read_text("utf-8")
    assert "# - keep_best and early stopping" in text
    assert "# - bias=" not in text
    assert "# - fp16" not in text


def test_trl_trains_on_the_same_batches(run, monkeypatch):
    from trl import DatasetMixtureConfig
    from trl.scripts import sft

    monkeypatch.chdir(run.path)
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig))
    script, arguments, model, mixture = parser.parse_args_and_config(["--config", "trl_sft.yaml"])
    sft.main(script, arguments, model, mixture)
    assert (run / "trl" / "adapter_model.safetensors").exists()
    state = json.loads((run / "trl" / "checkpoint-8" / "trainer_state.json").read_text("utf-8"))
    theirs, ours = ([line["loss"] for line in log if "loss" in line] for log in (state["log_history"], run.log()))
    assert theirs[:3] == pytest.approx(ours[:3], abs=0.003)  # the same batches, with other weights in the adapter
