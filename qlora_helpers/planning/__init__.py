"""Memory and time of a run, planned before anything is downloaded."""

from qlora_helpers._lazy import lazy

_MODULES = {
    "by_method": "plan",  # plans of the same run as full fine-tuning, LoRA and QLoRA
    "device_for": "compute_dtype",  # this machine, with the dtype chosen for a config's model
    "estimate": "step_time",  # rough training time, in words
    "fastest_split": "plan",  # fastest split of a batch that fits
    "plan_memory": "plan",  # peak memory of a run by part, and whether it fits
}
__all__ = list(_MODULES)
__getattr__ = lazy(__name__, _MODULES)
