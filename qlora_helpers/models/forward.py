"""The model's own forward pass, without the logits that nobody reads."""

import inspect
from typing import Any

import torch


def inner(model: Any) -> Any:
    """Return the base model of an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def accepts(model: Any, argument: str) -> bool:
    """Whether the forward pass of a model, or of the base model of an adapter, has an argument of this name."""
    return argument in inspect.signature(inner(model).forward).parameters


def logits_at(model: Any, ids: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return the logits of `ids` (rows, tokens) at some columns: (rows, columns, vocabulary).

    They come from the model's own forward pass, so they include whatever a family does after its output head. Models
    that can leave out logits compute only these.
    """
    # A trainer wraps the forward pass of the adapter's model to return float32, which takes three times the memory.
    model = inner(model)
    options = {"logits_to_keep": columns} if accepts(model, "logits_to_keep") else {}
    logits: torch.Tensor = model(input_ids=ids, use_cache=False, **options).logits
    return logits if logits.shape[1] == len(columns) else logits[:, columns]  # some families ignore the argument
