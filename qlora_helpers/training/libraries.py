"""The settings of a run as bitsandbytes, PEFT and TRL take them, made from the config or by a notebook."""

import math
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from trl import SFTConfig

from qlora_helpers import distributed
from qlora_helpers.config import Config
from qlora_helpers.device import Device
from qlora_helpers.errors import UserError
from qlora_helpers.evaluation.context import RunContext
from qlora_helpers.models.qlora import lora_config, quantization_config

FUSED = {"adamw_torch": "adamw_torch_fused"}  # the same updates in one kernel, which needs no synchronization in fp16
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
        train_sampling_strategy=config.sampling,
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


def run_arguments(context: RunContext, given: SFTConfig | None = None) -> SFTConfig:
    """Add to the `given` arguments, or to those of the config, when to evaluate and to save, and what to log."""
    config, device, n_rows = context.config, context.device, len(context.data.trained_on)
    steps = config.steps(n_rows)
    eval_steps = min(config.eval_steps or steps // config.epochs, steps)
    save_steps = config.save_steps
    if config.keep_best:  # the library wants a checkpoint at each evaluation; SaveBest adds those between
        save_steps = math.ceil(save_steps / eval_steps) * eval_steps
    arguments = replace(
        given or learning_arguments(config, n_rows, device),
        output_dir=str(context.run / "checkpoints"),
        eval_strategy="steps",
        eval_steps=eval_steps,
        save_strategy="steps",
        save_steps=save_steps,
        optim=FUSED.get(config.optimizer, config.optimizer) if device.kind == "cuda" else config.optimizer,
        restore_callback_states_from_checkpoint=True,
        load_best_model_at_end=config.keep_best,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=1,
        disable_tqdm=True,  # see Progress
        logging_nan_inf_filter=False,  # the filter would hide a NaN loss
        include_num_input_tokens_seen="non_padding",
        dataloader_pin_memory=device.kind == "cuda",
        # Even batches would repeat rows in the last one; a blocking copy would wait for the step before it.
        accelerator_config={"even_batches": False, "non_blocking": device.kind == "cuda"},
        ddp_find_unused_parameters=False,  # every step uses the whole adapter
        ddp_timeout=int(distributed.WAIT.total_seconds()),
    )
    return _on_one_gpu(arguments)


def _on_one_gpu(arguments: SFTConfig) -> SFTConfig:
    """Return the arguments for one GPU. With several, the library would multiply the batch size by their number."""
    if arguments.n_gpu > 1:
        print(
            f"{arguments.n_gpu} GPUs are visible. This run uses the first, with the batch size of its config. All are "
            f"used by: accelerate launch --config_file {distributed.CONFIGS / 'ddp.yaml'} --num_processes "
            f"{arguments.n_gpu} -m qlora_helpers train"
        )
        arguments._n_gpu = 1
    return arguments


def for_all_processes(config: Config) -> Config:
    """Return `config` with a `batch_size` that the processes can share, as large as before in each of them if possible.

    The effective batch size stays the same. Raises `UserError` if the processes cannot have equal shares of it.
    """
    processes = distributed.count()
    if config.effective_batch % processes:
        raise UserError(
            f"batch_size: {config.effective_batch} rows per step cannot be divided between {processes} processes. Fix: "
            "another number of processes, or a batch_size that is a multiple of it."
        )
    fewer = math.gcd(config.gradient_accumulation, processes)
    passes = config.gradient_accumulation // fewer
    return config.replace(batch_size=config.batch_size * fewer, gradient_accumulation=passes)


def of_one_process(config: Config) -> Config:
    """Return `config` with the rows of a forward pass in one process, as the memory plan takes it."""
    return config.replace(batch_size=config.batch_size // distributed.count())


def stored_for_sharding(config: Config, device: Device) -> BitsAndBytesConfig | None:
    """Return how bitsandbytes stores the base model.

    For FSDP, which shards floating-point tensors only, packed weights are stored in tensors of the compute dtype. Then
    no mixed precision converts them, which would destroy them.
    """
    quantization = quantization_config(config, device)
    if quantization and distributed.is_sharded():
        quantization.bnb_4bit_quant_storage = getattr(torch, device.dtype)
    return quantization
