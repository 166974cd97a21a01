"""What a chat template writes around the turns, found by rendering placeholders instead of their contents."""

import re
from dataclasses import dataclass

from qlora_helpers.data.builtin_templates import Span, Turns

PLACE = re.compile("\ue000(\\d+)\ue000")  # private-use characters, which occur in no text and no template


@dataclass(frozen=True)
class Frame:
    """What a chat template writes around the turns of a sequence of roles.

    `order` are the turns in the order of the text: `before[i]` precedes turn `order[i]`, and `tail` follows the last.
    """

    order: tuple[int, ...]
    before: tuple[str, ...]
    tail: str

    def places(self, contents: list[str]) -> tuple[str, dict[int, Span]]:
        """Return the text with these contents, and the span of each turn's content."""
        text, spans = "", {}
        for turn, glue in zip(self.order, self.before, strict=True):
            start = len(text) + len(glue)
            text += glue + contents[turn]
            spans[turn] = (start, len(text))
        return text + self.tail, spans

    def glue(self, turn: int) -> str:
        """Return the text between the content before a turn and that of the turn."""
        return self.before[self.order.index(turn)]


def place_of(number: int) -> str:
    """Return the placeholder of a turn."""
    return f"\ue000{number}\ue000"


def sample(rounds: int) -> Turns:
    """Return a conversation of placeholders."""
    roles = ("user", "assistant") * rounds
    return tuple({"role": role, "content": place_of(number)} for number, role in enumerate(roles))


def after_prompt(glue: str, prompt: str) -> str:
    """Return the part of the text before an answer that follows the generation prompt.

    The prompt is the beginning that both share. In some templates they differ in blanks, which are skipped.
    """
    at = 0
    for mark in prompt:
        rest = glue[at:].lstrip()
        if glue.startswith(mark, at):
            at += 1
        elif rest.startswith(mark):
            at = len(glue) - len(rest) + 1
        elif not mark.isspace():
            break
    return glue[at:]


def shared(a: str, b: str) -> int:
    """Return the length of the beginning that two texts share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
