"""Plans to look at: tables of parts, of settings and of cards, and an answer in words."""

from collections.abc import Iterable
from typing import Any

from qlora_helpers import plan
from qlora_helpers.config import Config
from qlora_helpers.plan import CARDS, Plan


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
        return f"{head}\nFits on: {', '.join(cards(found)) or 'none of ' + ', '.join(CARDS)}."
    words = f"{found.verdict}: {found.total:.2f} of {found.memory:.2f} GiB"
    return "\n".join([head, words, *(f"- {advice}" for advice in found.advice)])


def cards(found: Plan) -> list[str]:
    """The known cards that have enough memory, the smallest first."""
    used = found.total - found.context
    return [name for name, (size, context) in CARDS.items() if used + context <= size]


def grid(
    configs: dict[str, Config], splits: Iterable[tuple[int, int]], devices: dict[str, str | float]
) -> list[dict[str, Any]]:
    """A line for each config at each batch size and length: the peak in GiB, and whether each device has it."""
    lines = []
    for name, config in configs.items():
        for batch, length in splits:
            setting = config.replace(batch_size=batch, max_length=length)
            found = {device: plan.plan_memory(setting, where) for device, where in devices.items()}
            torchs = max(
                sum(p.values()) for p in (found[next(iter(found))].training, found[next(iter(found))].evaluation)
            )
            verdicts = {device: one.verdict for device, one in found.items()}
            lines.append({"run": name, "batch": batch, "tokens": length, "GiB": torchs, **verdicts})
    return lines


def methods(configs: dict[str, Config]) -> list[dict[str, Any]]:
    """A line a model: GiB of full fine-tuning, LoRA and QLoRA, and the smallest known card that has so much."""
    lines = []
    for name, config in configs.items():
        line: dict[str, Any] = {"model": name}
        for method, found in plan.side_by_side(config).items():
            line |= {f"{method} GiB": found.total, f"{method} on": next(iter(cards(found)), "more than one card")}
        lines.append(line)
    return lines
