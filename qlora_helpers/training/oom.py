"""GPU memory of a run: choose a batch size that fits, and handle running out of memory."""

from qlora_helpers import distributed
from qlora_helpers.config import Config
from qlora_helpers.device import Device
from qlora_helpers.errors import UserError
from qlora_helpers.planning import plan
from qlora_helpers.runs import RunFolder


def choose_split(config: Config, device: Device) -> Config:
    """Return `config` with the fastest batch size and gradient accumulation that fit, according to the plan.

    The effective batch size stays the same. Without `auto_batch`, or on a CPU, nothing changes.
    """
    if not config.auto_batch or device.kind != "cuda":
        return config
    try:
        fastest = plan.fastest_split(config, device)
    except UserError as error:
        print(f"auto_batch: memory cannot be planned, so as published: {_split(config)}. {error}")
        return config
    words = plan.plan_memory(fastest, device).words
    print(f"auto_batch: {_split(fastest)} {words}. As published: {_split(config)} (auto_batch=false).")
    return fastest


def announce(config: Config, device: Device) -> None:
    """On a GPU, print whether the run fits according to the plan, and if not, what to change. Loads no weights."""
    if device.kind != "cuda":
        return
    try:
        planned = plan.plan_memory(config, device)
    except UserError as error:
        print(f"Memory is not planned: {error}")
        return
    print(*["Memory: " + planned.words, *(f"- {advice}" for advice in planned.advice)], sep="\n")


def is_oom_error(error: RuntimeError) -> bool:
    """Whether the GPU ran out of memory: torch has an error class for it, CUDA and cuBLAS only a message."""
    import torch

    messages = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(message in str(error) for message in messages)


def shrink(config: Config, device: Device, run: RunFolder, seen_gib: float) -> Config:
    """Return the config to continue with after the GPU ran out of memory.

    The batch size is at least halved, with more gradient accumulation; at a batch size of 1, gradient checkpointing is
    turned on. The effective batch size and the number of steps stay the same. Raises `UserError` if `on_oom` is stop,
    if several processes train, because the others did not run out of memory, or if nothing is left to shrink; the
    message has the planned memory, the `seen_gib` that were reserved, and the nearest config that fits.
    """
    seen = f"{seen_gib:.1f} GiB were reserved"
    if config.on_oom == "shrink" and distributed.count() == 1:
        if config.batch_size > 1:
            smaller = next(size for size in range(config.batch_size // 2, 0, -1) if config.effective_batch % size == 0)
            passes = config.effective_batch // smaller
            changed = config.replace(batch_size=smaller, gradient_accumulation=passes)
        else:
            changed = config.replace(gradient_checkpointing=True)
        if changed != config:
            print(f"Out of GPU memory: {seen}. Continuing with {_split(changed)}; the steps stay the same.")
            return changed
    raise UserError(
        f"memory: the GPU ran out: {_planned(config, device)}, {seen}. Fix: {_fix(config, device)}. What "
        f"was saved is in {run.path}."
    )


def _split(config: Config) -> str:
    checkpointing = ", checkpointing" if config.gradient_checkpointing else ""
    return f"batch {config.batch_size} x {config.gradient_accumulation}{checkpointing}"


def _planned(config: Config, device: Device) -> str:
    try:
        planned = plan.plan_memory(config, device)
    except UserError as error:
        return f"not planned ({error})"
    return f"{planned.total:.1f} of {planned.memory:.1f} GiB were planned"


def _fix(config: Config, device: Device) -> str:
    """Advice: the nearest config that fits and needs less memory than this one, as parameters."""
    last = ["on_oom=shrink"] if config.on_oom == "stop" and distributed.count() == 1 else []
    try:
        fitting = plan.nearest_fit(config, device)
        less = fitting and plan.plan_memory(fitting, device).total < plan.plan_memory(config, device).total
    except UserError:
        less = False
    if not less:
        return ", ".join([*last, "a smaller model", "or a GPU with more memory"])
    changed = {name: value for name, value in vars(fitting).items() if value != getattr(config, name)}
    return "; or ".join([", ".join(f"{name}={value}" for name, value in changed.items()), *last])
