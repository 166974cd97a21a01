"""Losses and answers of a model, and what can be concluded from them."""

from qlora_helpers._lazy import lazy

__all__ = [
    "base_losses",  # the same for a config's base model, measured once
    "compare",  # all experiments against each other and the base model
    "design",  # rows and runs that a comparison needs
    "difference",  # difference of two experiments, with its interval
    "generate",  # greedy answers to prompts
    "group",  # run folders by experiment
    "heldout_losses",  # loss of each held-out row
    "render",  # a model card with results
    "write",  # the comparison as Markdown, HTML and JSON
]

__getattr__ = lazy(
    __name__,
    {
        "heldout_losses": "losses",
        "base_losses": "losses",
        "generate": "answers",
        "group": "comparison",
        "compare": "comparison",
        "design": "power",
        "difference": "comparison",
        "write": "report",
        "render": "model_card",
    },
)
