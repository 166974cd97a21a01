"""Encode rows as tokens and labels, using character offsets to find the trained tokens, and display the result."""

import html
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from textwrap import shorten
from typing import Any

from qlora_helpers.config import Config
from qlora_helpers.data.schema import Message, Row
from qlora_helpers.errors import UserError

IGNORE = -100  # label ignored by the cross-entropy loss
BATCH = 1000  # rows tokenized at once: enough to be fast, few enough to limit memory
Span = tuple[int, int]
# Turn markers of the built-in templates, and the pattern of those in chat templates: <|user|>, [INST], USER:
MARKS = {
    "guanaco": ("### Human:", "### Assistant:"),
    "instruction": ("### Instruction:", "### Input:", "### Response:"),
}
CHAT_MARK = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]|[^\s<>\[\]]+")
BREAK = "\ue000"  # a private-use character, which occurs in no text and no template


@dataclass(frozen=True)
class Example:
    """A tokenized row.

    `input_ids`, `labels` and `offsets` have one entry per token, up to the token limit. `labels` equals `input_ids` at
    trained tokens and is -100 elsewhere. `offsets` are the start and end of each token in `text`, in characters. `cut`
    is the number of tokens beyond the limit. `straddling` is true if a token is partly question and partly answer, so
    that no label is right for it.
    """

    row: Row
    text: str
    input_ids: list[int]
    labels: list[int]
    offsets: list[Span]
    cut: int
    straddling: bool = False

    @property
    def trained(self) -> int:
        """Number of tokens that count in the loss. The first token is never predicted, so it does not count."""
        return sum(label != IGNORE for label in self.labels[1:])


def render(messages: tuple[Message, ...], config: Config, tokenizer: Any) -> tuple[str, list[Span]]:
    """Return the text of a conversation and the character spans of its answers, including their end tokens.

    Raises `UserError` if the model's chat template is missing or unusable.
    """
    if config.template == "auto":
        return _render_chat(messages, config, tokenizer)
    text, spans = "", []
    for turn in messages:
        if turn["role"] == "user":
            text += render_question(turn, config.template)
            continue
        start = len(text)
        text += f"{answer_prefix(config.template)}{turn['content']}{tokenizer.eos_token}"
        spans.append((start, len(text)))
    return text, spans


def render_prompt(messages: tuple[Message, ...], config: Config, tokenizer: Any) -> str:
    """Return the text of a conversation up to where the next answer begins.

    As in training, a space between the marker and the answer is left for the model to generate.
    """
    if config.template == "auto":
        return _apply_chat(messages, config, tokenizer, add_generation_prompt=True)
    return render(messages, config, tokenizer)[0]


def render_question(turn: Message, template: str) -> str:
    """Render a user's turn up to and including the marker that precedes the answer."""
    if template == "guanaco":
        given = f"\n\n{turn['input']}" if turn.get("input") else ""
        return f"### Human: {turn['content']}{given}### Assistant:"
    given = f"### Input:\n{turn['input']}\n\n" if turn.get("input") else ""
    # The newline belongs to the question: some tokenizers merge it with the colon into one token.
    return f"### Instruction:\n{turn['content']}\n\n{given}### Response:\n"


def answer_prefix(template: str) -> str:
    """Return the text between the marker and the answer.

    It belongs to the answer because a space and the word after it form one token.
    """
    return " " if template == "guanaco" else ""


def _apply_chat(messages: tuple[Message, ...], config: Config, tokenizer: Any, **options: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"template: {config.model} has no chat template. Fix: template=guanaco or template=instruction."
        )
    head = [{"role": "system", "content": config.system}] if config.system else []
    turns = [
        {"role": m["role"], "content": m["content"] + (f"\n\n{m['input']}" if m.get("input") else "")} for m in messages
    ]
    try:
        return tokenizer.apply_chat_template([*head, *turns], tokenize=False, **options)
    except Exception as error:  # a template can raise many kinds of jinja errors
        raise UserError(
            f"template: the chat template of {config.model} refuses these turns ({error}). Fix: template=guanaco or "
            "template=instruction."
        ) from None


def _render_chat(messages: tuple[Message, ...], config: Config, tokenizer: Any) -> tuple[str, list[Span]]:
    """Render with the model's chat template.

    An answer's span starts where the generation prompt before it ends, and ends where the text including the answer
    ends, without trailing whitespace.
    """
    text = _apply_chat(messages, config, tokenizer)
    spans = []
    for number, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        before = _apply_chat(messages[:number], config, tokenizer, add_generation_prompt=True)
        is_last = number + 1 == len(messages)
        after = (text if is_last else _apply_chat(messages[: number + 1], config, tokenizer)).rstrip()
        if not (text.startswith(before) and text.startswith(after)):
            raise UserError(
                f"template: the chat template of {config.model} rewrites earlier turns, so its answers cannot be "
                "located. Fix: template=guanaco or template=instruction."
            )
        spans.append((len(before), len(after)))
    return text, spans


def control_marks(config: Config, tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern for text that only the template may write: special tokens and the markers between turns.

    Such text in a row would end its turn and start another.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    marks = {*special, *tokenizer.all_special_tokens, *MARKS.get(config.template, ())}
    if config.template == "auto":
        marks |= _chat_marks(config, tokenizer)
    return re.compile("|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True)) or r"(?!)")


def _chat_marks(config: Config, tokenizer: Any) -> set[str]:
    """Return the markers that a chat template writes between a question and the next one, also for system turns.

    Plain words, such as the name of a role, are excluded because ordinary text can contain them.
    """
    placeholders = [f"{BREAK}{number}{BREAK}" for number in range(4)]
    turns = tuple({"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(placeholders))
    parts = _apply_chat(turns, config, tokenizer).split(BREAK)
    between = " ".join(parts[2:7:2])
    between += between.replace("user", "system").replace("USER", "SYSTEM")
    return {mark for mark in CHAT_MARK.findall(between) if not mark.isalnum() and len(mark) > 2}


def template_warning(config: Config, tokenizer: Any) -> str | None:
    """Return a one-line warning about replacing the model's own chat template, or None if it is used or missing."""
    if config.template == "auto" or not getattr(tokenizer, "chat_template", None):
        return None
    return (
        f"template: {config.model} was trained with its own chat template and must learn the {config.template} format "
        "from scratch. It needs more rows to answer and stop as well, and must be prompted in that format afterwards. "
        "template=auto uses its own template. Published experiments that use another one are reproduced unchanged."
    )


def tokenize(texts: list[str], tokenizer: Any, **options: Any) -> Any:
    """Tokenize texts rendered from one template, with exactly one start token if the model has one.

    The tokenizer adds the start token unless the chat template already wrote it.
    """
    start = tokenizer.bos_token
    has_start = bool(start) and texts[0].startswith(start)
    return tokenizer(texts, add_special_tokens=not has_start, **options)


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
    """Yield the tokens and labels of each row, in order, truncated to `max_length` tokens."""
    rows = iter(rows)
    while batch := list(islice(rows, BATCH)):
        rendered = [render(row.messages, config, tokenizer) for row in batch]
        texts = [text for text, _ in rendered]
        tokens = tokenize(texts, tokenizer, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
        for row, (text, spans), ids, offsets in zip(
            batch, rendered, tokens["input_ids"], tokens["offset_mapping"], strict=True
        ):
            yield _example(row, text, spans, ids, offsets, config)


def _example(row: Row, text: str, spans: list[Span], ids: list[int], offsets: list[Span], config: Config) -> Example:
    answer, straddling = _answer_labels(ids, offsets, spans)
    labels = list(ids) if config.train_on == "all" else answer
    keep = config.max_length
    return Example(row, text, ids[:keep], labels[:keep], offsets[:keep], max(0, len(ids) - keep), straddling)


def _answer_labels(ids: list[int], offsets: list[Span], spans: list[Span]) -> tuple[list[int], bool]:
    """Return the labels and whether a token straddles the edge of a span.

    A label is the token id inside the spans and -100 elsewhere.

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
        inside = first <= begin < last and end <= last
        straddling |= not inside and begin < last and end > first
        labels.append(token if inside else IGNORE)
        previous = max(previous, end)
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
            f"{html.escape(text).replace(chr(10), '↵<br>')}</span>"
            for kind, text in self.pieces
        )
        legend = " ".join(
            f'<span style="background:{color};padding:0 .5em;border-radius:3px">{kind}</span>'
            for kind, color in colors.items()
        )
        return f'<div style="line-height:1.9;font-family:monospace">{legend}<br>{spans}</div>'


def show_labels(example: Example, tokenizer: Any) -> LabelView:
    """Show which tokens of a row are trained. Trained end-of-sequence tokens are marked `end`."""
    pieces, shown = [], 0
    for token, label, (_, end) in zip(example.input_ids, example.labels, example.offsets, strict=True):
        kind = "masked" if label == IGNORE else "end" if token == tokenizer.eos_token_id else "trained"
        pieces.append((kind, example.text[shown:end]))  # tokens leave no gaps; several can share a character
        shown = max(shown, end)
    return LabelView(pieces)
