"""Rows to tokens and labels: which tokens are trained, found by character offsets; and a viewer that shows them."""

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

IGNORE = -100  # the label that cross-entropy skips
BATCH = 1000  # rows that are tokenized at once: enough for speed, little enough for memory
Span = tuple[int, int]
# The marks of our own layouts, and what marks of a chat template look like: <|user|>, [INST], USER:
MARKS = {
    "guanaco": ("### Human:", "### Assistant:"),
    "instruction": ("### Instruction:", "### Input:", "### Response:"),
}
CHAT_MARK = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]|[^\s<>\[\]]+")
BREAK = "\ue000"  # for private use: in no text and in no template


@dataclass(frozen=True)
class Example:
    """One row as the model sees it. `labels` has -100 where nothing is learned; `cut` counts tokens over the limit.

    `straddling` says that a token is partly question and partly answer, so that no label is right for it.
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
        """Tokens that the loss counts. The first token is never predicted, so it is not among them."""
        return sum(label != IGNORE for label in self.labels[1:])


def render(messages: tuple[Message, ...], config: Config, tokenizer: Any) -> tuple[str, list[Span]]:
    """Text of a conversation, and the character spans of its answers with their end tokens."""
    if config.template == "auto":
        return _render_chat(messages, config, tokenizer)
    text, spans = "", []
    for turn in messages:
        if turn["role"] == "user":
            text += question(turn, config.template)
            continue
        start = len(text)
        text += f"{gap(config.template)}{turn['content']}{tokenizer.eos_token}"
        spans.append((start, len(text)))
    return text, spans


def render_prompt(messages: tuple[Message, ...], config: Config, tokenizer: Any) -> str:
    """Text that ends where the answer begins: the gap after the marker is the model's to write, as in training."""
    if config.template == "auto":
        return _apply_chat(messages, config, tokenizer, add_generation_prompt=True)
    eos = tokenizer.eos_token
    return "".join(
        question(turn, config.template) if turn["role"] == "user" else f"{gap(config.template)}{turn['content']}{eos}"
        for turn in messages
    )


def question(turn: Message, template: str) -> str:
    """A user's turn up to and including the marker after which the answer starts."""
    if template == "guanaco":
        given = f"\n\n{turn['input']}" if turn.get("input") else ""
        return f"### Human: {turn['content']}{given}### Assistant:"
    given = f"### Input:\n{turn['input']}\n\n" if turn.get("input") else ""
    # The newline is the question's: some tokenizers make one token of it and the colon.
    return f"### Instruction:\n{turn['content']}\n\n{given}### Response:\n"


def gap(template: str) -> str:
    """What lies between the marker and an answer. A space before a word is one token with it, so it is the answer's."""
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
    except Exception as error:  # jinja errors, raised by the template itself, are of many kinds
        raise UserError(f"template: the chat template of {config.model} refuses these turns ({error}).") from None


def _render_chat(messages: tuple[Message, ...], config: Config, tokenizer: Any) -> tuple[str, list[Span]]:
    """The answer's span lies between the text that asks for it and the text that holds it, less trailing space."""
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
                f"template: the chat template of {config.model} rewrites earlier turns: its answers cannot be found. "
                "Fix: template=guanaco or template=instruction."
            )
        spans.append((len(before), len(after)))
    return text, spans


def control_marks(config: Config, tokenizer: Any) -> re.Pattern[str]:
    """What only the template may write: the tokenizer's special tokens, and the marks between turns. In a row they
    would end a turn and begin another.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    marks = {*special, *tokenizer.all_special_tokens, *MARKS.get(config.template, ())}
    if config.template == "auto":
        marks |= _chat_marks(config, tokenizer)
    return re.compile("|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True)) or r"(?!)")


def _chat_marks(config: Config, tokenizer: Any) -> set[str]:
    """What a chat template writes after a question and before the next one, and the same for a system turn. Plain words
    in it, such as a role's name, are left out: text may hold them.
    """
    said = [f"{BREAK}{number}{BREAK}" for number in range(4)]
    turns = tuple({"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said))
    parts = _apply_chat(turns, config, tokenizer).split(BREAK)
    between = " ".join(parts[2:7:2])
    between += between.replace("user", "system").replace("USER", "SYSTEM")
    return {mark for mark in CHAT_MARK.findall(between) if not mark.isalnum() and len(mark) > 2}


def advice(config: Config, tokenizer: Any) -> str | None:
    """What choosing another template than the model's own costs, in a line; None where there is nothing to say."""
    if config.template == "auto" or not getattr(tokenizer, "chat_template", None):
        return None
    return (
        f"template: {config.model} was taught with its own chat template, and learns the {config.template} layout from "
        "zero: it needs more rows to answer and to stop as well, and must be asked in that layout afterwards. "
        "template=auto keeps its own; published experiments that chose otherwise are repeated as they were."
    )


def tokenize(texts: list[str], tokenizer: Any, **options: Any) -> Any:
    """Tokens with one start token, if the model has one: some chat templates write it, else the tokenizer adds it."""
    start = tokenizer.bos_token
    written = bool(start) and texts[0].startswith(start)
    return tokenizer(texts, add_special_tokens=not written, **options)


def check_context(question: str, tokens: int, answer: int, context: int | None, mend: str) -> None:
    """Raise `UserError` if a prompt of so many tokens leaves no room for `answer` of them in the model's context."""
    if context and tokens + answer > context:
        raise UserError(
            f"prompt: '{shorten(question, 40, placeholder=' …')}' makes a prompt of {tokens} tokens, and the model's "
            f"context of {context} has to hold {answer} of the answer too. Fix: {mend}."
        )


def encode(rows: Iterable[Row], config: Config, tokenizer: Any) -> Iterator[Example]:
    """Tokens and labels of each row, in order, cut at `max_length`."""
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
    """Token ids inside the spans, -100 elsewhere; and whether a token lies on the edge of a span.

    Some tokenizers trim spaces from their offsets, so a token starts where the one before it ended, unless both are
    parts of one character.
    """
    labels, previous, straddling = [], 0, False
    left = iter(spans)
    first, last = next(left, (0, 0))
    for token, (start, end) in zip(ids, offsets, strict=True):
        begin = start if start < end <= previous else previous
        while begin >= last > 0 and end > last:
            first, last = next(left, (0, 0))
        inside = first <= begin < last and end <= last
        straddling |= not inside and begin < last and end > first
        labels.append(token if inside else IGNORE)
        previous = max(previous, end)
    return labels, straddling


@dataclass(frozen=True)
class LabelView:
    """One row with its tokens marked trained, masked or end: HTML in a notebook, text in a terminal."""

    pieces: list[tuple[str, str]]

    def __repr__(self) -> str:
        lines = []
        for kind, group in groupby(self.pieces, key=lambda piece: piece[0]):
            tokens = [text for _, text in group]
            lines.append(f"{kind:<8}{len(tokens):>4}  {''.join(tokens)!r}")
        return "\n".join(["kind    tokens  text", *lines])

    def _repr_html_(self) -> str:
        # Translucent backgrounds under inherited text color read well on light and on dark pages.
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
    """What one row teaches. The end token is the one with the tokenizer's end-of-sequence id, where it is trained."""
    pieces, shown = [], 0
    for token, label, (_, end) in zip(example.input_ids, example.labels, example.offsets, strict=True):
        kind = "masked" if label == IGNORE else "end" if token == tokenizer.eos_token_id else "trained"
        pieces.append((kind, example.text[shown:end]))  # tokens tile the text; several may share one character
        shown = max(shown, end)
    return LabelView(pieces)
