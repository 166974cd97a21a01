"""What a fine-tuned model has to beat: its base model in 16 bits and in 4, prompted as in training and as before it.

Each rival is measured once on the held-out rows, in a folder of its own that runs share.
"""

import gc
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from qlora_helpers.config import Config
from qlora_helpers.data import prompts, rendering
from qlora_helpers.data.cleaning import Data
from qlora_helpers.device import GIB, Device, forget_peak
from qlora_helpers.errors import UserError
from qlora_helpers.evaluation import losses
from qlora_helpers.evaluation.context import RunContext
from qlora_helpers.evaluation.row_losses import BASE, IN_16_BITS, OWN_TEMPLATE, RowLoss
from qlora_helpers.models import hub
from qlora_helpers.planning import memory, plan, quantization


@dataclass(frozen=True)
class Rivals:
    """The folder of each rival that was measured, and the reason why each other one was not, by name."""

    folders: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def __or__(self, other: "Rivals") -> "Rivals":
        return Rivals(self.folders | other.folders, self.absent | other.absent)


def in_16_bits(context: RunContext) -> Rivals:
    """Measure the base model as it was downloaded, and free it. Call this before the 4-bit base model is loaded.

    Nothing is measured if the run's own base model is in 16 bits. Raises `UserError` if the model cannot be loaded.
    """
    if context.config.quantization == "none":
        return Rivals()
    of_16_bits = replace(context, config=context.config.replace(quantization="none"))
    rows, obstacle = rows_in_16_bits(of_16_bits.config, context.device)
    if obstacle:
        print(f"{IN_16_BITS}: not measured: {obstacle}.")
        return Rivals(absent=dict.fromkeys((IN_16_BITS, OWN_TEMPLATE[IN_16_BITS]), obstacle))
    found, pending = _forms(IN_16_BITS, of_16_bits)
    if not pending:
        return found
    from qlora_helpers.models import qlora  # slow to import, and not needed to compare measured losses

    print("Measuring the base model in 16 bits, once for all runs with these held-out rows …", flush=True)
    try:
        base = qlora.load_base(of_16_bits.config, context.device)
        qlora.check_targets(base, context.config)
        for form in pending:
            losses.base_losses(base, form.config, form.data, form.device, form.run.path.parent, rows)
    except torch.cuda.OutOfMemoryError:
        print(f"{IN_16_BITS}: not measured: the GPU ran out of memory.")
        found = Rivals(absent=dict.fromkeys(found.folders | found.absent, "the GPU ran out of memory"))
    base = None
    gc.collect()
    forget_peak(context.device)
    return found


def of_base(base: Any, context: RunContext) -> Rivals:
    """Measure the run's own base model, prompted as in training and in its own chat template."""
    found, pending = _forms(BASE, context)
    for form in pending:
        losses.base_losses(base, form.config, form.data, form.device, form.run.path.parent)
    return found


def in_own_template(
    base: Any, config: Config, data: Data, tokenizer: Any, device: Device, folder: Path
) -> list[RowLoss]:
    """Held-out losses of a base model in its own chat template, measured once; none if that is no rival."""
    try:
        config, data = own_template(config, data, tokenizer)
    except UserError as reason:
        print(f"In its own chat template, the base model is not measured: {reason}.")
        return []
    return losses.base_losses(base, config, data, device, folder)


def own_template(config: Config, data: Data, tokenizer: Any) -> tuple[Config, Data]:
    """Settings and held-out rows in the model's own chat template: the rows that are whole in both formats.

    A row that one format truncates, or cannot show, is another text in the other. Raises `UserError` with the reason if
    there is no such row, if the run uses the model's template already, or if the model has none.
    """
    if config.template == "auto":
        raise UserError("the run already uses the model's own chat template")
    if config.train_on != "assistant":
        raise UserError(f"with train_on={config.train_on} the template's own tokens count in the loss")
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("the model has no chat template")
    own = config.replace(template="auto", max_length=prompts.heldout_limit(config))
    rendering.template_of(own, tokenizer)
    whole = [example.row for example in data.heldout if not example.cut]
    encoded = prompts.encode(whole, own, tokenizer)
    rows = [example for example in encoded if not (example.cut or example.problem) and example.trained]
    if not rows:
        raise UserError("no held-out row is whole in both prompt formats")
    return own.replace(max_length=config.max_length), replace(data, heldout=rows)


def _forms(name: str, context: RunContext) -> tuple[Rivals, list[RunContext]]:
    """The base model in both prompt formats: the rivals, and those of them that are yet to be measured."""
    forms = {name: context}
    absent = {}
    try:
        config, data = own_template(context.config, context.data, context.tokenizer)
        forms[OWN_TEMPLATE[name]] = replace(context, config=config, data=data)
        if len(data.heldout) < len(context.data.heldout):
            shares = f"{len(data.heldout)} of {len(context.data.heldout)} held-out rows"
            print(f"{OWN_TEMPLATE[name]}: measured on {shares}, which are whole in both prompt formats.")
    except UserError as error:
        absent = {OWN_TEMPLATE[name]: _reason(str(error), context.config)}
        if context.config.template != "auto":  # or it is the form that is measured
            print(f"{OWN_TEMPLATE[name]}: not measured: {absent[OWN_TEMPLATE[name]]}.")
    folder = context.run.path.parent
    where = {n: losses.baseline_folder(form.config, form.data, form.device, folder) for n, form in forms.items()}
    pending = [form for n, form in forms.items() if not (where[n] / "heldout_losses.jsonl").exists()]
    return Rivals({n: run.name for n, run in where.items()}, absent), pending


def _reason(error: str, config: Config) -> str:
    """The part of an error that says what is wrong, without the path of a local model: reports are passed on."""
    return error.partition(" Fix: ")[0].rstrip(".").replace(config.model, hub.public_name(config))


def rows_in_16_bits(config: Config, device: Device) -> tuple[int, str]:
    """How many held-out rows the base model in 16 bits reads at once on this device, and what prevents it altogether.

    A model that the memory plan does not know is tried, row by row on a GPU.
    """
    if refusal := quantization.refusal(config):
        return 0, _reason(refusal, config)
    try:
        load = memory.workload_of(config.replace(max_length=prompts.heldout_limit(config)))
    except UserError:
        return (1 if device.kind == "cuda" else memory.MOST_ROWS), ""
    if device.kind == "cuda":
        gpu = plan.gpu_of(device, config)
        room, needed = gpu.memory, _gib_needed(load, gpu.context)
    else:
        width = memory.HALF + memory.FULL  # losses on a CPU are computed in float32, see `evaluating_in_float32`
        needed = iter([(memory.MOST_ROWS, load.shape.parameters * width / GIB)])
        room = device.free_gib
    for rows, gib in needed:
        if gib <= room:
            return rows, ""
    return 0, f"it needs {gib:.1f} GiB of memory, and {room:.1f} are there"


def _gib_needed(load: memory.Workload, context: float) -> Iterator[tuple[int, float]]:
    """GiB of GPU memory while held-out losses are measured, for ever fewer rows at once."""
    rows = memory.MOST_ROWS
    while rows:
        yield rows, sum(memory.heldout_parts(load, rows).values()) / GIB + context
        rows //= 2
