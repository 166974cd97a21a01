"""From peak memory to an answer: does the run fit, what to change first, and the fastest split of a batch that fits."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from qlora_helpers.config import Config
from qlora_helpers.device import Device
from qlora_helpers.errors import UserError, nearest
from qlora_helpers.planning import architectures, gpus, memory, step_time
from qlora_helpers.planning.gpus import CONTEXT_GIB, GPUS, Gpu
from qlora_helpers.planning.memory import GIB, METHODS

TIGHT = 0.9  # of the card: nearer to its end than this, the arithmetic's own error decides


@dataclass(frozen=True)
class Advice:
    """One change: what it saves at the peak, and how long a step then takes against now."""

    change: str
    saves_gib: float
    time: float
    settings: dict[str, Any]

    def __str__(self) -> str:
        slower = "no slower" if self.time <= 1.02 else f"a step takes about {self.time:.1f} times as long"
        return f"{self.change}: saves {self.saves_gib:.1f} GiB; {slower}"


@dataclass(frozen=True)
class Plan:
    """Peak memory of one run, in GiB by part, in training and in evaluation, and whether the device has it.

    `context` is what CUDA takes on the card outside torch. `memory` is the card's, None if no device was named.
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

    @property
    def peak(self) -> float:
        """The most that torch takes, in training or in evaluation."""
        return max(sum(self.training.values()), sum(self.evaluation.values()))

    @property
    def total(self) -> float:
        """Peak of the whole run on the card, CUDA's own share included."""
        return self.peak + self.context

    @property
    def fits(self) -> bool:
        """Whether the device has so much; with no device named, nothing says that it has not."""
        return self.memory is None or self.total <= self.memory

    @property
    def verdict(self) -> str:
        """Fits, tight, or does not fit."""
        if self.memory is None:
            return "no device named"
        if not self.fits:
            return "does not fit"
        return "tight" if self.total > TIGHT * self.memory else "fits"

    @property
    def words(self) -> str:
        """The verdict with its numbers."""
        return f"{self.verdict}: {self.total:.2f} GiB" + (f" of {self.memory:.2f}" if self.memory else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, GiB rounded to megabytes."""
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
        }


def plan_memory(config: Config, device: Device | str | float | None = None, method: str | None = None) -> Plan:
    """Peak memory of `config` on `device`: a `Device`, a card's name such as t4, or GiB; no device, no verdict.

    `method` is qlora, lora or full; if None, as the config says. Full fine-tuning keeps weights, gradients and AdamW's
    moments in 16 bits, 8 bytes a parameter. Every row counts as long as rows may be. Raises `UserError` for a model
    without config and for settings that the model cannot have.
    """
    workload = memory.workload_of(config, method)
    gpu = None if device is None else gpu_of(device, config)
    plan = Plan(
        model=config.model,
        parameters=workload.shape.parameters,
        trained=memory.trained_parameters(workload),
        method=method or memory.method_of(config),
        training=_gib(memory.training_parts(workload)),
        evaluation=_gib(memory.evaluation_parts(workload)),
        context=gpu.context if gpu else CONTEXT_GIB,
        memory=gpu.memory if gpu else None,
        advice=[],
    )
    if gpu is None or workload.full or plan.verdict == "fits":
        return plan
    return replace(plan, advice=_advice(workload.config, plan, gpu))


def by_method(config: Config, device: Device | str | float | None = None) -> dict[str, Plan]:
    """The same run as full fine-tuning, LoRA and QLoRA."""
    return {method: plan_memory(config, device, method) for method in METHODS}


def fastest_split(config: Config, device: Device | str | float) -> Config:
    """The same effective batch, split and checkpointed as it is fastest among the splits that fit; those that are tight
    come after the others. If none fits, the one that takes least: the run will say so.
    """
    gpu = gpu_of(device, config)
    order = {"fits": 0, "tight": 1}
    planned = [(plan_memory(split, device), split) for split in _splits(config)]
    fitting = [(order[plan.verdict], step_time.seconds(split, gpu), split) for plan, split in planned if plan.fits]
    if fitting:
        return min(fitting, key=lambda item: item[:2])[2]
    return min(planned, key=lambda item: item[0].total)[1]


def preset_on(preset: str, model: str | None, **params: Any) -> Config:
    """A published run, or its recipe on another model: then on that model's usual layers, if none are named."""
    if model is not None:
        params = {"target_modules": architectures.load(model).usual_targets, **params, "model": model}
    return Config.preset(preset, **params)


def nearest_fit(config: Config, device: Device | str | float) -> Config | None:
    """The first setting that fits when the batch is split, then the base packed, then rows cut shorter; if any does."""
    while config.max_length >= 64:
        for stored in dict.fromkeys((config.quantization, "nf4")):
            found = fastest_split(config.replace(quantization=stored), device)
            if plan_memory(found, device).fits:
                return found
        config = config.replace(max_length=config.max_length // 2)
    return None


def _splits(config: Config) -> Iterator[Config]:
    total = config.effective_batch
    sizes = [size for size in range(total, 0, -1) if total % size == 0]
    for checkpointing in (False, True):
        for size in sizes:
            yield config.replace(
                batch_size=size, gradient_accumulation=total // size, gradient_checkpointing=checkpointing
            )


def gpu_of(device: Device | str | float, config: Config) -> Gpu:
    """The card that is meant. A run that is held to less memory has less."""
    if isinstance(device, str):
        if device not in GPUS:
            raise UserError(f"device: there is no '{device}'.{nearest(device, GPUS)}")
        return GPUS[device]
    total = device.memory_gib if isinstance(device, Device) else device
    if not total > 0:
        raise UserError(f"memory: {total:g} GiB is no budget. Fix: the card's memory, such as 16.")
    gpu = gpus.of_memory(total)
    if isinstance(device, Device) and config.memory_limit_gib is not None:
        return replace(gpu, memory=min(total, config.memory_limit_gib + gpu.context))
    return gpu


def _gib(parts: dict[str, float]) -> dict[str, float]:
    return {name: size / GIB for name, size in parts.items()}


def _advice(config: Config, plan: Plan, gpu: Gpu) -> list[Advice]:
    """Changes that save something, those first that save most for the time they cost."""
    found, now = [], step_time.seconds(config, gpu)
    for change, settings in _changes(config):
        changed = config.replace(**settings)
        saved = plan.peak - plan_memory(changed).peak
        if saved > 0.01 * plan.total:
            found.append(Advice(change, saved, step_time.seconds(changed, gpu) / now, settings))
    return sorted(found, key=lambda item: -item.saves_gib / (max(item.time, 1) - 0.9))


def _changes(config: Config) -> Iterator[tuple[str, dict[str, Any]]]:
    if config.quantization == "none":
        yield "quantization=nf4, the base in 4 bits", {"quantization": "nf4"}
    if not config.gradient_checkpointing:
        yield "gradient_checkpointing=true", {"gradient_checkpointing": True}
    if config.batch_size > 1 and config.batch_size % 2 == 0:
        half = {"batch_size": config.batch_size // 2, "gradient_accumulation": config.gradient_accumulation * 2}
        yield f"batch_size={half['batch_size']}, gradient_accumulation={half['gradient_accumulation']}", half
    if config.optimizer == "adamw_torch":
        yield "optimizer=paged_adamw_8bit", {"optimizer": "paged_adamw_8bit"}
    if config.max_length >= 128:
        length = config.max_length // 2
        yield f"max_length={length}, longer rows are cut", {"max_length": length}
    if config.bias != "none":
        yield "bias=none", {"bias": "none"}
