"""Will a run fit into memory, and how long will it take?"""

from qlora_helpers._lazy import lazy

__all__ = [
    "by_method",  # the same for full fine-tuning, LoRA and QLoRA
    "device_for",  # this machine, with the dtype that suits a config's model
    "estimate",  # rough training time, in words
    "fastest_split",  # how to split a batch so that it fits
    "plan_memory",  # peak memory of a run, by part
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
