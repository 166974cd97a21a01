"""Memory and time of a run, planned before anything is downloaded."""

from qlora_helpers._lazy import lazy

__all__ = [
    "by_method",  # plans of the same run as full fine-tuning, LoRA and QLoRA
    "device_for",  # this machine, with the dtype chosen for a config's model
    "estimate",  # rough training time, in words
    "fastest_split",  # fastest split of a batch that fits
    "plan_memory",  # peak memory of a run by part, and whether it fits
]

__getattr__ = lazy(
    __name__,
    {
        "plan_memory": "plan",
        "by_method": "plan",
        "fastest_split": "plan",
        "device_for": "compute_dtype",
        "estimate": "step_time",
    },
)
