"""Memory that `benchmarks/memory.py` measured on a GPU, compared with the plan: `data/memory_*.jsonl`."""

from statistics import median
from typing import Any

from qlora_helpers import files
from qlora_helpers.config import Config
from qlora_helpers.data import sources
from qlora_helpers.planning import architectures, memory

MOMENTS = ("train", "heldout", "answers")
SETTINGS = ("model", "quantization", "double_quant", "rank", "bias", "batch_size", "max_length", "optimizer")
HELDOUT_ROWS, ANSWERS, NEW_TOKENS = 8, 16, 32  # fixed sizes of each setting's evaluation


def read(name: str) -> list[dict[str, Any]]:
    """Return the measured settings of one table: `settings`, `reproduction` or `speed`."""
    return files.read_jsonl(sources.own_data(f"memory_{name}_measured.jsonl"))


def config_of(setting: dict[str, Any]) -> Config:
    """Return the config of the run that a setting describes."""
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
    """Return the planned peak of reserved memory in GiB: in training, for held-out losses, and for answers."""
    workload = memory.workload_of(config_of(setting))
    parts = {
        "train": memory.training_parts(workload),
        "heldout": memory.heldout_parts(workload, HELDOUT_ROWS),
        "answers": memory.answer_parts(workload, ANSWERS),
    }
    return {moment: sum(sizes.values()) / memory.GIB for moment, sizes in parts.items()}


def peaks(line: dict[str, Any], moments: tuple[str, ...] = MOMENTS) -> tuple[float, float]:
    """Return the planned and the measured peak over `moments`, in GiB."""
    planned = predicted(line)
    return max(planned[moment] for moment in moments), max(line[f"{moment}_reserved"] for moment in moments)


def score(lines: list[dict[str, Any]], moments: tuple[str, ...] = MOMENTS) -> dict[str, float]:
    """Return the number of settings, and the median and the largest relative error of the planned peak, unsigned."""
    errors = [abs(planned / measured - 1) for planned, measured in (peaks(line, moments) for line in lines)]
    return {"settings": len(errors), "median": median(errors), "worst": max(errors)}
