"""The same training for TRL's command line: `trl_sft.yaml` in the run folder."""

from typing import Any

import yaml
from datasets import Dataset
from pyarrow import parquet
from transformers import TrainingArguments

from qlora_helpers import files, runs
from qlora_helpers.config import Config
from qlora_helpers.device import Device
from qlora_helpers.models import hub
from qlora_helpers.runs import RunFolder

ROWS = "trl_rows"  # folder of the training rows, as tokens and labels
# Settings that TRL takes from the run as they are. It writes to folders of its own, and evaluates nothing.
SAME = (
    "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "train_sampling_strategy",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim",
    "gradient_checkpointing", "save_steps", "logging_steps", "bf16", "fp16", "use_cpu", "max_length", "seed",
    "report_to",
)  # fmt: skip
HEAD = """\
# The training of this run for TRL's own command line. Run it in this folder:
#     trl sft --config trl_sft.yaml
# The rows are tokenized and labeled, so TRL applies no chat template and no mask.
# TRL cannot express, or does otherwise:
# - It evaluates nothing here: the held-out losses and answers of this run are measured by other code.
# - It draws other initial weights and dropout, so losses differ slightly. The batches are the same.
# - On a 4-bit model it trains the adapter in bfloat16 instead of float32.
"""


def write(run: RunFolder, config: Config, device: Device, arguments: TrainingArguments, rows: Dataset) -> None:
    """Write `trl_sft.yaml` and the rows that it names into the run folder."""
    (run / ROWS).mkdir(parents=True, exist_ok=True)
    parquet.write_table(rows.with_format("arrow")[:], run / ROWS / "train.parquet")  # to_parquet shows a progress bar
    settings = {"dataset_name": ROWS, **_model(config, device), **_arguments(arguments)}
    differences = "".join(f"# - {line}\n" for line in _differences(config, device))
    files.write_text(run / "trl_sft.yaml", HEAD + differences + yaml.safe_dump(settings, sort_keys=False))


def _model(config: Config, device: Device) -> dict[str, Any]:
    local = hub.is_local(config)
    quantized = config.quantization != "none"
    kind = {"bnb_4bit_quant_type": config.quantization, "use_bnb_nested_quant": config.double_quant}
    return {
        "model_name_or_path": str(hub.model_folder(config).resolve()) if local else config.model,
        "model_revision": "main" if local else config.revision,
        "dtype": device.dtype,
        "load_in_4bit": quantized,
        **(kind if quantized else {}),
        "use_peft": True,
        "lora_r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "lora_target_modules": list(config.target_modules),
    }


def _arguments(arguments: TrainingArguments) -> dict[str, Any]:
    values = {name: getattr(arguments, name) for name in SAME}
    plain = {name: getattr(value, "value", value) for name, value in values.items()}  # enums
    own = {"eval_strategy": "no", "save_strategy": "steps", "save_total_limit": runs.KEPT}
    return {"output_dir": "trl", **plain, **own}


def _differences(config: Config, device: Device) -> list[str]:
    """What TRL cannot express of these settings, one line each."""
    said = {
        f"bias={config.bias}: it trains no biases.": config.bias != "none",
        "keep_best and early stopping: it ends with the last step.": config.keep_best or config.early_stopping_patience,
        "fp16: its gradient scaler starts higher and skips the first steps.": device.dtype == "float16",
    }
    return [line for line, holds in said.items() if holds]
