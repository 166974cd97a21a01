"""Encode rows as tokens and labels, using character offsets to find the trained tokens, and display the result."""

import html
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby, islice
from textwrap import shorten
from typing import Any, NamedTuple

from qlora_helpers.config import BUNDLED_MODEL, Config
from qlora_helpers.data import labeling, rendering
from qlora_helpers.data.builtin_templates import Span, UnplacedAnswer
from qlora_helpers.data.labeling import IGNORE, Tokens
from qlora_helpers.data.schema import Row
from qlora_helpers.errors import UserError
from qlora_helpers.models import hub

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


class Lengths(NamedTuple):
    """The tokens of a row, those of the first `max_length` that are trained, and the `problem` of its `Example`."""

    tokens: int
    trained: int
    problem: str | None


def start_tokens(tokenizer: Any) -> list[int]:
    """Return the ids of the tokens that the tokenizer puts before a text."""
    with_special, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    starts = range(len(with_special) - len(plain) + 1)
    return next((with_special[:i] for i in starts if with_special[i : i + len(plain)] == plain), [])


def tokenize(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Return the token ids of texts rendered from one template, each with the tokenizer's start tokens once.

    The start tokens are omitted where the chat template already wrote them. An end token is never added.
    """
    return [tokens.ids for tokens in _tokens(texts, tokenizer)]


def _tokens(texts: list[str], tokenizer: Any) -> Iterator[Tokens]:
    head = start_tokens(tokenizer)
    for encoding in tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).encodings:
        written = bool(head) and encoding.ids[: len(head)] == head
        yield Tokens([] if written else head, encoding)


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
    for item in _rendered(rows, config, tokenizer):
        yield _example(item, labeling.token_ranges(item.tokens, item.spans), config, tokenizer)


def measure(rows: Iterable[Row], config: Config, tokenizer: Any) -> Iterator[Lengths]:
    """Yield the lengths of each row, in order. This is faster than to encode them, and gives the same numbers."""
    for item in _rendered(rows, config, tokenizer):
        ranges = labeling.token_ranges(item.tokens, item.spans)
        if ranges is None or item.problem:
            yield lengths(_example(item, ranges, config, tokenizer), config)
            continue
        if _all_trained(item.row, config):
            ranges = [(0, len(item.tokens))]
        counted = (min(stop, config.max_length) - max(start, 1) for start, stop in ranges)
        yield Lengths(len(item.tokens), sum(max(0, count) for count in counted), None)


def lengths(example: Example, config: Config) -> Lengths:
    """Return the lengths of a row that was encoded up to `max_length` tokens or more."""
    trained = shortened(example, config.max_length).trained
    return Lengths(len(example.input_ids) + example.cut, trained, example.problem)


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


class _Rendered(NamedTuple):
    row: Row
    text: str
    spans: list[Span]  # of the answers in the text
    problem: str | None
    tokens: Tokens


def _rendered(rows: Iterable[Row], config: Config, tokenizer: Any) -> Iterator[_Rendered]:
    rows = iter(rows)
    template = rendering.template_of(config, tokenizer)
    while batch := list(islice(rows, BATCH)):
        rendered = [_render(template, row) for row in batch]
        tokens = _tokens([text for text, _, _ in rendered], tokenizer)
        for row, one, own in zip(batch, rendered, tokens, strict=True):
            yield _Rendered(row, *one, own)


def _render(template: Any, row: Row) -> tuple[str, list[Span], str | None]:
    try:
        return *template.render(row.messages), None
    except UnplacedAnswer as error:
        return "", [], str(error)


def _all_trained(row: Row, config: Config) -> bool:
    """Return whether every token of a row is trained."""
    return config.train_on == "all" and all(turn.get("learn", True) for turn in row.messages)


def _example(item: _Rendered, ranges: list[Span] | None, config: Config, tokenizer: Any) -> Example:
    """Return a row with labels. `ranges` are the tokens of its answers, or None if they have to be searched for."""
    row, text, spans, problem, tokens = item
    if problem:
        return Example(row, "", [], [], [], 0, problem)
    ids, offsets = tokens.ids, tokens.offsets
    if ranges is not None:
        answer, straddling = labeling.in_ranges(ids, ranges), False
    else:
        answer, straddling = labeling.answer_labels(ids, offsets, spans, text)
        if straddling and (split := labeling.tokenize_apart(text, spans, ids, tokenizer)):
            ids, offsets = split
            answer, straddling = labeling.answer_labels(ids, offsets, spans, text)
    learned = list(ids) if _all_trained(row, config) else answer
    keep = config.max_length
    problem = "an answer shares a token with its question" if straddling else None
    return Example(row, text, ids[:keep], learned[:keep], offsets[:keep], max(0, len(ids) - keep), problem)


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
