"""Training batches for a CPU: the model computes no padding, and logits only where a token is trained.

Everything still goes through the model's own forward pass and its own loss. A GPU uses TRL's padded batches: there a
step costs the same time with or without the padding.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qlora_helpers.data.prompts import IGNORE
from qlora_helpers.device import Device

Features = list[dict[str, list[int]]]
Batch = dict[str, Any]  # keyword arguments of the model
Collator = Callable[[Features], Batch]
# What a token costs beside its logits, in units of width x layers operations. A block has about 12 x width^2 weights.
# Attention takes so much for each token that a line is long: forward, and 2.5 times that backward, at half the speed of
# large products. The causal kernel skips half of it; with a mask nothing is skipped.
BLOCK_WEIGHTS, MASKED, CAUSAL = 12, 6, 3
ROWS_OF_CHECK = (11, 7, 11)  # tokens of the rows with which a shortcut is checked: two, and another first one
TOLERANCE = 1e-4  # nats that a shortcut may be from the plain forward pass, in float32
LEAK = 1e-6  # share of the loss by which another row may move it: exactly 0 is expected
ROUNDING = 0.01  # share of the loss that rounding to 16 bits may add to that: 0.2% was seen


@dataclass(frozen=True)
class Lines:
    """A collator that lays the rows of a batch end to end on one or more lines, with little or no padding.

    Positions start again at every row, and transformers keeps rows apart by them: no row attends to another. One line
    has no padding, but attention is quadratic in its length; a line per row is the usual padded batch. The number of
    lines is the one that costs least. Logits are computed at trained positions only.

    `width` is the model's hidden size, `layers` its blocks, `words` its vocabulary.
    """

    width: int
    layers: int
    words: int

    def __call__(self, features: Features) -> Batch:
        """A batch as keyword arguments of the model."""
        layouts = [deal(features, number) for number in range(1, len(features) + 1)]
        return on_lines(min(layouts, key=self.cost))

    def cost(self, lines: list[Features]) -> float:
        """Time of a step on these lines, in units of `width` x `layers` operations."""
        length = max(map(_length, lines))
        area = length * len(lines)
        attention = MASKED if any(len(line) > 1 for line in lines) else CAUSAL
        logits = len(_trained_columns(lines)) * len(lines) * self.words / self.layers
        return BLOCK_WEIGHTS * self.width * area + logits + attention * area * length


def deal(features: Features, number: int) -> list[Features]:
    """The rows on so many lines of nearly equal length: the longest row first, each to the shortest line."""
    lines: list[Features] = [[] for _ in range(number)]
    for row in sorted(features, key=lambda row: -len(row["input_ids"])):
        min(lines, key=_length).append(row)
    return lines


def _length(line: Features) -> int:
    return sum(len(row["input_ids"]) for row in line)


def _trained_columns(lines: list[Features]) -> set[int]:
    """Columns whose next token is trained on any line."""
    found: set[int] = set()
    for line in lines:
        start = 0
        for row in line:
            found |= {start + place for place, label in enumerate(row["labels"][1:]) if label != IGNORE}
            start += len(row["input_ids"])
    return found


def on_lines(lines: list[Features]) -> Batch:
    """Lines filled up on the right to the longest: shape (lines, tokens). `position_ids` start at 0 in every row."""
    longest = max(map(_length, lines))
    ids, labels, positions = [], [], []
    for line in lines:
        gap = longest - _length(line)
        ids.append([token for row in line for token in row["input_ids"]] + [0] * gap)
        labels.append([label for row in line for label in (IGNORE, *row["labels"][1:])] + [IGNORE] * gap)
        positions.append([place for row in line for place in range(len(row["input_ids"]))] + list(range(gap)))
    # The filling comes last and is not trained on: causal attention alone keeps it out of everything that counts. So
    # one row on each line needs neither positions nor a mask.
    own = {"position_ids": torch.tensor(positions)} if any(len(line) > 1 for line in lines) else {}
    columns = torch.tensor(sorted(_trained_columns(lines)), dtype=torch.long)
    whole = torch.tensor(labels)
    following = torch.nn.functional.pad(whole[:, 1:], (0, 1), value=IGNORE)[:, columns]
    return {
        "input_ids": torch.tensor(ids),
        "labels": whole,
        "shift_labels": following,
        "logits_to_keep": columns,
        # With a cache, transformers would take the positions for those of one row, and let the rows see each other.
        "use_cache": False,
        **own,
    }


def flat(features: Features) -> Batch:
    """All rows on one line."""
    return on_lines([features])


def padded(features: Features) -> Batch:
    """Every row on a line of its own, filled up to the longest."""
    return on_lines([[row] for row in features])


def collator(model: Any, device: Device) -> Collator | None:
    """The cheapest collator under which `model` computes the same loss; None for TRL's own.

    The check runs two short rows through the model: see `same_loss`.
    """
    if device.kind != "cpu" or not _takes_columns(model):
        return None
    rounding = 0.0 if device.dtype == "float32" else ROUNDING
    if same_loss(model, flat, rounding):
        text = model.config.get_text_config()
        return Lines(text.hidden_size, text.num_hidden_layers, text.vocab_size)
    return padded if same_loss(model, padded, rounding) else None


def _takes_columns(model: Any) -> bool:
    """Whether the model's forward pass can leave out logits, and takes labels that are shifted already."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = inspect.signature(inner.forward).parameters
    takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    return "logits_to_keep" in known and takes_more


def same_loss(model: Any, collate: Collator, rounding: float = 0.0) -> bool:
    """Whether the batch that `collate` makes of two rows gives the mean of the model's own losses over each row by
    itself, and whether another first row leaves the loss of the second as it was.

    The first may be off by `TOLERANCE` nats and the share `rounding` of the loss. The second test finds models that
    carry a state from one row to the next; it is exact in any dtype, since what is masked counts as zero.
    """
    words = model.config.get_text_config().vocab_size
    first, second, other = (_row(size, step, words) for step, size in zip((31, 37, 41), ROWS_OF_CHECK, strict=True))
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            rows = (torch.tensor([ids]) for ids in (first, second))
            plain = [model(input_ids=row, labels=row).loss.item() for row in rows]
            together = _loss(model, collate([_trained(first), _trained(second)]))
            after = [_loss(model, collate([_silent(row), _trained(second)])) for row in (first, other)]
    finally:
        model.train(was_training)
    counts = [len(first) - 1, len(second) - 1]  # the first token of a row is not predicted
    own = sum(loss * count for loss, count in zip(plain, counts, strict=True)) / sum(counts)
    return abs(together - own) <= TOLERANCE + rounding * own and abs(after[0] - after[1]) <= LEAK * own


def _row(size: int, step: int, words: int) -> list[int]:
    return [(7 + step * place * (place + 1)) % words for place in range(size)]


def _trained(ids: list[int]) -> dict[str, list[int]]:
    return {"input_ids": ids, "labels": ids}


def _silent(ids: list[int]) -> dict[str, list[int]]:
    return {"input_ids": ids, "labels": [IGNORE] * len(ids)}


def _loss(model: Any, batch: Batch) -> float:
    return model(**batch).loss.item()
