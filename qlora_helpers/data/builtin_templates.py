"""The built-in templates: the format of openassistant-guanaco, and that of instruction data sets."""

from dataclasses import dataclass
from typing import Any

from qlora_helpers.config import Config
from qlora_helpers.data.conversation import Message
from qlora_helpers.errors import UserError

Span = tuple[int, int]  # start and end of a part of a text, in characters
Turns = tuple[Message, ...]
MARKS = {
    "guanaco": ("### Human:", "### Assistant:"),
    "instruction": ("### Instruction:", "### Input:", "### Response:"),
}


class UnplacedAnswer(ValueError):
    """The row cannot be trained on: its template refuses it, or does not show an answer. The message is the reason."""


def end_text(config: Config, tokenizer: Any) -> str:
    """Return the text that ends an answer where the template writes none: `end_token`, or the tokenizer's own.

    Raises `UserError` if there is neither.
    """
    end = config.end_token or tokenizer.eos_token
    if not end:
        raise UserError(f"template: the tokenizer of {config.model} has no end token. Fix: end_token=TOKEN.")
    if tokenizer.convert_tokens_to_ids(end) in (None, tokenizer.unk_token_id) and end != tokenizer.unk_token:
        raise UserError(f"end_token: {end!r} is not a token of {config.model}. Fix: choose one of its special tokens.")
    return str(end)


@dataclass(frozen=True)
class BuiltinTemplate:
    """The format of the rows of openassistant-guanaco, or that of instruction data sets.

    Neither has a place for a system prompt, which is written before the first question, or for tools.
    """

    config: Config
    tokenizer: Any

    def render(self, messages: Turns) -> tuple[str, list[Span]]:
        """Return the text of a conversation and the spans of its learned answers."""
        text, spans, system = "", [], self.config.system
        for turn in messages:
            if turn["role"] == "system":
                system = turn["content"]
            elif turn["role"] == "user":
                text += render_question(turn, self.config.template, system)
                system = None
            elif turn["role"] == "assistant" and not turn.get("tool_calls"):
                start = len(text)
                text += f"{answer_prefix(self.config.template)}{turn['content']}{end_text(self.config, self.tokenizer)}"
                if turn.get("learn", True):
                    spans.append((start, len(text)))
            else:
                raise UnplacedAnswer(f"the {self.config.template} template has no place for tool calls")
        return text, spans

    def prompt(self, messages: Turns) -> str:
        """Return the text up to where the next answer begins."""
        return self.render(messages)[0]

    @property
    def ends(self) -> tuple[str, ...]:
        """Tokens that end an answer."""
        return (end_text(self.config, self.tokenizer),)

    @property
    def marks(self) -> set[str]:
        """Text that only the template may write."""
        return set(MARKS[self.config.template])

    @property
    def preamble(self) -> str:
        """Text that the template writes before the words of an answer."""
        return ""

    def warnings(self) -> list[str]:
        """Return what the user should know about the template, one line each."""
        return []


def render_question(turn: Message, template: str, system: str | None = None) -> str:
    """Render a user's turn up to and including the marker that precedes the answer."""
    asked = f"{system}\n\n{turn['content']}" if system else turn["content"]
    if template == "guanaco":
        given = f"\n\n{turn['input']}" if turn.get("input") else ""
        return f"### Human: {asked}{given}### Assistant:"
    given = f"### Input:\n{turn['input']}\n\n" if turn.get("input") else ""
    # The newline belongs to the question: some tokenizers merge it with the colon into one token.
    return f"### Instruction:\n{asked}\n\n{given}### Response:\n"


def answer_prefix(template: str) -> str:
    """Return the text between the marker and the answer.

    It belongs to the answer because a space and the word after it form one token.
    """
    return " " if template == "guanaco" else ""
