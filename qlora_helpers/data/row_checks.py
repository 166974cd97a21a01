"""Why a row cannot be trained on: checks of its text, and of its tokens."""

import re
import unicodedata

from qlora_helpers.config import Config
from qlora_helpers.data.prompts import Lengths
from qlora_helpers.data.schema import Row

# Reasons of rows whose answers do not fit; the number is `max_length`.
OVER, NOTHING_TRAINED = "over {} tokens", "no trained token within {} tokens"


def text_reason(row: Row, config: Config, marks: re.Pattern[str], previous: str | None) -> str | None:
    """Return why the text of a row should not be trained on, or None. `previous` is an answer that it may not have."""
    text = row.text
    if _is_shorter(text.strip(), config.min_chars):
        return f"too short: under {config.min_chars} characters"
    if len(text) > config.max_chars:
        return f"too long: over {config.max_chars} characters"
    if any(_same(question["content"], answer["content"]) for question, answer in row.rounds):
        return "answer equal to its prompt"
    if row.answer == previous:
        return "answer equal to that of the row before"
    mark = marks.search(text)
    return f"a turn holds {mark.group()!r}, which only the template may write" if mark else None


def _is_shorter(text: str, limit: int) -> bool:
    """Return whether a text is shorter than `limit` characters. Wide ones, as in Chinese, say more and count double."""
    return len(text) < limit and sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text) < limit


def _same(a: str, b: str) -> bool:
    begin_alike = a.lstrip()[:1].casefold()[:1] == b.lstrip()[:1].casefold()[:1]  # rarely, and quickly found
    return begin_alike and a.casefold().split() == b.casefold().split()


def token_reason(lengths: Lengths, config: Config) -> str | None:
    """Return why a row of these lengths cannot be trained on, or None."""
    if lengths.tokens > config.max_length and config.over_length == "drop":
        return OVER.format(config.max_length)
    if lengths.problem or lengths.trained:
        return lengths.problem
    return NOTHING_TRAINED.format(config.max_length)
