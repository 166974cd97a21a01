"""Clean and split a data set: drop unusable rows with a reason, then select held-out rows, then training rows.

The order of the rows depends only on their text and the data seed, not on their order in the file.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, pairwise
from typing import Any

from qlora_helpers.config import Config
from qlora_helpers.data import prompts, rendering, sources
from qlora_helpers.data.cleaned import Cleaned, Data, NearDuplicate, TokenizedRow, fingerprint
from qlora_helpers.data.leaks import HeldOut, parts
from qlora_helpers.data.near_duplicates import Index, same_text
from qlora_helpers.data.prompts import Example
from qlora_helpers.data.schema import TEST, VALIDATION, Row
from qlora_helpers.errors import UserError

__all__ = [
    "Cleaned",
    "Data",
    "TokenizedRow",
    "check_enough",
    "check_no_leak",
    "clean",
    "fingerprint",
    "identity",
    "prepare",
    "select",
]

NEAR_ROW = "nearly the same as another row"
SLIPS = 0.05  # largest share of answers equal to the one before that are mistakes rather than other phrasings


# Reasons of rows whose answers do not fit; the number is `max_length`.
OVER, NOTHING_TRAINED = "over {} tokens", "no trained token within {} tokens"
REASONS = 5  # most frequent reasons in an error
Usable = tuple[TokenizedRow, Example | None]


def identity(config: Config, data: Data) -> dict[str, str]:
    """Return the hashes that identify a run: of the settings that affect its result, and of the data it read."""
    return {"config": config.identity, "data": data.source_fingerprint}


def prepare(config: Config, tokenizer: Any) -> Data:
    """Load, clean, split and encode the configured data set.

    Raises `UserError` if the data set cannot be read, if too few usable rows are left, or if a training prompt is also
    held out. A usable row has at least one trained token.
    """
    return select(clean(config, tokenizer), config, tokenizer)


def select(cleaned: Cleaned, config: Config, tokenizer: Any) -> Data:
    """Select the first `n_samples` training rows and the held-out rows of a cleaned data set, encoded.

    `cleaned` may come from a config with another `n_samples`, because the split does not depend on it. Raises
    `UserError` if too few usable rows are left, or if a training prompt is also held out.
    """
    check_enough(cleaned, config.n_heldout, config.n_samples or 1)
    train = _examples(cleaned, cleaned.train[: config.n_samples], config, tokenizer)
    heldout = _examples(cleaned, cleaned.heldout, config, tokenizer)
    rehearsal, source = _rehearsal(config, tokenizer, cleaned.heldout, round(config.rehearsal * len(train)))
    data = Data(train, heldout, cleaned, rehearsal, source)
    check_no_leak(data)
    return data


def check_enough(cleaned: Cleaned, n_heldout: int, n_samples: int) -> None:
    """Raise `UserError` if fewer than `n_heldout` held-out rows or `n_samples` training rows are left.

    The message says why rows were dropped, the most frequent reason first.
    """
    left, held = len(cleaned.train), len(cleaned.heldout)
    if held >= n_heldout and left >= n_samples:
        return
    reasons = Counter(d["reason"] for d in cleaned.dropped).most_common()
    limit = cleaned.max_length
    too_long = sum(count for reason, count in reasons if reason in (OVER.format(limit), NOTHING_TRAINED.format(limit)))
    if not left + held and too_long == len(cleaned.lengths) > 0:
        raise UserError(
            f"max_length: no answer survives {limit} tokens: the {too_long} rows have {min(cleaned.lengths)} to "
            f"{max(cleaned.lengths)} tokens. Fix: max_length={max(cleaned.lengths)}, or shorter rows."
        )
    why = "".join(f"; {count} × {reason}" for reason, count in reasons[:REASONS])
    why += f"; {len(reasons) - REASONS} more reasons" if len(reasons) > REASONS else ""
    fix = f"n_samples={left} or less, " if left else ""
    raise UserError(
        f"n_samples: {n_samples} rows requested for training, but {left} usable rows are left "
        f"({cleaned.rows_read} read, {len(cleaned.dropped)} dropped, {held} of {n_heldout} held out{why}). "
        f"Fix: {fix}a smaller n_heldout, or more data."
    )


def clean(config: Config, tokenizer: Any, n_heldout: int | Callable[[int], int] | None = None) -> Cleaned:
    """Load the configured data set, drop rows that should not be trained on, and split the rest.

    `n_heldout` is the number of held-out rows, by default `config.n_heldout`. It can be a function of the number of
    usable rows; then no encoded rows are kept. Raises `UserError` if the data set cannot be read.
    """
    cleaned = Cleaned(sources.load(config), config.max_length, encoding=_encoding(config, tokenizer))
    cleaned.dropped.extend(cleaned.loaded.rejected)
    rows = list(_readable(cleaned, config, rendering.control_marks(config, tokenizer)))
    rows.sort(key=lambda row: (row.split != TEST, _digest(f"{config.data_seed}\n{row.prompt}"), row.id))
    usable = _fitting(cleaned, _distinct(cleaned, rows, config), config, tokenizer)
    if callable(n_heldout):
        tests, others = _take_tests(cleaned, ((item, None) for item, _ in usable), None)
        counted = list(others)
        _split(cleaned, [*tests, *counted], config, len(tests) or n_heldout(len(counted)))
    else:
        most = config.n_heldout if n_heldout is None else n_heldout
        tests, others = _take_tests(cleaned, usable, most)
        _split(cleaned, chain(tests, others), config, len(tests) or most)
    return cleaned


def _take_tests(cleaned: Cleaned, usable: Iterator[Usable], most: int | None) -> tuple[list[Usable], Iterator[Usable]]:
    """Return the rows of the test split, which come first, and the other rows. Drop test rows over `most`."""
    tests: list[Usable] = []
    for item in usable:
        row = item[0].row
        if row.split != TEST:
            return tests, chain([item], usable)
        if most is None or len(tests) < most:
            tests.append(item)
        else:
            cleaned.drop(row, f"test split, over n_heldout={most}")
    return tests, usable


def _encoding(config: Config, tokenizer: Any) -> tuple[Any, ...]:
    """Return everything that `prompts.encode` depends on besides the row."""
    settings = (getattr(config, name) for name in rendering.SETTINGS)
    return (*settings, config.train_on, config.max_length, tokenizer)


def _readable(cleaned: Cleaned, config: Config, marks: re.Pattern[str]) -> Iterator[Row]:
    """Yield the rows that pass the checks of their text and contain no control markers.

    A rare answer equal to that of the previous row in the file is an error, such as an answer shifted by a line. If
    many are, they belong to several phrasings of a question. If less than half of the answers are distinct, they are
    class labels, which may repeat.
    """
    rows = cleaned.loaded.rows
    repeats = sum(a.answer == b.answer for a, b in pairwise(rows))
    may_repeat = 2 * len({row.answer for row in rows}) < len(rows) or repeats > max(1, SLIPS * len(rows))
    seen: set[str] = set()
    previous = ""
    for row in rows:
        reason = _text_reason(row, config, None if may_repeat else previous)
        previous = row.answer
        if row.split == VALIDATION:
            reason = "validation split, kept for selection"
        elif row.id in seen:
            reason = "same row twice"
        elif reason is None and (mark := marks.search(row.text)):
            reason = f"a turn holds {mark.group()!r}, which only the template may write"
        if reason:
            cleaned.drop(row, reason)
            continue
        seen.add(row.id)
        yield row


def _text_reason(row: Row, config: Config, previous: str | None) -> str | None:
    if _is_shorter(row.text.strip(), config.min_chars):
        return f"too short: under {config.min_chars} characters"
    if len(row.text) > config.max_chars:
        return f"too long: over {config.max_chars} characters"
    if any(_same(question["content"], answer["content"]) for question, answer in row.rounds):
        return "answer equal to its prompt"
    return "answer equal to that of the row before" if row.answer == previous else None


def _is_shorter(text: str, limit: int) -> bool:
    """Return whether a text is shorter than `limit` characters. Wide ones, as in Chinese, say more and count double."""
    return len(text) < limit and sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text) < limit


def _same(a: str, b: str) -> bool:
    return a.casefold().split() == b.casefold().split()


def _fitting(
    cleaned: Cleaned, rows: Iterable[Row], config: Config, tokenizer: Any
) -> Iterator[tuple[TokenizedRow, Example]]:
    """Tokenize the rows and yield those with a trained token within the token limit."""
    for example in prompts.encode(rows, config, tokenizer):
        tokens = len(example.input_ids) + example.cut
        if tokens:
            cleaned.lengths.append(tokens)
        if example.cut and config.over_length == "drop":
            cleaned.drop(example.row, OVER.format(config.max_length))
        elif example.problem:
            cleaned.drop(example.row, example.problem)
        elif not example.trained:
            cleaned.drop(example.row, NOTHING_TRAINED.format(config.max_length))
        else:
            yield TokenizedRow(example.row, tokens, example.trained), example


def _distinct(cleaned: Cleaned, rows: Iterable[Row], config: Config) -> Iterator[Row]:
    """Yield one row of each group of near duplicates: the first in the order of the split."""
    index = Index(config.near_duplicates, same_text)
    kept: list[Row] = []
    for row in rows:
        match = index.first_similar(parts(row))
        if match is None:
            kept.append(row)
            yield row
        else:
            cleaned.drop(row, NEAR_ROW)
            cleaned.near_duplicates.append(NearDuplicate(row, kept[match[0]], match[1], NEAR_ROW))


def _split(
    cleaned: Cleaned, usable: Iterable[tuple[TokenizedRow, Example | None]], config: Config, n_heldout: int
) -> None:
    """Hold out the first `n_heldout` rows, then use every row that is no leak (see `leaks`) for training.

    Held-out rows are also unlike each other, so that they are independent. `usable` may be an iterator, so that rows
    are tokenized while they are split and unused encodings are released.
    """
    held = HeldOut(cleaned.loaded.rows, config.near_duplicates)
    leaks: list[NearDuplicate] = []
    for item, example in usable:
        full = len(cleaned.heldout) == n_heldout
        leak = held.leak(item.row)
        if leak is not None:
            leaks.append(NearDuplicate(item.row, leak.heldout, leak.similarity, leak.reason))
            continue
        if example and not (full and config.n_samples and len(cleaned.train) >= config.n_samples):
            cleaned.examples[item.row.id] = example
        if not full:
            held.add(item.row)
        (cleaned.train if full else cleaned.heldout).append(item)
    for leaked in leaks:
        cleaned.drop(leaked.dropped, leaked.reason)
    cleaned.near_duplicates.extend(leaks)


def _rehearsal(
    config: Config, tokenizer: Any, heldout: list[TokenizedRow], wanted: int
) -> tuple[list[Example], str | None]:
    """Return `wanted` rows of the rehearsal data set, and its name.

    They are the first ones in the order of the data seed that are no leak of a held-out row. Raises `UserError` if
    there are too few.
    """
    if not wanted:
        return [], None
    own = {"subset": None, "split": None, "columns": None}  # of the first data set
    second = config.replace(
        dataset=config.rehearsal_dataset, n_samples=wanted, rehearsal=0.0, over_length="truncate", **own
    )
    cleaned = clean(second, tokenizer, n_heldout=0)
    held = HeldOut(cleaned.loaded.rows, config.near_duplicates)
    for item in heldout:
        held.add(item.row)
    rows = [item for item in cleaned.train if held.leak(item.row) is None]
    if len(rows) < wanted:
        raise UserError(
            f"rehearsal: {wanted} rows requested, but {config.rehearsal_dataset} has {len(rows)} usable ones. "
            "Fix: a smaller rehearsal, or a larger rehearsal_dataset."
        )
    return _examples(cleaned, rows[:wanted], second, tokenizer), cleaned.loaded.name


def _examples(cleaned: Cleaned, items: list[TokenizedRow], config: Config, tokenizer: Any) -> list[Example]:
    """Return the encoded rows. Tokenizes only rows that `cleaned` does not already hold in this encoding."""
    known = cleaned.examples if cleaned.encoding == _encoding(config, tokenizer) else {}
    missing = [item.row for item in items if item.row.id not in known]
    known.update((example.row.id, example) for example in prompts.encode(missing, config, tokenizer))
    return [known[item.row.id] for item in items]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def check_no_leak(data: Data) -> None:
    """Raise `UserError` if a held-out question or answer is also trained on: the held-out loss would mean nothing."""
    held = HeldOut(data.cleaned.loaded.rows, 1.0)
    for example in data.heldout:
        held.add(example.row)
    both = [example.row for example in data.trained_on if held.leak(example.row)]
    if both:
        raise UserError(
            f"held-out set: {len(both)} of its rows are also trained on (first: {both[0].origin}). "
            "Fix: remove them from the data set."
        )
