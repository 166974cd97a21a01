"""The settings of a run as bitsandbytes, PEFT and TRL take them, made from the config or by a notebook."""

import math
from dataclasses import dataclass

from peft import LoraConfig
from transformers import BitsAndBytesConfig
from trl import SFTConfig

from qlora_helpers.config import Config
from qlora_helpers.device import Device
from qlora_helpers.errors import UserError
from qlora_helpers.models.qlora import lora_config, quantization_config

PLACES = ("output_dir", "logging_dir", "run_name")  # where a run is written is not what it learns


@dataclass(frozen=True)
class Libraries:
    """The libraries' own settings of a run. What is None is built from the config."""

    quantization: BitsAndBytesConfig | None = None
    lora: LoraConfig | None = None
    arguments: SFTConfig | None = None

    def check(self, config: Config, device: Device, n_rows: int) -> None:
        """Raise `UserError` if a given setting is not that of the config: the run would be recorded as another."""
        ours = (quantization_config(config, device), lora_config(config), learning_arguments(config, n_rows, device))
        for (name, given), own in zip(vars(self).items(), ours, strict=True):
            settings, expected = ({} if s is None else s.to_dict() for s in (given, own))
            for key in settings.keys() - set(PLACES):
                if settings[key] != expected.get(key):
                    raise UserError(
                        f"{name}: {key} is {settings[key]} in the cell and {expected.get(key)} in the config, by which "
                        "the run is known. Fix: change it in the parameters cell."
                    )


def learning_arguments(config: Config, n_rows: int, device: Device) -> SFTConfig:
    """Return what decides what is learned from `n_rows` rows, as TRL takes it."""
    return SFTConfig(
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler,
        warmup_steps=math.ceil(config.warmup_ratio * config.steps(n_rows)),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=config.optimizer,
        gradient_checkpointing=config.gradient_checkpointing,
        bf16=device.kind == "cuda" and device.dtype == "bfloat16",
        fp16=device.kind == "cuda" and device.dtype == "float16",
        use_cpu=device.kind == "cpu",
        max_length=None,  # rows are truncated already
        seed=config.seed,
        report_to="none",
    )
