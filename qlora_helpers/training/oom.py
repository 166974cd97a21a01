"""A run and its GPU's memory: the split of the batch that fits, and what happens when memory runs out all the same."""

import gc

from qlora_helpers.config import Config
from qlora_helpers.device import Device, forget_peak
from qlora_helpers.errors import UserError
from qlora_helpers.planning import plan
from qlora_helpers.runs import RunFolder


def choose_split(config: Config, device: Device) -> Config:
    """With `auto_batch` on a GPU, the fastest split of the effective batch that the plan says fits; else as it is."""
    if not config.auto_batch or device.kind != "cuda":
        return config
    try:
        found = plan.fastest_split(config, device)
    except UserError as error:
        print(f"auto_batch: not planned, so as published: {_split(config)}. {error}")
        return config
    words = plan.plan_memory(found, device).words
    print(f"auto_batch: {_split(found)} {words}. As published: {_split(config)} (auto_batch=false).")
    return found


def announce(config: Config, device: Device) -> None:
    """On a GPU, before the weights are loaded: whether the plan says that they and the run fit, else what to change."""
    if device.kind != "cuda":
        return
    try:
        found = plan.plan_memory(config, device)
    except UserError as error:
        print(f"Memory is not planned: {error}")
        return
    print(*["Memory: " + found.words, *(f"- {advice}" for advice in found.advice)], sep="\n")


def is_oom_error(error: RuntimeError) -> bool:
    """Whether the GPU ran out of memory: torch says so with an error of its own, CUDA and cuBLAS in words."""
    import torch

    words = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(word in str(error) for word in words)


def shrink(config: Config, device: Device, run: RunFolder, seen_gib: float) -> Config:
    """What to go on with after the GPU ran out of memory: half the batch and twice the passes, or checkpointing.

    The effective batch and the steps stay what they were. Raises `UserError`, with what was planned, the `seen_gib`
    that were reserved and the nearest setting that fits, if `on_oom` is stop or nothing is left to shrink.
    """
    seen = f"{seen_gib:.1f} GiB were reserved"
    if config.on_oom == "shrink":
        if config.batch_size > 1:
            smaller = next(size for size in range(config.batch_size // 2, 0, -1) if config.effective_batch % size == 0)
            passes = config.effective_batch // smaller
            found = config.replace(batch_size=smaller, gradient_accumulation=passes)
        else:
            found = config.replace(gradient_checkpointing=True)
        if found != config:
            print(f"Out of GPU memory: {seen}. Going on with {_split(found)}: the same steps.")
            return found
    raise UserError(
        f"memory: the GPU ran out: {_planned(config, device)}, {seen}. Fix: {_fix(config, device)}. What "
        f"was saved stays in {run.path}."
    )


def free(device: Device) -> None:
    """Give the memory of a run that failed back to the GPU."""
    gc.collect()
    forget_peak(device)


def _split(config: Config) -> str:
    checkpointing = ", checkpointing" if config.gradient_checkpointing else ""
    return f"batch {config.batch_size} x {config.gradient_accumulation}{checkpointing}"


def _planned(config: Config, device: Device) -> str:
    try:
        found = plan.plan_memory(config, device)
    except UserError as error:
        return f"not planned ({error})"
    return f"{found.total:.1f} of {found.memory:.1f} GiB were planned"


def _fix(config: Config, device: Device) -> str:
    """The nearest setting that fits and takes less than what ran out, as parameters."""
    last = ["on_oom=shrink"] if config.on_oom == "stop" else []
    try:
        fitting = plan.nearest_fit(config, device)
        less = fitting and plan.plan_memory(fitting, device).total < plan.plan_memory(config, device).total
    except UserError:
        less = False
    if not less:
        return ", ".join([*last, "a smaller model", "or a GPU with more memory"])
    changed = {name: value for name, value in vars(fitting).items() if value != getattr(config, name)}
    return "; or ".join([", ".join(f"{name}={value}" for name, value in changed.items()), *last])
