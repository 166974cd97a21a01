"""Rows that are read while they are trained on, in constant memory, however many there are.

The first rows, the head, are cleaned and split like any data set: held-out rows, rows to choose a checkpoint on, and
set phrases come from them. All other rows are checked one by one. Which rows can be trained on is known only after they
are tokenized, so a run counts them in a first pass, before the base model is loaded.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

from qlora_helpers import files
from qlora_helpers.config import PYTHON_DOCS, Config
from qlora_helpers.data import cleaning, prompts, rendering, row_checks, schema, sources
from qlora_helpers.data.cleaned import Data, fingerprint
from qlora_helpers.data.leaks import HeldOut
from qlora_helpers.data.prompts import Example
from qlora_helpers.data.schema import TEST, VALIDATION, Row
from qlora_helpers.data.sources import Loaded, Part
from qlora_helpers.errors import UserError
from qlora_helpers.wording import counted

BUFFER = 10_000  # rows among which a stream is shuffled
HEAD, HEAD_SHARE = 1_000, 20  # rows of the head, at least; and per held-out row
HELD_OUT = "held out, or chosen on"
REASONS, OTHER = 100, "another reason"  # reasons that are counted by themselves: some quote a row


@dataclass
class Seen:
    """What a pass over a stream has read: records, those skipped by reason, and what holds for the rows trained on.

    Of these it has the sum of their ids, the number of those cut at the token limit, the tokens of the longest one,
    and their largest token id.
    """

    read: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    ids: int = 0
    cut: int = 0
    longest: int = 0
    largest_token: int = 0
    ends: bool = True  # no usable row is left

    def add(self, example: Example) -> None:
        """Note a row that is trained on."""
        self.ids += int(example.row.id, 16)
        self.cut += example.cut > 0
        self.longest = max(self.longest, len(example.input_ids))
        self.largest_token = max(self.largest_token, *example.input_ids)

    def skip(self, reason: str) -> None:
        """Count a row that is not trained on."""
        self.skipped[reason if reason in self.skipped or len(self.skipped) < REASONS else OTHER] += 1


@dataclass(frozen=True)
class Stream:
    """The training rows in their order, encoded, read anew in every loop. `len` is the number of rows.

    `head` are the first rows of the source, and `held` those of them that are never trained on.
    """

    config: Config
    tokenizer: Any
    head: list[Row]
    held: list[Row]

    def __len__(self) -> int:
        return self.config.n_samples or 0

    def __iter__(self) -> Iterator[Example]:
        return islice(self.usable(Seen()), len(self))

    def usable(self, seen: Seen) -> Iterator[Example]:
        """Yield every row that can be trained on, and count the others in `seen`."""
        for example in prompts.encode(self._rows(seen), self.config, self.tokenizer):
            if reason := row_checks.token_reason(prompts.lengths(example, self.config), self.config):
                seen.skip(reason)
            else:
                yield example

    def _rows(self, seen: Seen) -> Iterator[Row]:
        """Yield the rows whose text can be trained on, in the order of the draw, and count the others."""
        marks = rendering.control_marks(self.config, self.tokenizer)
        ids = {row.id for row in self.held}
        held_out = HeldOut(self.head, self.config.near_duplicates)
        for row in self.held:
            held_out.add(row)
        for item in _shuffled(self.config):
            seen.read += 1
            try:
                row = _row(item, Counter(), self.config)
            except ValueError as error:
                seen.skip(str(error))
                continue
            reason = HELD_OUT if row.id in ids else row_checks.text_reason(row, self.config, marks, None)
            if reason is None and (leak := held_out.leak(row)):
                reason = leak.reason
            if reason:
                seen.skip(reason)
            else:
                yield row


@dataclass(frozen=True, kw_only=True)
class StreamedData(Data):
    """Data of which only the head is in memory. `train` is one of its training rows, `trained_on` is the stream."""

    stream: Stream
    content: str  # hash of the files, without which other rows than those of the head could change unnoticed

    @cached_property
    def seen(self) -> Seen:
        """What the first pass read, up to the last row that is trained on. Raises `UserError` if there are too few."""
        print("Counting the usable rows of the stream …", flush=True)
        return _count(self.stream)

    @property
    def in_memory(self) -> Data:
        """The rows in memory."""
        return Data(**{own.name: getattr(self, own.name) for own in fields(Data)})

    @property
    def trained_on(self) -> Any:
        """The rows that a run trains on: a length, and rows that are read in a loop."""
        return self.stream

    @property
    def source_fingerprint(self) -> str:
        """Hash of the files and the head."""
        return fingerprint([super().source_fingerprint, self.content])

    def counts(self) -> dict[str, int]:
        """Count rows by what happened to them, up to the last one that is trained on and a few that were read ahead.

        Rows that are not asked for are not counted: 1 stands for any number.
        """
        return {
            "rows read": self.seen.read,
            **{f"skipped: {reason}": n for reason, n in sorted(self.seen.skipped.items())},
            "usable, not asked for": int(not self.seen.ends),
            "held-out": len(self.heldout),
            **({"selection": len(self.selection)} if self.selection else {}),
            "train": len(self.stream),
            "train, cut at the token limit": self.seen.cut,
        }

    def to_manifest(self) -> dict[str, Any]:
        """Return the part of a run's manifest that describes its data. One hash stands for the ids of all rows."""
        return super().to_manifest() | {"train_ids": [f"{self.seen.ids % 2**64:016x}"], "streaming": True}


def prepare(config: Config, tokenizer: Any) -> StreamedData:
    """Clean and split the head of the configured data set, and return it with the stream. Prints what is not done.

    Raises `UserError` if a setting needs all rows at once, if the data set cannot be read, or if its head has too few
    usable rows. Rows after the head are read later.
    """
    parts = sources.parts(config)
    _check(config, parts)
    print(
        f"{config.n_samples:,} rows are streamed. Rows that resemble a held-out one are left out; near duplicates "
        "among the others are not searched, and no report on leaks is written.",
        flush=True,
    )
    loaded = _head(config)
    whole = config.replace(streaming=False, n_samples=1)
    head = cleaning.select(cleaning.clean(whole, tokenizer, loaded=loaded), whole, tokenizer)
    held = [example.row for example in [*head.heldout, *head.selection]]
    stream = Stream(config, tokenizer, loaded.rows, held)
    own = {one.name: getattr(head, one.name) for one in fields(Data)}
    return StreamedData(**own, stream=stream, content=_content(parts))


def _check(config: Config, parts: list[Part]) -> None:
    """Raise `UserError` for a setting that needs all rows at once, and for a split that would not be held out."""
    impossible = {
        "n_samples=None needs the number of all rows. Fix: n_samples=N, the number of rows to train on": not (
            config.n_samples
        ),
        f"epochs={config.epochs} reads rows again. Fix: epochs=1, and a larger n_samples": config.epochs > 1,
        "sampling=group_by_length sorts all rows. Fix: sampling=random": config.sampling != "random",
        "group_by needs all rows of a group. Fix: leave it out, or streaming=false": bool(config.group_by),
        "rehearsal mixes rows into all others. Fix: rehearsal=0, or a file that holds both": config.rehearsal > 0,
        "python-stdlib is made in memory. Fix: streaming=false": config.dataset == PYTHON_DOCS,
    }
    if reason := next((words for words, holds in impossible.items() if holds), None):
        raise UserError(f"streaming: {reason}.")
    own = next((part.kind for part in parts if part.kind in (TEST, VALIDATION)), None)
    if own and len(parts) > 1:
        raise UserError(
            f"streaming: {config.dataset} has a {own} split, and streams are not split by files. Fix: split=train, or "
            "a folder without it."
        )


def _count(stream: Stream) -> Seen:
    """Read the stream up to the last row that is trained on. Raises `UserError` if there are too few."""
    seen, number = Seen(), 0
    rows = stream.usable(seen)
    for number, example in enumerate(islice(rows, len(stream)), 1):  # noqa: B007
        seen.add(example)
    seen.ends = next(rows, None) is None
    if number < len(stream):
        why = "".join(f"; {count} × {reason}" for reason, count in seen.skipped.most_common(cleaning.REASONS))
        fix = f"n_samples={number} or less, or more data" if number else "more data"
        raise UserError(
            f"n_samples: {counted(len(stream), 'row')} requested for training, but {number} usable in the stream "
            f"({seen.read} read{why}). Fix: {fix}."
        )
    return seen


def _shuffled(config: Config) -> Any:
    """Return the records of the data set, shuffled in a buffer by the draw."""
    from datasets import IterableDataset

    stream = IterableDataset.from_generator(_records, gen_kwargs={"config": config})
    return stream.shuffle(seed=config.training_draw, buffer_size=BUFFER)


def _records(config: Config) -> Iterator[dict[str, Any]]:
    """Yield the records of all parts in order, each with its place and its schema."""
    given = schema.parse_columns(config.columns)
    for part in sources.parts(config):
        first = list(islice(part.records, sources.SCHEMA_RECORDS))
        layout = schema.recognize([record for _, record in first], part.name, given) if first else ""
        for origin, record in chain(first, part.records):
            yield {"record": record, "origin": origin, "layout": layout}


def _row(item: dict[str, Any], altered: Counter[str], config: Config) -> Row:
    return schema.to_row(item["record"], item["layout"], item["origin"], altered, schema.parse_columns(config.columns))


def _head(config: Config) -> Loaded:
    """Return the first rows of the data set. Their number does not depend on how many are trained on."""
    items = list(islice(_records(config), max(HEAD, HEAD_SHARE * config.n_heldout)))
    rows: list[Row] = []
    rejected: list[dict[str, Any]] = []
    altered: Counter[str] = Counter()
    for item in items:
        try:
            rows.append(_row(item, altered, config))
        except ValueError as error:
            rejected.append({"reason": str(error), "origin": item["origin"], "row": item["record"]})
    if not items:
        raise UserError(f"dataset: {config.dataset} is empty or has no rows. Fix: one JSON object per line.")
    layouts = " + ".join(dict.fromkeys(item["layout"] for item in items))
    return Loaded(rows, rejected, layouts, altered, str(config.dataset))


def _content(parts: list[Part]) -> str:
    """Return a hash of the files that are read. A data set on the hub is known by its name and revision."""
    paths = [Path(part.name) for part in parts]
    inner = (sorted(path.rglob("*")) if path.is_dir() else [path] for path in paths)
    return files.short_hash([files.sha256(file) for file in chain.from_iterable(inner) if file.is_file()])
