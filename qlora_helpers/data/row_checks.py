"""Why a row cannot be trained on: checks of its text, and of its tokens."""

import re
import unicodedata

from qlora_helpers.config import Config
from qlora_helpers.data import prompts
from qlora_helpers.data.prompts import Example
from qlora_helpers.data.schema import Row

# Reasons of rows whose answers do not fit; the number is `max_length`.
OVER, NOTHING_TRAINED = "over {} tokens", "no trained token within {} tokens"


def text_reason(row: Row, config: Config, marks: re.Pattern[str], previous: str | None) -> str | None:
    """Return why the text of a row should not be trained on, or None. `previous` is an answer that it may not have."""
    if _is_shorter(row.text.strip(), config.min_chars):
        return f"too short: under {config.min_chars} characters"
    if len(row.text) > config.max_chars:
        return f"too long: over {config.max_chars} characters"
    if any(_same(question["content"], answer["content"]) for question, answer in row.rounds):
        return "answer equal to its prompt"
    if row.answer == previous:
        return "answer equal to that of the row before"
    mark = marks.search(row.text)
    return f"a turn holds {mark.group()!r}, which only the template may write" if mark else None


def _is_shorter(text: str, limit: int) -> bool:
    """Return whether a text is shorter than `limit` characters. Wide ones, as in Chinese, say more and count double."""
    return len(text) < limit and sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text) < limit


def _same(a: str, b: str) -> bool:
    return a.casefold().split() == b.casefold().split()


def token_reason(example: Example, config: Config) -> str | None:
    """Return why a row encoded up to `max_length` tokens or more cannot be trained on, or None."""
    tokens = len(example.input_ids) + example.cut
    if tokens > config.max_length and config.over_length == "drop":
        return OVER.format(config.max_length)
    if example.problem or prompts.shortened(example, config.max_length).trained:
        return example.problem
    return NOTHING_TRAINED.format(config.max_length)
