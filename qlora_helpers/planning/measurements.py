"""What `benchmarks/memory.py` saw on a GPU, beside what the plan says: `data/memory_*.jsonl`, a line a setting."""

from statistics import median
from typing import Any

from qlora_helpers import files
from qlora_helpers.config import Config
from qlora_helpers.data import sources
from qlora_helpers.planning import architectures, memory

MOMENTS = ("train", "heldout", "answers")
SETTINGS = ("model", "quantization", "double_quant", "rank", "bias", "batch_size", "max_length", "optimizer")
HELDOUT_ROWS, ANSWERS, NEW_TOKENS = 8, 16, 32  # of each setting's evaluation, whatever a run of its own would choose


def read(name: str) -> list[dict[str, Any]]:
    """The measured settings of one table: `settings`, `reproduction` or `speed`."""
    return files.read_jsonl(sources.own_data(f"memory_{name}_measured.jsonl"))


def config_of(setting: dict[str, Any]) -> Config:
    """The run that a setting describes."""
    targets = {"q,v": architectures.load(setting["model"]).usual_targets, "all": ("all-linear",)}[setting["targets"]]
    return Config.from_params(
        profile="gpu",
        compute_dtype=setting["dtype"],
        target_modules=targets,
        gradient_checkpointing=setting["checkpointing"],
        max_new_tokens=NEW_TOKENS,
        **{name: setting[name] for name in SETTINGS},
    )


def predicted(setting: dict[str, Any]) -> dict[str, float]:
    """Peak reserved memory in GiB of training, of held-out losses and of answers, by the plan."""
    workload = memory.workload_of(config_of(setting))
    parts = {
        "train": memory.training_parts(workload),
        "heldout": memory.heldout_parts(workload, HELDOUT_ROWS),
        "answers": memory.answer_parts(workload, ANSWERS),
    }
    return {moment: sum(sizes.values()) / memory.GIB for moment, sizes in parts.items()}


def peaks(line: dict[str, Any], moments: tuple[str, ...] = MOMENTS) -> tuple[float, float]:
    """Planned and measured peak over `moments`, in GiB."""
    planned = predicted(line)
    return max(planned[moment] for moment in moments), max(line[f"{moment}_reserved"] for moment in moments)


def error(line: dict[str, Any], moments: tuple[str, ...] = MOMENTS) -> float:
    """How far the planned peak over `moments` is off the measured one, as a share of that; above zero: too much."""
    planned, seen = peaks(line, moments)
    return planned / seen - 1


def score(lines: list[dict[str, Any]], moments: tuple[str, ...] = MOMENTS) -> dict[str, float]:
    """Number of settings, and the median and the worst size of the error."""
    off = [abs(error(line, moments)) for line in lines]
    return {"settings": len(off), "median": median(off), "worst": max(off)}
