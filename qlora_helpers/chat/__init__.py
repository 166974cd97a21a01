"""Ask the base model and its adapters the same questions, side by side."""

from qlora_helpers._lazy import lazy

__all__ = [
    "Panel",  # chat panel for a notebook
    "judge",  # judge two models' answers without knowing which is which
    "load",  # load the adapters of several runs on one base model
    "results",  # results of the votes in a run folder
    "show",  # show saved answers in a picker, or as a table
]

__getattr__ = lazy(
    __name__,
    {"load": "side_by_side", "show": "side_by_side", "Panel": "panel", "judge": "blind", "results": "blind"},
)
