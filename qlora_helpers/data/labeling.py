"""Find the tokens of the answers in a tokenized conversation, by character offsets."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from qlora_helpers.data.builtin_templates import Span

IGNORE = -100  # label ignored by the cross-entropy loss


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text: start tokens that the tokenizer did not write, then its own `tokenizers.Encoding`.

    Converting all ids and offsets to Python takes a quarter as long as tokenizing, so it is done only where they are
    needed.
    """

    start: list[int]
    encoding: Any

    def __len__(self) -> int:
        return len(self.start) + len(self.encoding)

    @property
    def ids(self) -> list[int]:
        """The ids of all tokens."""
        return [*self.start, *self.encoding.ids]

    @property
    def offsets(self) -> list[Span]:
        """The start and end of each token in the text, in characters. Both are 0 for the start tokens."""
        return [(0, 0)] * len(self.start) + self.encoding.offsets

    def edge(self, place: int) -> int | None:
        """Return the number of tokens before a character, or None unless one token ends there and the next begins."""
        number = self.encoding.char_to_token(place)
        if number is None:  # after the last token, if one ends here at all
            number = len(self.encoding)
        elif self.encoding.token_to_chars(number)[0] != place:
            return None
        start, end = self.encoding.token_to_chars(number - 1) if number else (-1, 0)
        return len(self.start) + number if start < end == place else None


def token_ranges(tokens: Tokens, spans: list[Span]) -> list[Span] | None:
    """Return the first token of each span and the one after its last, or None unless all spans are whole tokens."""
    ranges = []
    for first, last in spans:
        start, stop = tokens.edge(first), tokens.edge(last)
        if start is None or stop is None:
            return None
        ranges.append((start, stop))
    return ranges


def in_ranges(ids: list[int], ranges: list[Span]) -> list[int]:
    """Return the labels of tokens: the token id inside the ranges, and -100 elsewhere."""
    labels = [IGNORE] * len(ids)
    for start, stop in ranges:
        labels[start:stop] = ids[start:stop]
    return labels


def answer_labels(ids: list[int], offsets: list[Span], spans: list[Span], text: str) -> tuple[list[int], bool]:
    """Return the labels of tokens of any offsets, and whether a token straddles the edge of a span.

    A label is the token id inside the spans and -100 elsewhere. A token can also cover the space after a span: some
    end tokens absorb it.

    Some tokenizers trim spaces from their offsets. A token is therefore assumed to start where the previous one ended,
    unless both are parts of one character.
    """
    labels, previous, straddling = [], 0, False
    remaining = iter(spans)
    first, last = next(remaining, (0, 0))
    for token, (start, end) in zip(ids, offsets, strict=True):
        begin = start if start < end <= previous else previous
        while begin >= last > 0 and end > last:
            first, last = next(remaining, (0, 0))
        inside = first <= begin < last and (end <= last or text[last:end].isspace())
        straddling |= not inside and begin < last and end > first
        labels.append(token if inside else IGNORE)
        previous = max(previous, end)
    return labels, straddling


def tokenize_apart(
    text: str, spans: list[Span], whole: list[int], tokenizer: Any
) -> tuple[list[int], list[Span]] | None:
    """Tokenize questions and answers separately, as a model meets them: the question is given, the answer generated.

    `whole` are the tokens of the undivided text. Returns ids and offsets, or None if the tokenizer then adds
    characters, as those do that put a space before every text.
    """
    edges = sorted({0, len(text), *(edge for span in spans for edge in span)})
    ids: list[int] = []
    offsets: list[Span] = []
    for start, end in pairwise(edges):
        part = tokenizer(text[start:end], add_special_tokens=False, return_offsets_mapping=True)
        ids += part["input_ids"]
        offsets += [(start + first, start + last) for first, last in part["offset_mapping"]]
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    head = whole[: len(whole) - len(plain)]
    if tokenizer.decode(ids) != tokenizer.decode(plain):
        return None
    return head + ids, [(0, 0)] * len(head) + offsets
