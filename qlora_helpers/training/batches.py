"""Training batches for a CPU: rows are packed without padding, and logits are computed only for trained tokens.

Every batch still goes through the model's own forward pass and loss. On a GPU, TRL's padded batches are used: there a
step takes the same time with or without padding.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qlora_helpers import distributed
from qlora_helpers.data.prompts import IGNORE, Example
from qlora_helpers.data.streaming import Stream
from qlora_helpers.device import Device
from qlora_helpers.errors import UserError
from qlora_helpers.models import forward

Features = list[dict[str, list[int]]]
Batch = dict[str, Any]  # keyword arguments of the model
Collator = Callable[[Features], Batch]
# Cost of a token without its logits, in units of width x layers operations. A block has about 12 x width^2 weights. The
# cost of attention is MASKED or CAUSAL times the length of the line: a forward pass, and a backward pass of 2.5 times
# that, at half the speed of large products. The causal kernel skips half of it; a mask skips nothing.
BLOCK_WEIGHTS, MASKED, CAUSAL = 12, 6, 3
CHECK_LENGTHS = (11, 7, 11)  # tokens of the rows that check a collator: two rows, and another first row
TOLERANCE = 1e-4  # nats by which a collator's loss may differ from that of the plain forward pass, in float32
LEAK = 1e-6  # share of the loss by which another row may change it; exactly 0 is expected
ROUNDING = 0.01  # share of the loss that rounding to 16 bits may add to TOLERANCE; 0.2% was measured


@dataclass(frozen=True)
class PackedRows:
    """Collator that packs the rows of a batch end to end into one or more lines, with little or no padding.

    Positions restart at 0 in every row. transformers derives the row boundaries from them, so no row attends to
    another. A single line has no padding, but attention is quadratic in its length; one line per row is the usual
    padded batch. The cheapest number of lines is chosen. Logits are computed only at trained positions. `tokens` counts
    those of the rows, without padding.

    The three sizes are those of the model: its hidden size, number of blocks and vocabulary size.
    """

    hidden_size: int
    layers: int
    vocabulary: int

    def __call__(self, features: Features) -> Batch:
        packings = [split_rows(features, number) for number in range(1, len(features) + 1)]
        return {**collate_lines(min(packings, key=self.cost)), "tokens": _length(features)}

    def cost(self, lines: list[Features]) -> float:
        """Estimate the time of a step on these lines, in units of `hidden_size` x `layers` operations."""
        length = max(map(_length, lines))
        area = length * len(lines)
        attention = MASKED if any(len(line) > 1 for line in lines) else CAUSAL
        logits = len(_trained_columns(lines)) * len(lines) * self.vocabulary / self.layers
        return BLOCK_WEIGHTS * self.hidden_size * area + logits + attention * area * length


@dataclass(frozen=True)
class Share:
    """Collator that passes this process's rows of a batch on to another collator.

    Each row is in the batch of one process. `tokens` counts those of all. A process without a row gets the beginning of
    one, untrained: it has to take part in the step, and adds nothing to the loss.
    """

    collate: Collator

    def __call__(self, features: Features) -> Batch:
        ids = features[0]["input_ids"][:2]
        own = features[distributed.rank() :: distributed.count()]
        batch = self.collate(own or [{"input_ids": ids, "labels": [IGNORE] * len(ids)}])
        return {**batch, "tokens": _length(features)} if "tokens" in batch else batch


class StreamedRows(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Rows of a stream by number, to be asked for in order: a row before the last one reads the stream anew.

    With a length and numbers, several processes share its batches and an interrupted run goes on, as with rows in
    memory. A run that goes on, and each process, reads the rows before its own ones too: which row has a number is
    known only after those before it were tokenized.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._rows, self._read = iter(stream), 0

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        if number < self._read:
            self._rows, self._read = iter(self.stream), 0
        for example in self._rows:
            self._read += 1
            if self._read > number:
                return as_features(example)
        raise UserError(f"dataset: it ends after {self._read} usable rows, and had more. Fix: leave it as it was.")


def as_features(example: Example) -> dict[str, list[int]]:
    """Return what a collator takes of a row."""
    return {"input_ids": example.input_ids, "labels": example.labels}


def split_rows(features: Features, number: int) -> list[Features]:
    """Distribute the rows over `number` lines: from the longest on, each goes to the line that is shortest so far."""
    lines: list[Features] = [[] for _ in range(number)]
    for row in sorted(features, key=lambda row: -len(row["input_ids"])):
        min(lines, key=_length).append(row)
    return lines


def _length(line: Features) -> int:
    return sum(len(row["input_ids"]) for row in line)


def _trained_columns(lines: list[Features]) -> set[int]:
    """Return the columns whose next token is trained in any line."""
    columns: set[int] = set()
    for line in lines:
        start = 0
        for row in line:
            columns |= {start + place for place, label in enumerate(row["labels"][1:]) if label != IGNORE}
            start += len(row["input_ids"])
    return columns


def collate_lines(lines: list[Features]) -> Batch:
    """Pad the lines on the right to the longest one: (lines, tokens). `position_ids` start at 0 in every row."""
    longest = max(map(_length, lines))
    ids, labels, positions = [], [], []
    for line in lines:
        gap = longest - _length(line)
        ids.append([token for row in line for token in row["input_ids"]] + [0] * gap)
        labels.append([label for row in line for label in (IGNORE, *row["labels"][1:])] + [IGNORE] * gap)
        positions.append([place for row in line for place in range(len(row["input_ids"]))] + list(range(gap)))
    # Padding comes last and is not trained, so causal attention keeps it out of the loss. If every line holds one row,
    # neither positions nor a mask are needed.
    own_positions = {"position_ids": torch.tensor(positions)} if any(len(line) > 1 for line in lines) else {}
    columns = torch.tensor(sorted(_trained_columns(lines)), dtype=torch.long)
    all_labels = torch.tensor(labels)
    shifted = torch.nn.functional.pad(all_labels[:, 1:], (0, 1), value=IGNORE)[:, columns]
    return {
        "input_ids": torch.tensor(ids),
        "labels": all_labels,
        "shift_labels": shifted,
        "logits_to_keep": columns,
        # With a cache, transformers would treat the line as a single row, and the rows would attend to each other.
        "use_cache": False,
        **own_positions,
    }


def flat(features: Features) -> Batch:
    """Collate all rows into a single line."""
    return collate_lines([features])


def padded(features: Features) -> Batch:
    """Collate every row into its own line, padded to the longest."""
    return collate_lines([[row] for row in features])


def collator(model: Any, device: Device) -> Collator | None:
    """Return the cheapest collator with which `model` computes the same loss: see `same_loss`. None for TRL's own."""
    if device.kind != "cpu" or not _takes_columns(model):
        return None
    rounding = 0.0 if device.dtype == "float32" else ROUNDING
    if same_loss(model, flat, rounding):
        text = model.config.get_text_config()
        return PackedRows(text.hidden_size, text.num_hidden_layers, text.vocab_size)
    return padded if same_loss(model, padded, rounding) else None


def _takes_columns(model: Any) -> bool:
    """Whether the model's forward pass can skip logits and accepts labels that are already shifted."""
    parameters = inspect.signature(forward.inner(model).forward).parameters
    accepts_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return "logits_to_keep" in parameters and accepts_any


def same_loss(
    model: Any, collate: Collator, rounding: float = 0.0, loss: Callable[[Batch], float] | None = None
) -> bool:
    """Whether the loss of batches from `collate` is that of the model's own forward pass on each row separately.

    `loss` computes the loss of a batch; None means the model's own forward pass.

    Two properties are checked. The loss of a batch of two rows must be the mean over the tokens of both, within
    `TOLERANCE` nats plus the share `rounding` of the loss. And the loss of the second row must not depend on the first
    one, which finds models that carry state from one row to the next. The second check is exact in any dtype, because
    masked tokens contribute zero.
    """
    vocabulary = model.config.get_text_config().vocab_size
    first, second, other = (
        [(7 + step * place * (place + 1)) % vocabulary for place in range(length)]
        for step, length in zip((31, 37, 41), CHECK_LENGTHS, strict=True)
    )
    trained = {"input_ids": second, "labels": second}
    loss_of = loss or (lambda batch: model(**batch).loss.item())
    where = model.get_input_embeddings().weight.device

    def together_in(features: Features) -> float:
        batch = collate(features).items()
        return loss_of({key: value.to(where) if torch.is_tensor(value) else value for key, value in batch})

    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            rows = (torch.tensor([ids], device=where) for ids in (first, second))
            plain = [model(input_ids=row, labels=row).loss.item() for row in rows]
            together = together_in([{"input_ids": first, "labels": first}, trained])
            untrained = ({"input_ids": row, "labels": [IGNORE] * len(row)} for row in (first, other))
            after = [together_in([row, trained]) for row in untrained]
    finally:
        model.train(was_training)
    counts = [len(first) - 1, len(second) - 1]  # the first token of a row is not predicted
    own = sum(loss * count for loss, count in zip(plain, counts, strict=True)) / sum(counts)
    return abs(together - own) <= TOLERANCE + rounding * own and abs(after[0] - after[1]) <= LEAK * own
