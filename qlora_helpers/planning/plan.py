"""Decide whether a run fits, what to change first, and which split of the batch is the fastest that fits."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from qlora_helpers.config import Config
from qlora_helpers.device import Device
from qlora_helpers.errors import UserError, nearest
from qlora_helpers.planning import architectures, gpus, graphs, memory, quantization, step_time
from qlora_helpers.planning.gpus import CONTEXT_GIB, GPUS, Gpu
from qlora_helpers.planning.memory import GIB
from qlora_helpers.planning.quantization import METHODS
from qlora_helpers.planning.workload import ALONE, Parallel

TIGHT = 0.9  # fraction of the GPU's memory above which the error of the plan may decide


@dataclass(frozen=True)
class Advice:
    """One change of settings: GiB saved at the peak, and the time of a step as a multiple of the current one."""

    change: str
    saves_gib: float
    time: float
    settings: dict[str, Any]

    def __str__(self) -> str:
        slower = "no slower" if self.time <= 1.02 else f"a step takes about {self.time:.1f} times as long"
        return f"{self.change}: saves {self.saves_gib:.1f} GiB; {slower}"


@dataclass(frozen=True)
class Plan:
    """Peak memory of one run in GiB, by part, in training and in evaluation, and whether it fits the device.

    `context` is the GPU memory that CUDA takes outside torch. `memory` is that of the GPU, None if no device was given.
    With several GPUs, `parallel`, these are the numbers of each. `ram` is what all of them keep in the computer's.
    `peaks` has the peak on each path that `fast` allows, the planned one first: see `graphs.paths`.
    """

    model: str
    parameters: int
    trained: int
    method: str
    training: dict[str, float]
    evaluation: dict[str, float]
    context: float
    memory: float | None
    advice: list[Advice]
    peaks: dict[str, float]
    parallel: Parallel = ALONE
    ram: float = 0.0

    @property
    def peak(self) -> float:
        """Peak of the memory that torch reserves, in training or in evaluation."""
        return next(iter(self.peaks.values()))

    @property
    def total(self) -> float:
        """Peak memory of the run on the GPU, including the CUDA context."""
        return self.peak + self.context

    @property
    def with_graphs(self) -> float:
        """The total if `fast=auto` takes CUDA graphs, or the total where it cannot."""
        return self.peaks.get("graphs", self.peak) + self.context

    @property
    def fits(self) -> bool:
        """Whether the run fits the device. True if no device was given."""
        return self.memory is None or self.total <= self.memory

    @property
    def verdict(self) -> str:
        """fits, tight, does not fit, or no device named."""
        return self._verdict(self.total)

    def _verdict(self, total: float) -> str:
        if self.memory is None:
            return "no device named"
        if total > self.memory:
            return "does not fit"
        return "tight" if total > TIGHT * self.memory else "fits"

    @property
    def words(self) -> str:
        """The verdict with its numbers."""
        several = f" on each of {self.parallel.gpus} GPUs, {self.parallel.strategy}" if self.parallel != ALONE else ""
        ram = f", and {self.ram:.2f} GiB of the computer's memory" if self.ram else ""
        of = f" of {self.memory:.2f}" if self.memory else ""
        return f"{self.verdict}: {self.total:.2f} GiB{of}{several}{ram}{self._otherwise}"

    @property
    def _otherwise(self) -> str:
        """The verdict on the path that is not planned, unless neither fits."""
        (planned, _), *others = self.peaks.items()
        if self.memory is None or not others:
            return ""
        total = others[0][1] + self.context
        fits = total <= self.memory
        if not self.fits and not fits:
            return ""
        if planned != "off":
            return f"; with the library's steps (fast=off) {total:.2f}: {self._verdict(total)}"
        after = ", so fast=auto takes the library's steps" if not fits else ""
        return f"; with CUDA graphs {total:.2f}: {self._verdict(total)}{after}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, with GiB rounded to three decimals."""
        return {
            "model": self.model,
            "parameters": self.parameters,
            "trained": self.trained,
            "method": self.method,
            "training": {name: round(size, 3) for name, size in self.training.items()},
            "evaluation": {name: round(size, 3) for name, size in self.evaluation.items()},
            "context": self.context,
            "total": round(self.total, 3),
            "memory": self.memory,
            "fits": self.fits,
            "verdict": self.verdict,
            "advice": [str(item) for item in self.advice],
            "gpus": self.parallel.gpus,
            "strategy": self.parallel.strategy,
            "ram": round(self.ram, 3),
            "paths": {path: round(peak + self.context, 3) for path, peak in self.peaks.items()},
        }


def plan_memory(
    config: Config,
    device: Device | str | float | None = None,
    method: str | None = None,
    parallel: Parallel = ALONE,
) -> Plan:
    """Plan the peak memory of `config` on `device`: a `Device`, a GPU's name such as t4, or its memory in GiB.

    Without a device there is no verdict. `method` is qlora, lora or full; None means the config's own. Full fine-tuning
    keeps weights, gradients and AdamW's moments in 16 bits, 8 bytes per parameter. Every row counts with the maximum
    length. `parallel` are several such GPUs, which share the effective batch. With `fast=auto`, the library's steps
    decide whether the run fits, because it takes them if CUDA graphs do not. Raises `UserError` if the model's config
    cannot be loaded, if a setting is impossible for the model, or if the GPUs cannot share the batch.
    """
    workload = memory.workload_of(config, method, parallel)
    gpu = None if device is None else gpu_of(device, config)
    steps = {path: memory.training_parts(replace(workload, path=path)) for path in graphs.paths(workload)}
    evaluation = memory.evaluation_parts(workload)
    plan = Plan(
        model=config.model,
        parameters=workload.shape.parameters,
        trained=memory.trained_parameters(workload),
        method=method or quantization.method_of(config),
        training=_gib(next(iter(steps.values()))),
        evaluation=_gib(evaluation),
        context=gpu.context if gpu else CONTEXT_GIB,
        memory=gpu.memory if gpu else None,
        advice=[],
        peaks={path: max(sum(parts.values()), sum(evaluation.values())) / GIB for path, parts in steps.items()},
        parallel=parallel,
        ram=memory.offloaded(workload) / GIB,
    )
    if gpu is None or workload.full or plan.verdict == "fits":
        return plan
    return replace(plan, advice=_advice(quantization.of_method(config, method), plan, gpu))


def by_method(
    config: Config, device: Device | str | float | None = None, parallel: Parallel = ALONE
) -> dict[str, Plan]:
    """Return plans of the same run as QLoRA, LoRA and full fine-tuning, without those that the model does not allow."""
    possible = [method for method in METHODS if not quantization.refusal(quantization.of_method(config, method))]
    return {method: plan_memory(config, device, method, parallel) for method in possible}


def fastest_split(config: Config, device: Device | str | float) -> Config:
    """Return the config with its effective batch split, and checkpointing set, in the fastest way that fits.

    Splits whose verdict is tight are used only if no other fits. If none fits, return the one that needs the least
    memory; the run will report that it does not fit.
    """
    gpu = gpu_of(device, config)
    order = {"fits": 0, "tight": 1}
    planned = [(plan_memory(split, device), split) for split in _splits(config)]
    fitting = [(order[plan.verdict], step_time.seconds(split, gpu), split) for plan, split in planned if plan.fits]
    if fitting:
        return min(fitting, key=lambda item: item[:2])[2]
    return min(planned, key=lambda item: item[0].total)[1]


def preset_on(preset: str, model: str | None, **params: Any) -> Config:
    """Return a preset, or its settings with another model: then with that model's default layers, unless given."""
    if model is not None:
        params = {"target_modules": architectures.load(model).usual_targets, **params, "model": model}
    return Config.preset(preset, **params)


def nearest_fit(config: Config, device: Device | str | float) -> Config | None:
    """Return the first config that fits when splitting the batch, then truncating held-out rows like training rows,
    then quantizing the base model, then halving rows.

    Returns None if none fits with rows of 64 tokens or more.
    """
    stored = [config, *([quantized] if (quantized := _quantized(config)) else [])]
    while config.max_length >= 64:
        lengths = sorted({config.heldout_max_length, config.max_length}, reverse=True)
        for base, longest in product(stored, lengths):
            shorter = base.replace(max_length=config.max_length, heldout_max_length=longest)
            candidate = fastest_split(shorter, device)
            if plan_memory(candidate, device).fits:
                return candidate
        config = config.replace(max_length=config.max_length // 2)
    return None


def _quantized(config: Config) -> Config | None:
    """Return the config with its base model in nf4, or None if it is quantized already or the model cannot be."""
    changed = config.replace(quantization="nf4")
    return changed if config.quantization == "none" and not quantization.refusal(changed) else None


def _splits(config: Config) -> Iterator[Config]:
    total = config.effective_batch
    sizes = [size for size in range(total, 0, -1) if total % size == 0]
    for checkpointing in (False, True):
        for size in sizes:
            yield config.replace(
                batch_size=size, gradient_accumulation=total // size, gradient_checkpointing=checkpointing
            )


def gpu_of(device: Device | str | float, config: Config) -> Gpu:
    """Return the GPU of a device, with less memory if the config limits it. Raises `UserError` if there is none."""
    if isinstance(device, str):
        if device not in GPUS:
            raise UserError(f"unknown device '{device}'.{nearest(device, GPUS)}")
        return GPUS[device]
    total = device.memory_gib if isinstance(device, Device) else device
    if not total > 0:
        raise UserError(f"memory: {total:g} GiB is not positive. Fix: pass the GPU's memory, such as 16.")
    gpu = gpus.of_memory(total)
    if isinstance(device, Device) and config.memory_limit_gib is not None:
        return replace(gpu, memory=min(total, config.memory_limit_gib + gpu.context))
    return gpu


def _gib(parts: dict[str, float]) -> dict[str, float]:
    return {name: size / GIB for name, size in parts.items()}


def _advice(config: Config, plan: Plan, gpu: Gpu) -> list[Advice]:
    """Return changes that save memory, best ratio of memory saved to time lost first."""
    advice, now = [], step_time.seconds(config, gpu)
    for change, settings in _changes(config):
        changed = config.replace(**settings)
        saved = plan.peak - plan_memory(changed, parallel=plan.parallel).peak
        if saved > 0.01 * plan.total:
            advice.append(Advice(change, saved, step_time.seconds(changed, gpu) / now, settings))
    return sorted(advice, key=lambda item: -item.saves_gib / (max(item.time, 1) - 0.9))


def _changes(config: Config) -> Iterator[tuple[str, dict[str, Any]]]:
    if _quantized(config):
        yield "quantization=nf4, the base model in 4 bits", {"quantization": "nf4"}
    if not config.gradient_checkpointing:
        yield "gradient_checkpointing=true", {"gradient_checkpointing": True}
    if config.batch_size > 1 and config.batch_size % 2 == 0:
        half = {"batch_size": config.batch_size // 2, "gradient_accumulation": config.gradient_accumulation * 2}
        yield f"batch_size={half['batch_size']}, gradient_accumulation={half['gradient_accumulation']}", half
    if config.optimizer == "adamw_torch":
        yield "optimizer=paged_adamw_8bit", {"optimizer": "paged_adamw_8bit"}
    if config.max_length >= 128:
        length = config.max_length // 2
        yield f"max_length={length}, longer rows are truncated", {"max_length": length}
    if config.heldout_max_length > config.max_length:
        changed = {"heldout_max_length": config.max_length}
        yield f"heldout_max_length={config.max_length}, longer held-out rows are truncated", changed
    if config.bias != "none":
        yield "bias=none", {"bias": "none"}
