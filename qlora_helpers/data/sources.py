"""Load rows from the hub, a file, a folder, the sample data or Python's docstrings."""

import itertools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_helpers import parse
from qlora_helpers.config import PYTHON_DOCS, SAMPLE_DATA, Config
from qlora_helpers.data import python_docs, readers, schema
from qlora_helpers.data.readers import READERS, Records
from qlora_helpers.data.schema import TEST, VALIDATION, Row
from qlora_helpers.errors import UserError
from qlora_helpers.files import ROOT
from qlora_helpers.models import hub

SCHEMA_RECORDS = 100  # records from which the schema of a file is recognized
SPLIT_WORDS = {  # words in the names of files, folders and splits
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "heldout"), TEST),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), VALIDATION),
}


@dataclass(frozen=True)
class Loaded:
    """The rows of a source in order, and the rejected records with their reasons.

    `layout` is the recognized schema, several joined by ` + `. `columns` says what each column is taken for, one line
    per schema. `altered` counts the rows from which something was left out, by kind of change. `name` identifies the
    source in reports. `fields` are the names of the source's fields.
    """

    rows: list[Row]
    rejected: list[dict[str, Any]]
    layout: str
    altered: Counter[str]
    name: str
    columns: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """Records with a schema of their own, such as those of a file, and the name of their split, which may be empty."""

    name: str
    records: Records
    split: str = ""

    @property
    def kind(self) -> str:
        """The split that the name stands for: train, test, validation, or none of these."""
        words = re.split(r"[^a-z]+", self.split.lower())
        return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "")


def load(config: Config) -> Loaded:
    """Load the configured data set. Raises `UserError` if the source cannot be read as rows."""
    found, name, group_by = parts(config), str(config.dataset), config.group_by
    if name == PYTHON_DOCS:
        name, group_by = python_docs.source_name(), group_by or "module"
    elif name != SAMPLE_DATA and _is_path(name):
        name = str(parse.path(name, "dataset"))
    return _parse(found, name, schema.parse_columns(config.columns), group_by)


def parts(config: Config) -> list[Part]:
    """Return the parts of the configured data set, whose records are read as they are needed.

    Raises `UserError`, also later while the records are read, if there is no such data set.
    """
    name = config.dataset
    if name is None:
        raise UserError(
            f"dataset: the preset '{config.preset_name}' does not define one. Fix: pass dataset=FILE or a hub id."
        )
    if name == PYTHON_DOCS:
        return [Part(name, python_docs.records())]
    if name == SAMPLE_DATA:
        return _local_parts(sample_data(), None)
    if not _is_path(name):
        return [Part(name, _from_hub(config))]
    path = parse.path(name, "dataset")
    local = _local_parts(path, config.subset)
    return _one_split(local, config.split, path) if config.split else local


def public_name(config: Config) -> str | None:
    """Return a name for the data set that reveals no local path: its hub id, or the last part of its path."""
    if config.dataset is None or config.dataset in (SAMPLE_DATA, PYTHON_DOCS) or not _is_path(config.dataset):
        return config.dataset
    return Path(config.dataset).name


def sample_data() -> Path:
    """Return the path of the project's sample conversations."""
    return own_data("conversations.jsonl")


def general_data() -> Path:
    """Return the path of the project's general questions, which measure what the model forgets in fine-tuning."""
    return own_data("general.jsonl")


def own_data(name: str) -> Path:
    """Return the path of a file in `data/`, from the checkout if there is one, otherwise from the installed package."""
    checkout = ROOT / "data" / name
    return checkout if checkout.exists() else Path(__file__).parents[1] / "_data" / name


def _is_path(dataset: str) -> bool:
    path = parse.path(dataset, "dataset")
    return path.exists() or readers.suffix(path) in READERS or dataset.count("/") != 1


def _from_hub(config: Config) -> Records:
    import datasets

    if not hub.reachable():
        datasets.config.HF_HUB_OFFLINE = True  # use the cache, or fail immediately
    name, revision = str(config.dataset), config.dataset_revision
    how = {"streaming": True} if config.streaming else {}
    try:
        rows = datasets.load_dataset(name, config.subset, revision=revision, split=config.split or "train", **how)
    except Exception as error:  # many kinds: no network, unknown id, revision, subset or split, gated data set
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"dataset: '{name}' at revision {revision} is not available on the hub ({why}). "
            "Fix: check the name and the connection, or pass dataset=FILE."
        ) from None
    yield from readers.numbered(rows)


def _local_parts(path: Path, subset: str | None) -> list[Part]:
    """Return the parts of a file or a folder. Rows of a folder are preceded by the name of their file.

    A folder's splits come from the names of its files and subfolders, or from `datasets`, if that wrote it.
    """
    if subset:
        if not parse.path(path / subset, "subset").is_dir():
            raise UserError(f"subset: {path} has no folder '{subset}'. Fix: check the name, or leave subset out.")
        path = path / subset
    if path.is_dir() and readers.is_saved(path):
        return [Part(str(path), records, split) for split, records in readers.read_saved(path).items()]
    if not path.is_dir():
        return [
            Part(str(file), records, split) for file in _files(path) for split, records in readers.read(file).items()
        ]
    parts = []
    for file in _files(path):
        name = file.relative_to(path)
        for split, records in readers.read(file).items():
            words = split or " ".join(reversed(name.parts))  # the name of the file before those of its folders
            parts.append(Part(str(file), _named(name.as_posix(), records), words))
    return parts


def _named(name: str, records: Records) -> Records:
    return ((f"{name} {place}", record) for place, record in records)


def _one_split(parts: list[Part], split: str, path: Path) -> list[Part]:
    """Return the parts of one split as ordinary rows. Raises `UserError` if there are none."""
    chosen = [replace(part, split="") for part in parts if split in (part.split, part.kind)]
    if not chosen:
        has = ", ".join(sorted({part.kind or part.split for part in parts} - {""})) or "none"
        raise UserError(
            f"split: {path} has no split '{split}' (has: {has}). Fix: name one of these, or leave split out."
        )
    return chosen


def _files(path: Path) -> list[Path]:
    """Return the file itself, or all files of a supported format in the folder and its subfolders, sorted by path."""
    if path.is_dir():
        readable = [file for file in path.rglob("*") if readers.suffix(file) in READERS and file.is_file()]
        if not readable:
            raise UserError(f"dataset: {path} contains no {_suffixes()} file. Fix: add one.")
        return sorted(readable, key=lambda file: file.relative_to(path).as_posix())
    if not path.is_file():
        raise UserError(f"dataset: the file {path} does not exist. Fix: check the path.")
    if readers.suffix(path) not in READERS:
        raise UserError(f"dataset: {path} is not a {_suffixes()} file. Fix: convert it to one of these formats.")
    return [path]


def _suffixes() -> str:
    *others, last = READERS
    return f"{', '.join(others)} or {last}"


def _group(record: dict[str, Any], field: str | None) -> str:
    """Return the value of a field as text, or "" if there is none. Upper and lower case of its name are the same."""
    value = next((value for name, value in record.items() if field and schema.fold(name) == schema.fold(field)), None)
    return "" if value is None else str(value).strip()


def _parse(parts: Iterable[Part], source: str, given: schema.Given, group_by: str | None) -> Loaded:
    """Convert the records of all parts to rows. The schema is recognized separately for each part, such as a file.

    Test rows come first, so that of equal rows theirs is kept. Without any other rows, there is no split. Rows with
    equal values in the field `group_by` are a group.
    """
    parts = sorted(parts, key=lambda part: part.kind != TEST)
    is_split = any(part.kind not in (TEST, VALIDATION) for part in parts)
    rows: list[Row] = []
    rejected: list[dict[str, Any]] = []
    layouts: dict[str, None] = {}
    columns: dict[str, None] = {}
    fields: dict[str, None] = {}
    altered: Counter[str] = Counter()
    for part in parts:
        first = list(itertools.islice(part.records, SCHEMA_RECORDS))
        if not first:
            continue
        records = [record for _, record in first]
        layout = schema.recognize(records, part.name, given)
        layouts[layout] = columns[schema.describe_columns(records, layout, given, group_by)] = None
        fields |= dict.fromkeys(schema.names_of(records))
        split = part.kind if is_split and part.kind in (TEST, VALIDATION) else ""
        for origin, record in itertools.chain(first, part.records):
            try:
                row = schema.to_row(record, layout, origin, altered, given)
            except ValueError as error:
                rejected.append({"reason": str(error), "origin": origin, "row": record})
            else:
                group = _group(record, group_by)
                rows.append(replace(row, split=split, group=group) if split or group else row)
    if not layouts:
        raise UserError(f"dataset: {source} is empty or has no rows. Fix: use a file with one JSON object per line.")
    return Loaded(rows, rejected, " + ".join(layouts), altered, source, tuple(columns), tuple(fields))
