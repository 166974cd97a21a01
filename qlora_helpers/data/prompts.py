"""Encode rows as tokens and labels, using character offsets to find the trained tokens, and display the result."""

import html
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby, islice, pairwise
from operator import lt
from textwrap import shorten
from typing import Any

from qlora_helpers.config import BUNDLED_MODEL, Config
from qlora_helpers.data import rendering
from qlora_helpers.data.builtin_templates import Span, UnplacedAnswer
from qlora_helpers.data.schema import Row
from qlora_helpers.errors import UserError
from qlora_helpers.models import hub

IGNORE = -100  # label ignored by the cross-entropy loss
BUNDLED_POSITIONS = 8192  # of the bundled model
BATCH = 1000  # rows tokenized at once: enough to be fast, few enough to limit memory


@dataclass(frozen=True)
class Example:
    """A tokenized row.

    `input_ids`, `labels` and `offsets` have one entry per token, up to the token limit. `labels` equals `input_ids` at
    trained tokens and is -100 elsewhere. `offsets` are the start and end of each token in `text`, in characters. `cut`
    is the number of tokens beyond the limit. `problem` is the reason why the row cannot be trained on, if there is one.
    """

    row: Row
    text: str
    input_ids: list[int]
    labels: list[int]
    offsets: list[Span]
    cut: int
    problem: str | None = None

    @property
    def trained(self) -> int:
        """Number of tokens that count in the loss. The first token is never predicted, so it does not count."""
        learned = self.labels[1:]
        return len(learned) - learned.count(IGNORE)


def start_tokens(tokenizer: Any) -> list[int]:
    """Return the ids of the tokens that the tokenizer puts before a text."""
    with_special, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    starts = range(len(with_special) - len(plain) + 1)
    return next((with_special[:i] for i in starts if with_special[i : i + len(plain)] == plain), [])


def tokenize(texts: list[str], tokenizer: Any) -> tuple[list[list[int]], list[list[Span]]]:
    """Return token ids and offsets of texts rendered from one template, each with the tokenizer's start tokens once.

    The start tokens are omitted where the chat template already wrote them. An end token is never added.
    """
    encoded = tokenizer(
        texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    head = start_tokens(tokenizer)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    for number, row in enumerate(ids):
        if head and row[: len(head)] != head:
            ids[number] = head + row
            offsets[number] = [(0, 0)] * len(head) + offsets[number]
    return ids, offsets


def check_context(question: str, tokens: int, answer: int, context: int | None, fix: str) -> None:
    """Raise `UserError` if a prompt of `tokens` tokens leaves no room for `answer` more in a context of `context`.

    `context` is None if the model does not state its context length. `fix` is the advice that ends the message.
    """
    if context and tokens + answer > context:
        raise UserError(
            f"prompt: '{shorten(question, 40, placeholder=' …')}' makes a prompt of {tokens} tokens, and the model's "
            f"context of {context} has to hold {answer} of the answer too. Fix: {fix}."
        )


def encode(rows: Iterable[Row], config: Config, tokenizer: Any) -> Iterator[Example]:
    """Yield the tokens and labels of each row, in order, truncated to `max_length` tokens.

    A row that its template cannot show gets no tokens and a `problem`.
    """
    rows = iter(rows)
    template = rendering.template_of(config, tokenizer)
    while batch := list(islice(rows, BATCH)):
        rendered = [_render(template, row) for row in batch]
        tokens = zip(*tokenize([text for text, _, _ in rendered], tokenizer), strict=True)
        for row, (text, spans, problem), (ids, offsets) in zip(batch, rendered, tokens, strict=True):
            if problem:
                yield Example(row, "", [], [], [], 0, problem)
            else:
                yield _example(row, text, spans, ids, offsets, config, tokenizer)


def shortened(example: Example, limit: int) -> Example:
    """Return the example cut to `limit` tokens."""
    over = len(example.input_ids) - limit
    if over <= 0:
        return example
    ids, labels, offsets = example.input_ids[:limit], example.labels[:limit], example.offsets[:limit]
    return replace(example, input_ids=ids, labels=labels, offsets=offsets, cut=example.cut + over)


def heldout_limit(config: Config) -> int:
    """Return the maximum number of tokens of a held-out row: `heldout_max_length`, if the model has as many positions.

    It is never below `max_length`, within which every row has a trained token.
    """
    known = positions(config)
    return max(config.max_length, min(config.heldout_max_length, known or config.heldout_max_length))


@cache
def positions(config: Config) -> int | None:
    """Return the number of positions that the model's config states, or None if it states none or is not at hand."""
    from transformers import AutoConfig

    if config.model == BUNDLED_MODEL:
        return BUNDLED_POSITIONS
    try:
        loaded = hub.from_pretrained(AutoConfig, config).get_text_config()
    except UserError:
        return None
    return getattr(loaded, "max_position_embeddings", None)


def _render(template: Any, row: Row) -> tuple[str, list[Span], str | None]:
    try:
        return *template.render(row.messages), None
    except UnplacedAnswer as error:
        return "", [], str(error)


def _example(
    row: Row, text: str, spans: list[Span], ids: list[int], offsets: list[Span], config: Config, tokenizer: Any
) -> Example:
    answer, straddling = _answer_labels(ids, offsets, spans, text)
    if straddling and (split := _tokenize_apart(text, spans, ids, tokenizer)):
        ids, offsets = split
        answer, straddling = _answer_labels(ids, offsets, spans, text)
    all_learned = all(turn.get("learn", True) for turn in row.messages)
    labels = list(ids) if config.train_on == "all" and all_learned else answer
    keep = config.max_length
    problem = "an answer shares a token with its question" if straddling else None
    return Example(row, text, ids[:keep], labels[:keep], offsets[:keep], max(0, len(ids) - keep), problem)


def _tokenize_apart(
    text: str, spans: list[Span], whole: list[int], tokenizer: Any
) -> tuple[list[int], list[Span]] | None:
    """Tokenize questions and answers separately, as a model meets them: the question is given, the answer generated.

    Returns None if the tokenizer then adds characters, as those do that put a space before every text.
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


def _answer_labels(ids: list[int], offsets: list[Span], spans: list[Span], text: str) -> tuple[list[int], bool]:
    """Return the labels and whether a token straddles the edge of a span.

    A label is the token id inside the spans and -100 elsewhere. A token can also cover the space after a span: some
    end tokens absorb it.

    Some tokenizers trim spaces from their offsets. A token is therefore assumed to start where the previous one ended,
    unless both are parts of one character.
    """
    starts, ends = zip(*offsets, strict=True) if offsets else ((), ())
    if starts[1:] == ends[:-1] and starts[:1] in ((), (0,)) and all(map(lt, starts, ends)):
        return _labels_of_adjacent(ids, starts, ends, spans, text)
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


def _labels_of_adjacent(
    ids: list[int], starts: tuple[int, ...], ends: tuple[int, ...], spans: list[Span], text: str
) -> tuple[list[int], bool]:
    """The same for tokens that follow each other without gaps, as most do: only those at the edges are looked at."""
    labels, straddling = [IGNORE] * len(ids), False
    for first, last in spans:
        start, stop = bisect_left(starts, first), bisect_left(starts, last)
        labels[start:stop] = ids[start:stop]
        straddling |= start > 0 and ends[start - 1] > first and labels[start - 1] == IGNORE
        if stop > start and ends[stop - 1] > last and not text[last : ends[stop - 1]].isspace():
            labels[stop - 1], straddling = IGNORE, True
    return labels, straddling


@dataclass(frozen=True)
class LabelView:
    """A row with each token marked as trained, masked or end. Shown as HTML in a notebook and as text in a terminal."""

    pieces: list[tuple[str, str]]

    def __repr__(self) -> str:
        lines = []
        for kind, group in groupby(self.pieces, key=lambda piece: piece[0]):
            tokens = [text for _, text in group]
            lines.append(f"{kind:<8}{len(tokens):>4}  {''.join(tokens)!r}")
        return "\n".join(["kind    tokens  text", *lines])

    def _repr_html_(self) -> str:
        # Translucent backgrounds with the inherited text color are readable on light and dark pages.
        colors = {"trained": "rgba(40,160,80,.35)", "masked": "rgba(128,128,128,.18)", "end": "rgba(220,120,0,.55)"}
        spans = "".join(
            f'<span title="{kind}" style="background:{colors[kind]};border-radius:3px;margin-right:1px">'
            f"{html.escape(text).replace(chr(10), '↵' + chr(10))}</span>"
            for kind, text in self.pieces
        )
        legend = " ".join(
            f'<span style="background:{color};padding:0 .5em;border-radius:3px">{kind}</span>'
            for kind, color in colors.items()
        )
        style = "line-height:1.9;font-family:monospace;white-space:pre-wrap"
        return f'<div style="{style}">{legend}\n{spans}</div>'


def show_labels(example: Example, tokenizer: Any) -> LabelView:
    """Show which tokens of a row are trained. Trained end-of-sequence tokens are marked `end`."""
    pieces, shown = [], 0
    for token, label, (_, end) in zip(example.input_ids, example.labels, example.offsets, strict=True):
        kind = "masked" if label == IGNORE else "end" if token == tokenizer.eos_token_id else "trained"
        pieces.append((kind, example.text[shown:end]))  # tokens leave no gaps; several can share a character
        shown = max(shown, end)
    return LabelView(pieces)
