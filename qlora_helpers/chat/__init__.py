"""Ask the base model and its adapters the same questions, side by side."""

from qlora_helpers._lazy import lazy

__all__ = [
    "Panel",  # chat panel for a notebook
    "load",  # load the adapters of several runs on one base model
    "show",  # show saved answers in a picker, or as a table
]

__getattr__ = lazy(__name__, {"load": "side_by_side", "show": "side_by_side", "Panel": "panel"})
