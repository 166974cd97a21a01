"""Ask the base model and its adapters the same questions, side by side."""

from qlora_helpers._lazy import lazy

MODULES = {
    "Panel": "panel",  # chat panel for a notebook
    "judge": "blind",  # judge two models' answers without knowing which is which
    "load": "side_by_side",  # load the adapters of several runs on one base model
    "results": "blind",  # results of the votes in a run folder
    "show": "side_by_side",  # show saved answers in a picker, or as a table
}
__all__ = list(MODULES)
__getattr__ = lazy(__name__, MODULES)
