"""Ask the base model and the adapters, side by side."""

from qlora_helpers._lazy import lazy

__all__ = [
    "Panel",  # a chat panel for a notebook
    "load",  # the models of some runs on one base in memory
    "show",  # saved answers in a picker, or as a table
]

__getattr__ = lazy(__name__, {"load": "side_by_side", "show": "side_by_side", "Panel": "panel"})
