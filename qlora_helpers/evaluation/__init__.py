"""Losses and answers of a model, and what can be concluded from them."""

from qlora_helpers._lazy import lazy

_MODULES = {
    "base_losses": "losses",  # the same for a config's base model, measured once
    "compare": "comparison",  # all experiments against each other and the base model
    "design": "power",  # rows and runs that a comparison needs
    "difference": "comparison",  # difference of two experiments, with its interval
    "generate": "answers",  # greedy answers to prompts
    "group": "comparison",  # run folders by experiment
    "heldout_losses": "losses",  # loss of each held-out row
    "render": "model_card",  # a model card with results
    "write": "report",  # the comparison as Markdown, HTML and JSON
}
__all__ = list(_MODULES)
__getattr__ = lazy(__name__, _MODULES)
