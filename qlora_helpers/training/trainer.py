"""One run: configure TRL's SFTTrainer, continue an interrupted run, save the results."""

import gc
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback
from trl import SFTConfig

from qlora_helpers import distributed, drive, files, runs
from qlora_helpers.config import Config
from qlora_helpers.data import cleaning
from qlora_helpers.data.cleaning import Data
from qlora_helpers.data.streaming import StreamedData
from qlora_helpers.device import forget_peak, limit_memory, peak_memory_gib
from qlora_helpers.evaluation import losses, model_card, rivals
from qlora_helpers.evaluation.context import RunContext
from qlora_helpers.evaluation.rivals import Rivals
from qlora_helpers.evaluation.row_losses import BASE, RowLoss, mean_loss, to_rows
from qlora_helpers.models import hub, qlora, safetensors_io
from qlora_helpers.models.qlora import attach_lora, check_targets, load_base, save_biases, train_in_float32
from qlora_helpers.planning import compute_dtype, quantization
from qlora_helpers.runs import RunFolder
from qlora_helpers.training import batches, checks, crossfit, oom, paths, trl_config
from qlora_helpers.training.callbacks import CopyToDrive, LogBeforeSaving, LogWriter, MemoryFromHere, Progress, SaveBest
from qlora_helpers.training.checks import Guard
from qlora_helpers.training.libraries import (
    Libraries,
    for_all_processes,
    of_one_process,
    run_arguments,
    stored_for_sharding,
)
from qlora_helpers.training.qlora_trainer import QloraTrainer

FP16_SCALE = 1024.0  # the default, 65536, overflows at first, and the scaler would skip the first steps


def train(
    config: Config,
    data: Data,
    tokenizer: Any,
    run: RunFolder,
    callbacks: Sequence[TrainerCallback] = (),
    libraries: Libraries = Libraries(),  # noqa: B008
) -> RunFolder:
    """Train `config` into `run` and return it, finished. An interrupted run continues from its last checkpoint.

    Raises `UserError` if another process uses the folder, if it holds another run, if `libraries` say something else
    than the config, which identifies the run, or if training goes wrong in a way that its result would not show: see
    `checks`.
    """
    identity = cleaning.identity(config, data)
    checks.check_rows(data.in_memory if isinstance(data, StreamedData) else data)  # a stream leaves such rows out
    mirror = drive.mirror(run)
    if mirror and not distributed.from_main(lambda: run.finished):
        runs.check_free(run, config, identity)
        distributed.from_main(lambda: mirror.pull(identity))
        train(config, data, tokenizer, mirror.here, [*callbacks, CopyToDrive(mirror)], libraries)
        return distributed.from_main(mirror.finish)
    with ExitStack() as held, checks.full_disk_as_user_error(run.path):
        distributed.from_main(lambda: held.enter_context(runs.lock(run)))
        runs.check_free(run, config, identity)
        if distributed.from_main(lambda: run.finished):
            runs.check_adapter(run.adapter)
            print(f"{run.path} is finished: nothing to train.")
            return run
        quantization.check(config)
        if isinstance(data, StreamedData):
            distributed.from_main(lambda: data.seen)  # raises `UserError` if there are too few rows
        device = distributed.from_main(
            lambda: compute_dtype.as_begun(compute_dtype.device_for(config), run.compute_dtype())
        )
        libraries.check(config, device, len(data.trained_on))
        limit_memory(device, config.memory_limit_gib)
        asked, config = config, for_all_processes(distributed.from_main(lambda: oom.choose_split(config, device)))
        oom.announce(of_one_process(config), device)
        _train_within_memory(RunContext(config, data, tokenizer, device, run), callbacks, libraries, asked)
        return run


def _train_within_memory(
    context: RunContext, callbacks: Sequence[TrainerCallback], libraries: Libraries, asked: Config
) -> None:
    """Train, with smaller batches after the GPU ran out of memory: see `oom.shrink`. `asked` is the config as given."""
    while True:
        try:
            given = libraries if context.config == asked else replace(libraries, arguments=None)  # of another split
            _attempt(context, callbacks, given)
            return
        except RuntimeError as error:
            if distributed.is_lost(error):
                raise distributed.ProcessLost() from None
            if not oom.is_oom_error(error):
                raise
        seen = peak_memory_gib(context.device)
        gc.collect()  # the traceback, which kept the tensors alive, is gone only here
        forget_peak(context.device)
        context = replace(context, config=oom.shrink(context.config, context.device, context.run, seen))


def _attempt(context: RunContext, callbacks: Sequence[TrainerCallback], given: Libraries) -> None:
    """Train from the last checkpoint to the end, with one split of the batch."""
    config, run = context.config, context.run
    with distributed.main_first():
        base, base_losses = _measured_base(context, given)
    trainer = build_trainer(attach_lora(base, config, given.lora), context, callbacks, given.arguments)
    selection = context.data.selection
    before = trainer.measure(selection) if selection else base_losses  # a new adapter changes nothing
    if distributed.is_main():
        if isinstance(trainer.train_dataset, Dataset):  # TRL's command line does not read a stream like ours
            trl_config.write(run, config, context.device, trainer.args, trainer.train_dataset)
        trainer.add_callback(LogWriter(run / "log.jsonl", mean_loss(before)))
    _fit(trainer, context)
    heldout = _heldout_losses(trainer, context)
    weights = distributed.trained_weights(trainer.model)
    with distributed.gathered(trainer.model):
        checks.check_moved(trainer.model)
        if distributed.is_main():
            _save_results(trainer, context, base_losses, heldout, weights)
        distributed.wait()


def _measured_base(context: RunContext, given: Libraries) -> tuple[Any, list[RowLoss]]:
    """Load the base model, and return it with its held-out losses. Process 0 measures and writes, the others read."""
    config, run = context.config, context.run
    main = distributed.is_main()
    in_16_bits = rivals.in_16_bits(context) if main else Rivals()
    base = load_base(config, context.device, given.quantization or stored_for_sharding(config, context.device))
    check_targets(base, config)
    if main:
        files.write_json(run / "config.json", {"identity": context.identity, "config": config.to_dict()})
    base_losses = losses.baseline(base, context)
    if main:
        _write_manifest(context, base, rivals.of_base(base, context) | in_16_bits)
    return base, base_losses


def build_trainer(
    model: Any, context: RunContext, callbacks: Sequence[TrainerCallback] = (), arguments: SFTConfig | None = None
) -> QloraTrainer:
    """The trainer of a run. Rows are tokenized and labeled already, so TRL applies no template and no mask.

    `arguments` are those of `learning_arguments` unless they are given.
    """
    config, data, device = context.config, context.data, context.device
    in_memory = data.train if isinstance(data, StreamedData) else data.trained_on
    rows = [batches.as_features(example) for example in in_memory]
    main_only = [Progress("selection" if data.selection else "held-out"), *callbacks]
    everywhere = [Guard(), MemoryFromHere(device), LogBeforeSaving()]
    callbacks = [*everywhere, *(main_only if distributed.is_main() else [])]
    if config.keep_best:
        callbacks.append(SaveBest())
    if config.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(config.early_stopping_patience))
    for settings in (model.config, model.generation_config):  # the library would do this too, with a warning
        settings.pad_token_id = context.tokenizer.pad_token_id
    trainer = QloraTrainer(
        model=model,
        args=run_arguments(context, arguments),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:1]),  # never read: `evaluate` measures rows of its own
        processing_class=context.tokenizer,
        data_collator=batches.collator(model, device),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # without its bar, the library prints a line for every step
    if distributed.count() > 1:
        trainer.data_collator = batches.Share(trainer.data_collator)
    if isinstance(data, StreamedData):  # only now: TRL would read rows of it to see what they hold
        trainer.train_dataset = batches.StreamedRows(data.stream)
        trainer.args.train_sampling_strategy = "sequential"
    train_in_float32(model)
    if device.kind == "cuda" and device.dtype == "float16":
        trainer.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=FP16_SCALE)
    longest = max(len(example.input_ids) for example in [*data.heldout, *data.selection])
    measured = of_one_process(config).replace(heldout_max_length=max(8, longest))
    trainer.rows_at_once, _ = losses.eval_batch_sizes(measured, device)
    trainer.device_, trainer.identity = device, context.identity
    trainer.evaluated_on = data.selection or data.heldout
    return trainer


def _write_manifest(context: RunContext, base: Any, measured: Rivals) -> None:
    config, run = context.config, context.run
    content = runs.manifest(config, context.device, context.data.to_manifest())
    content["model"] = {
        "name": config.model,
        "revision": None if hub.is_local(config) else getattr(base.config, "_commit_hash", None) or config.revision,
        "fingerprint": safetensors_io.fingerprint(hub.model_folder(config)) if hub.is_local(config) else None,
        "four_bit_share": round(qlora.four_bit_share(base), 4),
    }
    content["baseline"] = measured.folders[BASE]
    content |= {"rivals": measured.folders, "absent_rivals": measured.absent, "training_path": run.training_path()}
    files.write_json(run / "manifest.json", content)


def _fit(trainer: QloraTrainer, context: RunContext) -> None:
    """Train to the end, from the last complete checkpoint if there is one."""
    checkpoint = distributed.from_main(lambda: runs.last_checkpoint(context.run, context.identity))
    if checkpoint:
        checks.check_saved_alike(checkpoint)
        print(f"Resuming from {checkpoint.name}.")
    trainer.evaluations = crossfit.begin(context, checkpoint)
    paths.prepare(trainer, context, checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.graphs = None


def _save_results(
    trainer: QloraTrainer,
    context: RunContext,
    base_losses: list[RowLoss],
    heldout: list[RowLoss],
    weights: dict[str, Any] | None,
) -> None:
    """Save losses, answers, adapter, tokenizer and model card; `metrics.json` last: it proves that all is on disk."""
    run, config = context.run, context.config
    model: Any = trainer.model
    files.write_jsonl(run / "heldout_losses.jsonl", to_rows(heldout))
    print("Training is done. Answering the held-out questions …", flush=True)
    with trainer.evaluating():
        losses.measure_answers(model, replace(context, config=of_one_process(config)), run)
    metrics = _metrics(trainer, context, heldout, base_losses)
    model.save_pretrained(run.adapter, state_dict=weights)
    save_biases(model, run.adapter)
    context.tokenizer.save_pretrained(run.adapter)
    hashes = files.hashes(run.adapter)
    metrics["adapter_sha256"] = {name: hashes[name] for name in hashes if name != "README.md"}  # a card may be edited
    files.write_text(run.adapter / "README.md", model_card.render(run, config, metrics))
    for folder in filter(Path.exists, (run.adapter, run / trl_config.ROWS)):
        files.flush_all(folder)
    files.flush(run / "log.jsonl")
    files.write_json(run / "metrics.json", metrics)
    print(f"{run.path.name} is finished and saved.", flush=True)


def _heldout_losses(trainer: QloraTrainer, context: RunContext) -> list[RowLoss]:
    """Losses of the held-out rows with the final weights or, in cross-fitting, with those chosen without the row.

    With `keep_best`, the best weights are loaded again.
    """
    config, data = context.config, context.data
    if data.selection:
        return trainer.measure(data.heldout)
    state = trainer.state
    logged = any("eval_loss" in line and line["step"] == state.global_step for line in state.log_history)
    if not config.keep_best and not logged:
        trainer.evaluate()
    if trainer.evaluations is not None:
        return crossfit.cross_fitted(trainer.evaluations, config)
    known = trainer.evaluated_step == state.global_step  # not by a run that continued after its last step
    return trainer.last_evaluation if known else trainer.measure(data.heldout)


def _metrics(
    trainer: QloraTrainer, context: RunContext, heldout: list[RowLoss], base_losses: list[RowLoss]
) -> dict[str, Any]:
    """Content of `metrics.json`. Seconds and memory of training count its steps only."""
    model: Any = trainer.model
    state, device = trainer.state, trainer.device_
    steps = [line for line in state.log_history if "loss" in line]
    seconds = sum(line["seconds"] for line in steps)
    return {
        "train_rows": len(context.data.trained_on) - len(context.data.rehearsal),
        "rehearsal_rows": len(context.data.rehearsal),
        "steps": state.global_step,
        "epochs": context.config.epochs,
        "train_loss": sum(line["loss"] for line in steps) / len(steps),
        "eval_loss": mean_loss(heldout),
        "base_eval_loss": mean_loss(base_losses),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": round(seconds, 2),
        "tokens_per_second": round(state.num_input_tokens_seen / seconds, 1),
        "peak_memory_gib": max(line["peak_gib"] for line in steps),
        "eval_seconds": round(trainer.eval_seconds, 2),
        "eval_peak_memory_gib": round(trainer.eval_peak_gib, 3),
        "seed": context.config.seed,
        "device": device.name,
        "compute_dtype": device.dtype,
    }
