"""Plans as tables, by part, setting and GPU, and in words."""

from collections.abc import Iterable
from typing import Any

from qlora_helpers.config import Config
from qlora_helpers.planning import measurements, plan, step_time
from qlora_helpers.planning.gpus import GPUS
from qlora_helpers.planning.plan import Plan

MANY_GPUS = "more than one GPU"
TIME_SOURCE = (
    "Fitted to the library's steps (fast=off), measured on an H100 with every row at the maximum length; CUDA graphs\n"
    "are faster. Other GPUs are scaled by their published speed, which they seldom reach (a published T4 run took 4.7\n"
    "times as long): read this as a lower bound."
)


def parts(plans: dict[str, Plan]) -> list[dict[str, Any]]:
    """Return peak memory in GiB, one row per part and one column per method."""
    names = dict.fromkeys(name for planned in plans.values() for name in planned.training)
    lines = {name: [planned.training.get(name, 0.0) for planned in plans.values()] for name in names}
    lines["sum: peak in training"] = [sum(planned.training.values()) for planned in plans.values()]
    lines["peak in evaluation"] = [sum(planned.evaluation.values()) for planned in plans.values()]
    lines["CUDA context"] = [planned.context for planned in plans.values()]
    lines["total"] = [planned.total for planned in plans.values()]
    if any(planned.with_graphs != planned.total for planned in plans.values()):
        lines["total with CUDA graphs"] = [planned.with_graphs for planned in plans.values()]
    return [{"GiB": name, **dict(zip(plans, sizes, strict=True))} for name, sizes in lines.items()]


def table(plans: dict[str, Plan]) -> str:
    """Return the table of `parts` as text."""
    head = f"{'GiB at the peak of training':<28}" + "".join(f"{name:>9}" for name in plans)
    lines = [f"{line['GiB']:<28}" + "".join(f"{line[name]:>9.2f}" for name in plans) for line in parts(plans)]
    return "\n".join([head, *lines])


def answer(planned: Plan) -> str:
    """Return the result of a plan in words, with what to change first if the run does not fit."""
    head = f"{planned.model}, {planned.method}: {planned.parameters:,} parameters, {planned.trained:,} of them trained."
    if planned.memory is None:
        several = f", {planned.parallel.gpus} of them" if planned.parallel.gpus > 1 else ""
        return f"{head}\nFits on{several}: {', '.join(other_gpus(planned)) or 'none of ' + ', '.join(GPUS)}."
    return "\n".join([head, planned.words, *(f"- {advice}" for advice in planned.advice)])


def training_time(
    config: Config, planned: Plan, device: str | float | None, n_rows: Iterable[int]
) -> list[dict[str, Any]]:
    """Return steps and hours of training, one row for each number of training rows.

    They hold for `device`, or without one for the smallest known GPU that fits; for several of them if the plan does,
    without the time that they exchange data. The list is empty if none fits; hours are None for full fine-tuning.
    """
    device = next(iter(other_gpus(planned)), None) if device is None else device
    if device is None:
        return []
    gpu = plan.gpu_of(device, config)
    name = device if isinstance(device, str) else f"a GPU of {gpu.memory:g} GiB"
    if (parallel := planned.parallel).gpus > 1:
        name = f"{parallel.gpus} GPUs, each {name}, without communication"
    step = step_time.seconds(parallel.share(config), gpu, planned.method) if planned.method != "full" else None
    lines = []
    for rows in n_rows:
        steps = config.steps(rows)
        hours = None if step is None else steps * step / 3600
        lines.append({"rows": rows, "epochs": config.epochs, "steps": steps, "hours": hours, "on": name})
    return lines


def time_table(lines: list[dict[str, Any]]) -> str:
    """Return the rows of `training_time` as text, with the source of the hours."""
    if not lines or lines[0]["hours"] is None:
        return "Training time: no estimate for this method, or the run fits no known GPU."
    body = [
        f"{line['rows']:>10,}{line['epochs']:>8}{line['steps']:>10,}{step_time.in_words(line['hours'] * 3600):>10}"
        for line in lines
    ]
    head = f"{'rows':>10}{'epochs':>8}{'steps':>10}{'time':>10}  on {lines[0]['on']}"
    return "\n".join([head, *body, TIME_SOURCE])


def other_gpus(planned: Plan) -> list[str]:
    """Return the names of the known GPUs with enough memory, the smallest first."""
    return [name for name, gpu in GPUS.items() if planned.peak + gpu.context <= gpu.memory]


def grid(
    configs: dict[str, Config], splits: Iterable[tuple[int, int]], devices: dict[str, str | float]
) -> list[dict[str, Any]]:
    """Return one row per config, batch size and length: GiB that torch reserves, and the verdict for each device."""
    return [
        {"run": name, "batch": batch, "tokens": length}
        | _verdicts(config.replace(batch_size=batch, max_length=length), devices)
        for name, config in configs.items()
        for batch, length in splits
    ]


def fitting(configs: dict[str, Config]) -> list[dict[str, Any]]:
    """Return one row per preset: GiB that torch reserves, and the verdict for each known GPU."""
    devices: dict[str, str | float] = {gpu: gpu for gpu in GPUS}
    return [{"preset": name} | _verdicts(config, devices) for name, config in configs.items()]


def _verdicts(config: Config, devices: dict[str, str | float]) -> dict[str, Any]:
    verdicts = {name: plan.plan_memory(config, device).verdict for name, device in devices.items()}
    return {"GiB": plan.plan_memory(config).peak, **verdicts}


def methods(configs: dict[str, Config]) -> list[dict[str, Any]]:
    """Return one row per model: GiB with QLoRA, LoRA and full fine-tuning, and the smallest known GPU for each."""
    lines = []
    for name, config in configs.items():
        line: dict[str, Any] = {"model": name}
        for method, planned in plan.by_method(config).items():
            line |= {f"{method} GiB": planned.total, f"{method} on": next(iter(other_gpus(planned)), MANY_GPUS)}
        lines.append(line)
    return lines


def trials(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per measured setting: GiB reserved in training, or out of memory, and GiB planned."""
    return [
        {
            "model": line["model"],
            "r": line["rank"],
            "bias": line["bias"],
            "batch": line["batch_size"],
            "tokens": line["max_length"],
            "GPU limited to (GiB)": line.get("limit_gib", "–"),
            "measured GiB": round(line["train_reserved"], 2) if line["fits"] else "out of memory",
            "planned GiB": measurements.predicted(line)["train"],
        }
        for line in lines
    ]


def timings(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per measured setting: seconds of a step, measured and estimated."""
    return [
        {
            "model": line["model"],
            "base": "16-bit" if line["quantization"] == "none" else "4-bit",
            "batch": line["batch_size"],
            "tokens": line["max_length"],
            "checkpointing": line["checkpointing"],
            "measured s": line["seconds_per_step"],
            "estimated s": step_time.seconds(measurements.config_of(line), GPUS["h100"]),
        }
        for line in lines
    ]


def hours(configs: dict[str, Config], rows: Iterable[int]) -> list[dict[str, Any]]:
    """Return one row per model and method (LoRA, QLoRA): the smallest known GPU that fits, and estimated hours on it.

    There is one column of hours for each number of training rows. If no known GPU fits, there are no hours.
    """
    lines = []
    for name, config in configs.items():
        for method in ("lora", "qlora"):
            fitting = other_gpus(plan.plan_memory(config, method=method))
            line: dict[str, Any] = {"model": name, "method": method, "GPU": next(iter(fitting), MANY_GPUS)}
            for number in rows:
                steps = config.epochs * number / config.effective_batch
                taken = steps * step_time.seconds(config, GPUS[fitting[0]], method) / 3600 if fitting else None
                line[f"{number:,} rows"] = f"{taken:.1f} h" if taken is not None else "–"
            lines.append(line)
    return lines
