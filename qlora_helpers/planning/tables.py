"""Plans to look at: tables of parts, of settings and of cards, and an answer in words."""

from collections.abc import Iterable
from typing import Any

from qlora_helpers.config import Config
from qlora_helpers.planning import measurements, plan, step_time
from qlora_helpers.planning.gpus import GPUS
from qlora_helpers.planning.plan import Plan

TIME_SOURCE = (
    "By arithmetic fitted to steps measured on an H100, rows as long as rows may be; other cards are scaled by their\n"
    "published speed, which they seldom reach (a published T4 run took 4.7 times as long): read this as the least."
)


def parts(plans: dict[str, Plan]) -> list[dict[str, Any]]:
    """Peak memory in GiB, a line a part and a column a method."""
    names = dict.fromkeys(name for found in plans.values() for name in found.training)
    lines = {name: [found.training.get(name, 0.0) for found in plans.values()] for name in names}
    lines["training"] = [sum(found.training.values()) for found in plans.values()]
    lines["evaluation"] = [sum(found.evaluation.values()) for found in plans.values()]
    lines["CUDA context"] = [found.context for found in plans.values()]
    lines["total"] = [found.total for found in plans.values()]
    return [{"GiB": name, **dict(zip(plans, sizes, strict=True))} for name, sizes in lines.items()]


def table(plans: dict[str, Plan]) -> str:
    """The parts as text."""
    head = f"{'GiB at the peak of training':<28}" + "".join(f"{name:>9}" for name in plans)
    lines = [f"{line['GiB']:<28}" + "".join(f"{line[name]:>9.2f}" for name in plans) for line in parts(plans)]
    return "\n".join([head, *lines])


def answer(found: Plan) -> str:
    """What the plan says, in words, with what to change first."""
    head = f"{found.model}, {found.method}: {found.parameters:,} parameters, {found.trained:,} of them trained."
    if found.memory is None:
        return f"{head}\nFits on: {', '.join(other_gpus(found)) or 'none of ' + ', '.join(GPUS)}."
    return "\n".join([head, found.words, *(f"- {advice}" for advice in found.advice)])


def training_time(
    config: Config, found: Plan, device: str | float | None, n_rows: Iterable[int]
) -> list[dict[str, Any]]:
    """Steps and hours of training, a line for each number of rows, on `device` or else on the smallest known card that
    fits; nothing if none does.
    """
    gpu = None if device is None else plan.gpu_of(device, config)
    name = device if isinstance(device, str) else f"a GPU of {gpu.memory:g} GiB" if gpu else None
    if gpu is None and (fitting := other_gpus(found)):
        name, gpu = fitting[0], GPUS[fitting[0]]
    if gpu is None:
        return []
    step = step_time.seconds(config, gpu, found.method) if found.method != "full" else None
    lines = []
    for rows in n_rows:
        steps = config.steps(rows)
        hours = None if step is None else steps * step / 3600
        lines.append({"rows": rows, "epochs": config.epochs, "steps": steps, "hours": hours, "on": name})
    return lines


def time_table(lines: list[dict[str, Any]]) -> str:
    """Those lines as text, with where the hours come from."""
    if not lines or lines[0]["hours"] is None:
        return "Hours: no estimate for this method, or no known card that fits."
    body = [
        f"{line['rows']:>10,}{line['epochs']:>8}{line['steps']:>10,}{step_time.in_words(line['hours'] * 3600):>10}"
        for line in lines
    ]
    head = f"{'rows':>10}{'epochs':>8}{'steps':>10}{'time':>10}  on {lines[0]['on']}"
    return "\n".join([head, *body, TIME_SOURCE])


def other_gpus(found: Plan) -> list[str]:
    """The known cards that have enough memory, the smallest first."""
    return [name for name, gpu in GPUS.items() if found.peak + gpu.context <= gpu.memory]


def grid(
    configs: dict[str, Config], splits: Iterable[tuple[int, int]], devices: dict[str, str | float]
) -> list[dict[str, Any]]:
    """A line for each config at each batch size and length: what torch takes in GiB, and whether each device has it."""
    return [
        {"run": name, "batch": batch, "tokens": length}
        | _verdicts(config.replace(batch_size=batch, max_length=length), devices)
        for name, config in configs.items()
        for batch, length in splits
    ]


def fitting(configs: dict[str, Config]) -> list[dict[str, Any]]:
    """A line a preset: what torch takes in GiB, and whether each known card has it."""
    devices: dict[str, str | float] = {gpu: gpu for gpu in GPUS}
    return [{"preset": name} | _verdicts(config, devices) for name, config in configs.items()]


def _verdicts(config: Config, devices: dict[str, str | float]) -> dict[str, Any]:
    verdicts = {name: plan.plan_memory(config, device).verdict for name, device in devices.items()}
    return {"GiB": plan.plan_memory(config).peak, **verdicts}


def methods(configs: dict[str, Config]) -> list[dict[str, Any]]:
    """A line a model: GiB of full fine-tuning, LoRA and QLoRA, and the smallest known card that has so much."""
    lines = []
    for name, config in configs.items():
        line: dict[str, Any] = {"model": name}
        for method, found in plan.by_method(config).items():
            line |= {f"{method} GiB": found.total, f"{method} on": next(iter(other_gpus(found)), "more than one card")}
        lines.append(line)
    return lines


def trials(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was measured, a line a setting: GiB reserved in training, or that it ran out, and what was planned."""
    return [
        {
            "model": line["model"],
            "r": line["rank"],
            "bias": line["bias"],
            "batch": line["batch_size"],
            "tokens": line["max_length"],
            "GPU held to (GiB)": line.get("limit_gib", "–"),
            "measured GiB": round(line["train_reserved"], 2) if line["fits"] else "out of memory",
            "planned GiB": measurements.predicted(line)["train"],
        }
        for line in lines
    ]


def timings(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Seconds a step as measured and by arithmetic, a line a setting."""
    return [
        {
            "model": line["model"],
            "base": "16-bit" if line["quantization"] == "none" else "4-bit",
            "batch": line["batch_size"],
            "tokens": line["max_length"],
            "checkpointing": line["checkpointing"],
            "measured s": line["seconds_per_step"],
            "arithmetic s": step_time.seconds(measurements.config_of(line), GPUS["h100"]),
        }
        for line in lines
    ]


def hours(configs: dict[str, Config], rows: Iterable[int]) -> list[dict[str, Any]]:
    """A line a model and method, LoRA and QLoRA: the smallest known card that has the memory, and hours on it for so
    many rows, by arithmetic. Where no card has it, no hours.
    """
    lines = []
    for name, config in configs.items():
        for method in ("lora", "qlora"):
            fitting = other_gpus(plan.plan_memory(config, method=method))
            line: dict[str, Any] = {"model": name, "method": method, "card": next(iter(fitting), "more than one card")}
            for number in rows:
                steps = config.epochs * number / config.effective_batch
                taken = steps * step_time.seconds(config, GPUS[fitting[0]], method) / 3600 if fitting else None
                line[f"{number:,} rows"] = f"{taken:.1f} h" if taken is not None else "–"
            lines.append(line)
    return lines
