"""Cells that build the libraries' own settings, and experiment 1 in the libraries alone: the same as in the package."""

import ast
import dataclasses
from types import SimpleNamespace

import nbformat
import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from qlora_helpers import UserError
from qlora_helpers.data import cleaning
from qlora_helpers.device import Device
from qlora_helpers.files import ROOT
from qlora_helpers.models import qlora
from qlora_helpers.planning import compute_dtype
from qlora_helpers.runs import RunFolder
from qlora_helpers.training import trainer
from qlora_helpers.training.libraries import Libraries, learning_arguments

CPU = Device("cpu", "a laptop", None, 8.0, 4.0, "float32", "")
T4 = dataclasses.replace(CPU, kind="cuda", name="Tesla T4", capability=(7, 5), dtype="float16")
CHANGES = [
    {},
    {"quantization": "fp4", "double_quant": False, "target_modules": ("all-linear",), "rank": 5, "alpha": 7, "seed": 3},
    {"bias": "lora_only", "dropout": 0.1, "warmup_ratio": 0.3, "lr_scheduler": "cosine", "gradient_accumulation": 2,
     "sampling": "group_by_length"},
    {"epochs": 3, "weight_decay": 0.1, "max_grad_norm": 0.5, "optimizer": "paged_adamw_8bit", "batch_size": 2},
    {"gradient_checkpointing": True, "learning_rate": 1e-3},
]


def cells(name):
    """Return the code cells of a notebook, by id."""
    found = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    return {cell.id: cell.source for cell in found if cell.cell_type == "code"}


@pytest.fixture(params=[CPU, T4], ids=lambda device: device.kind)
def here(request, monkeypatch):
    """A device. TRL looks for a GPU when it is told to use one, so it is shown the CPU."""
    monkeypatch.setattr(SFTConfig, "device", property(lambda self: torch.device("cpu")))
    monkeypatch.setattr(compute_dtype, "device_for", lambda config: request.param)
    return request.param


@pytest.mark.parametrize("changes", CHANGES)
def test_the_objects_of_05_are_those_of_the_package(config, here, tmp_path, changes):
    own = config.replace(**changes)
    names = {"config": own, "run": RunFolder(tmp_path), "steps": own.steps(16)}
    for cell in ("cell-08b", "cell-08c"):
        exec(cells("05_train_exp1")[cell], names)
    built = Libraries(names["four_bit"], names["lora"], names["arguments"])
    built.check(own, here, 16)
    assert built.quantization.to_dict() == qlora.quantization_config(own, here).to_dict()
    assert built.lora.to_dict() == qlora.lora_config(own).to_dict()
    assert built.arguments.to_dict() == learning_arguments(own, 16, here).to_dict()


@pytest.mark.parametrize("changes", CHANGES)
def test_the_objects_of_03_and_04_are_those_of_the_package(config, here, changes):
    own = config.replace(**changes)
    names = {"variants": {"16-bit": None, "own": own, "NF4 + double quant.": own}, "here": here}
    exec(cells("03_quantize")["cell-07a"], names)
    assert names["formats"]["16-bit"] is None
    assert names["formats"]["own"].to_dict() == qlora.quantization_config(own, here).to_dict()
    source = cells("04_attach_lora")["cell-07b"]
    assert source.endswith("lora = qlora.attach_lora(base, config, adapter)")
    stub = SimpleNamespace(attach_lora=lambda base, config, adapter: adapter)
    names = {"config": own, "qlora": stub, "base": None}
    exec(source, names)
    assert names["lora"].to_dict() == qlora.lora_config(own).to_dict()


def test_an_object_that_says_something_else_than_the_config_is_refused(config, data, tokenizer, tmp_path):
    """The run would be recorded under settings that it was not trained with."""
    run, changed = RunFolder(tmp_path / "run"), config.replace(rank=9, learning_rate=0.5)
    for given, name in (
        (Libraries(lora=qlora.lora_config(changed)), "lora: r is 9 in the cell and 4"),
        (Libraries(arguments=learning_arguments(changed, 16, CPU)), "arguments: learning_rate is 0.5"),
        (Libraries(quantization=qlora.quantization_config(config.replace(double_quant=False), CPU)), "use_double_quant"),
    ):
        with pytest.raises(UserError, match=name):
            trainer.train(config, data, tokenizer, run, libraries=given)
    assert not (run / "config.json").exists()


@pytest.fixture(scope="module")
def sixteen_bit(model_folder, tokenizer, tmp_path_factory):
    """The tiny model with weights in 16 bits, as models are published."""
    folder = tmp_path_factory.mktemp("sixteen")
    AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_libraries_alone_reach_the_same_heldout_loss(config, tokenizer, sixteen_bit, tmp_path):
    """Without dropout, whose masks differ because this package packs rows on a CPU, only rounding differs."""
    own = config.replace(
        model=str(sixteen_bit), max_length=256, dropout=0.0, epochs=5, eval_steps=None, n_answers=1
    )
    run = trainer.train(own, cleaning.prepare(own, tokenizer), tokenizer, RunFolder(tmp_path / "ours"))
    metrics = run.read("metrics.json")
    given = {"model": str(sixteen_bit), "dataset": str(ROOT / "data" / "conversations.jsonl"), "n_samples": 16}
    given |= {"n_heldout": 6, "output_dir": str(tmp_path / "theirs")}
    given |= {name: getattr(own, name) for name in ("epochs", "rank", "alpha", "dropout", "learning_rate", "seed")}
    names = {}
    for source in list(cells("13_libraries_alone").values())[1:]:
        exec(source, names)
        if source.startswith("# Parameters"):
            assert given.keys() <= {node.target.id for node in ast.parse(source).body}
            names |= given
    assert names["losses"]["base"] == pytest.approx(metrics["base_eval_loss"], abs=1e-5)
    assert metrics["base_eval_loss"] - metrics["eval_loss"] > 0.04  # training changed something
    assert names["losses"]["fine-tuned"] == pytest.approx(metrics["eval_loss"], abs=2e-4)
    assert (tmp_path / "theirs" / "adapter_model.safetensors").exists()
