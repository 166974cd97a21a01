"""Clean and split a data set: drop unusable rows with a reason, then select held-out rows, then training rows.

The order of the rows depends only on their text and two seeds, not on their order in the file.
"""

import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from qlora_helpers.config import Config
from qlora_helpers.data import prompts, rendering, sources
from qlora_helpers.data.cleaned import Cleaned, Data, NearDuplicate, TokenizedRow, fingerprint
from qlora_helpers.data.leaks import HeldOut, parts
from qlora_helpers.data.near_duplicates import Index, Words, same_text, words_of
from qlora_helpers.data.prompts import Example, Lengths
from qlora_helpers.data.row_checks import NOTHING_TRAINED, OVER, text_reason, token_reason
from qlora_helpers.data.schema import TEST, VALIDATION, Row
from qlora_helpers.data.splitting import Fit, Split, in_draw, split_key
from qlora_helpers.data.workers import shared, without_garbage_collection
from qlora_helpers.errors import UserError, nearest
from qlora_helpers.wording import counted

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
REASONS = 5  # most frequent reasons in an error


def identity(config: Config, data: Data) -> dict[str, str]:
    """Return the hashes that identify a run: of the settings that affect its result, and of the data it read."""
    return {"config": config.identity, "data": data.source_fingerprint}


def prepare(config: Config, tokenizer: Any) -> Data:
    """Load, clean, split and encode the configured data set. Says so if its validation split is too small.

    With `streaming`, the rows are read by `streaming.prepare`. Raises `UserError` if the data set cannot be read, if
    too few usable rows are left, or if a training prompt is also held out. A usable row has at least one trained token.
    """
    if config.streaming:
        from qlora_helpers.data import streaming  # it cleans rows with this module

        return streaming.prepare(config, tokenizer)
    data = select(clean(config, tokenizer), config, tokenizer)
    if note := data.selection_note(config.selection_rows):
        print(note)
    return data


def select(cleaned: Cleaned, config: Config, tokenizer: Any) -> Data:
    """Select the first `n_samples` training rows of a draw, the rows to choose a checkpoint on, and the held-out rows.

    They are returned encoded: training rows up to `max_length` tokens, the others up to `heldout_limit`. Rows to choose
    on come from the validation split, then from the training rows that follow in the draw; if they are fewer than
    `selection_rows`, there are none. `cleaned` may come from a config with another `n_samples` or draw, because the
    split does not depend on them. Raises `UserError` if too few usable rows are left, or if a training prompt is also
    held out.
    """
    check_enough(cleaned, config.n_heldout, config.n_samples or 1)
    drawn = in_draw(cleaned.train, config.training_draw)
    size = config.n_samples or len(drawn)
    chosen = [*cleaned.selection, *drawn[size:]][: config.selection_rows]
    train = _examples(cleaned, drawn[:size], config, tokenizer, config.max_length)
    heldout, selection = (
        _examples(cleaned, items, config, tokenizer, prompts.heldout_limit(config))
        for items in (cleaned.heldout, chosen if len(chosen) == config.selection_rows else [])
    )
    rehearsal, source = _rehearsal(config, tokenizer, cleaned.heldout, round(config.rehearsal * len(train)))
    data = Data(train, heldout, cleaned, rehearsal, source, selection, config.training_draw)
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
    why += f"; {counted(len(reasons) - REASONS, 'more reason')}" if len(reasons) > REASONS else ""
    fix = f"n_samples={left} or less, " if left else ""
    raise UserError(
        f"n_samples: {counted(n_samples, 'row')} requested for training, but {counted(left, 'usable row')} left "
        f"({cleaned.rows_read} read, {len(cleaned.dropped)} dropped, {held} of {n_heldout} held out{why}). "
        f"Fix: {fix}a smaller n_heldout, or more data."
    )


@without_garbage_collection()
def clean(
    config: Config,
    tokenizer: Any,
    n_heldout: int | Callable[[int], int] | None = None,
    loaded: sources.Loaded | None = None,
) -> Cleaned:
    """Load the configured data set, drop rows that should not be trained on, and split the rest.

    `loaded` is a data set that is cleaned instead. `n_heldout` is the number of held-out rows, by default
    `config.n_heldout`. It can be a function of the number of usable rows; then no encoded rows are kept. Raises
    `UserError` if the data set cannot be read, or is to be streamed.
    """
    if config.streaming:
        raise UserError("streaming: this command reads all rows. Fix: use train, or streaming=false.")
    cleaned = Cleaned(loaded or sources.load(config), config.max_length, encoding=_encoding(config, tokenizer))
    _check_groups(cleaned, config)
    cleaned.dropped.extend(cleaned.loaded.rejected)
    rows = list(_readable(cleaned, config, rendering.control_marks(config, tokenizer)))
    rows.sort(key=lambda row: split_key(row, config.data_seed))
    rows = list(_distinct(cleaned, rows, config))
    fit: Fit = partial(_fitting, cleaned, config, tokenizer)
    if callable(n_heldout):
        measured = zip(rows, shared(partial(_measured, config, tokenizer), rows), strict=True)
        kept = (_kept(cleaned, config, row, lengths) for row, lengths in measured)
        known: dict[str, tuple[TokenizedRow, None]] = {item.row.id: (item, None) for item in kept if item}
        fit = partial(_known, known)
        counts = Counter(row.split == TEST for row in rows if row.id in known)
        most = counts[True] or n_heldout(counts[False])
    else:
        most = config.n_heldout if n_heldout is None else n_heldout
    _divide(Split(cleaned, config, fit), rows, most)
    return cleaned


def _known(items: dict[str, tuple[TokenizedRow, None]], rows: Iterable[Row]) -> Iterator[tuple[TokenizedRow, None]]:
    return (items[row.id] for row in rows if row.id in items)


def _check_groups(cleaned: Cleaned, config: Config) -> None:
    """Raise `UserError` if no row has a value in the field that the user named."""
    if config.group_by and not any(row.group for row in cleaned.loaded.rows):
        raise UserError(
            f"group_by: no row of {cleaned.loaded.name} has a value in a field '{config.group_by}'."
            f"{nearest(config.group_by, cleaned.loaded.fields)}"
        )


def _divide(split: Split, rows: list[Row], most: int) -> None:
    """Hold out rows of the test split, or the first of all, and use the others. Test rows over `most` are dropped."""
    tests, validation, others = (
        deque(row for row in rows if (row.split if row.split in (TEST, VALIDATION) else "") == name)
        for name in (TEST, VALIDATION, "")
    )
    usable = split.hold_out(tests, most)
    for row in tests:
        split.cleaned.drop(row, f"test split, over n_heldout={most}")
    split.hold_out(others, min(usable, most) or most)
    split.choose_on(validation)
    split.train_on(others)
    split.finish(rows)


def _encoding(config: Config, tokenizer: Any) -> tuple[Any, ...]:
    """Return everything that `prompts.encode` depends on besides the row and the token limit."""
    settings = (getattr(config, name) for name in rendering.SETTINGS)
    return (*settings, config.train_on, tokenizer)


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
        reason = text_reason(row, config, marks, None if may_repeat else previous)
        previous = row.answer
        if row.split == VALIDATION and not config.selection_rows:
            reason = "validation split, kept for selection"
        elif row.id in seen:
            reason = "same row twice"
        if reason:
            cleaned.drop(row, reason)
            continue
        seen.add(row.id)
        yield row


def _fitting(
    cleaned: Cleaned, config: Config, tokenizer: Any, rows: Iterable[Row]
) -> Iterator[tuple[TokenizedRow, Example]]:
    """Tokenize the rows and yield those with a trained token within `max_length`, encoded up to `heldout_limit`."""
    whole = config.replace(max_length=prompts.heldout_limit(config))
    for example in prompts.encode(rows, whole, tokenizer):
        if item := _kept(cleaned, config, example.row, prompts.lengths(example, config)):
            yield item, example


def _measured(config: Config, tokenizer: Any, rows: Sequence[Row]) -> list[Lengths]:
    return list(prompts.measure(rows, config, tokenizer))


def _kept(cleaned: Cleaned, config: Config, row: Row, lengths: Lengths) -> TokenizedRow | None:
    """Return the row with its numbers of tokens, or note why it is dropped."""
    if lengths.tokens:
        cleaned.lengths.append(lengths.tokens)
    if reason := token_reason(lengths, config):
        cleaned.drop(row, reason)
        return None
    return TokenizedRow(row, lengths.tokens, lengths.trained)


def _distinct(cleaned: Cleaned, rows: Sequence[Row], config: Config) -> Iterator[Row]:
    """Yield one row of each group of near duplicates: the first in the order of the split."""
    index = Index(config.near_duplicates, same_text)
    kept: list[Row] = []
    for row, words in zip(rows, shared(_words, rows), strict=True):
        match = index.first_similar(words)
        if match is None:
            kept.append(row)
            yield row
        else:
            cleaned.drop(row, NEAR_ROW)
            cleaned.near_duplicates.append(NearDuplicate(row, kept[match[0]], match[1], NEAR_ROW))


def _words(rows: Sequence[Row]) -> list[Words]:
    return [words_of(parts(row), same_text) for row in rows]


def _rehearsal(
    config: Config, tokenizer: Any, heldout: list[TokenizedRow], wanted: int
) -> tuple[list[Example], str | None]:
    """Return `wanted` rows of the rehearsal data set, and its name.

    They are the first ones in the order of the data seed that are no leak of a held-out row. Raises `UserError` if
    there are too few.
    """
    if not wanted:
        return [], None
    own: dict[str, Any] = {"subset": None, "split": None, "columns": None, "group_by": None}  # of the first data set
    own |= {"keep_best": False, "early_stopping_patience": None, "draw": config.data_seed}
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
            f"rehearsal: {counted(wanted, 'row')} requested, but {len(rows)} usable in {config.rehearsal_dataset}. "
            "Fix: a smaller rehearsal, or a larger rehearsal_dataset."
        )
    return _examples(cleaned, rows[:wanted], second, tokenizer, second.max_length), cleaned.loaded.name


def _examples(cleaned: Cleaned, items: list[TokenizedRow], config: Config, tokenizer: Any, limit: int) -> list[Example]:
    """Return the rows encoded up to `limit` tokens. Tokenizes only rows that `cleaned` does not hold in that length."""
    known = cleaned.examples if cleaned.encoding == _encoding(config, tokenizer) else {}
    long_enough = {key for key, example in known.items() if not example.cut or len(example.input_ids) >= limit}
    missing = [item.row for item in items if item.row.id not in long_enough]
    encoded = prompts.encode(missing, config.replace(max_length=limit), tokenizer)
    known.update((example.row.id, example) for example in encoded)
    return [prompts.shortened(known[item.row.id], limit) for item in items]


def check_no_leak(data: Data) -> None:
    """Raise `UserError` if a held-out question or answer is also trained on: the held-out loss would mean nothing."""
    held = HeldOut(data.cleaned.loaded.rows, 1.0)
    for example in data.heldout:
        held.add(example.row)
    both = [example.row for example in [*data.trained_on, *data.selection] if held.leak(example.row)]
    if both:
        raise UserError(
            f"held-out set: {len(both)} of its rows are also trained on or chosen on (first: {both[0].origin}). "
            "Fix: remove them from the data set."
        )
