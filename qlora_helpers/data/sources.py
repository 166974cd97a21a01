"""Load rows from the hub, a file in one of four formats, a folder of files, the sample data or Python's docstrings."""

import csv
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_helpers.config import PYTHON_DOCS, SAMPLE_DATA, Config
from qlora_helpers.data import python_docs, schema
from qlora_helpers.data.schema import Row
from qlora_helpers.errors import UserError
from qlora_helpers.files import ROOT
from qlora_helpers.models import hub

Records = Iterator[tuple[str, Any]]
SCHEMA_RECORDS = 100  # records from which the schema of a file is recognized


@dataclass(frozen=True)
class Loaded:
    """The rows of a source in order, and the rejected records with their reasons.

    `layout` is the recognized schema, several joined by ` + `. `altered` counts the rows from which a turn was left
    out. `name` identifies the source in reports.
    """

    rows: list[Row]
    rejected: list[dict[str, Any]]
    layout: str
    altered: Counter[str]
    name: str


def load(config: Config) -> Loaded:
    """Load the configured data set. Raises `UserError` if the source cannot be read as rows."""
    if config.dataset is None:
        raise UserError(
            f"dataset: the preset '{config.preset_name}' does not define one. Fix: pass dataset=FILE or a hub id."
        )
    if config.dataset == PYTHON_DOCS:
        return _parse([(PYTHON_DOCS, python_docs.records())], python_docs.source_name())
    if config.dataset == SAMPLE_DATA:
        path = sample_data()
    elif _is_path(config.dataset):
        path = Path(config.dataset).expanduser()
    else:
        records = _from_hub(config.dataset, config.dataset_revision)
        return _parse([(config.dataset, records)], config.dataset)
    name = SAMPLE_DATA if config.dataset == SAMPLE_DATA else str(path)
    return _parse(((str(file), _from_file(file, path)) for file in _files(path)), name)


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
    path = Path(dataset).expanduser()
    return path.exists() or path.suffix in READERS or dataset.count("/") != 1


def _from_hub(name: str, revision: str) -> Records:
    import datasets

    if not hub.reachable():
        datasets.config.HF_HUB_OFFLINE = True  # use the cache, or fail immediately
    try:
        rows = datasets.load_dataset(name, revision=revision, split="train")
    except Exception as error:  # many kinds: no network, unknown id or revision, gated data set
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"dataset: '{name}' at revision {revision} is not available on the hub ({why}). "
            "Fix: check the name and the connection, or pass dataset=FILE."
        ) from None
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _files(path: Path) -> list[Path]:
    """Return the file itself, or all files of a supported format in the folder and its subfolders, sorted by path."""
    if path.is_dir():
        readable = [file for file in path.rglob("*") if file.suffix in READERS and file.is_file()]
        if not readable:
            raise UserError(f"dataset: {path} contains no {_suffixes()} file. Fix: add one.")
        return sorted(readable, key=lambda file: file.relative_to(path).as_posix())
    if not path.is_file():
        raise UserError(f"dataset: the file {path} does not exist. Fix: check the path.")
    if path.suffix not in READERS:
        raise UserError(f"dataset: {path} is not a {_suffixes()} file. Fix: convert it to one of these formats.")
    return [path]


def _suffixes() -> str:
    *others, last = READERS
    return f"{', '.join(others)} or {last}"


def _from_file(file: Path, source: Path) -> Records:
    """Yield records with their origin: the line or row, preceded by the file name if the source is a folder."""
    head = f"{file.relative_to(source).as_posix()} " if source.is_dir() else ""
    try:
        for place, record in READERS[file.suffix](file):
            yield f"{head}{place}", record
    except OSError as error:
        raise UserError(f"dataset: cannot read {file} ({error.strerror}). Fix: check the file.") from None


def _read_jsonl(path: Path) -> Records:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            text = _decode(raw, path, number).strip()
            if text:
                yield f"line {number}", _json(text, path, number)


def _read_json(path: Path) -> Records:
    content = _decode(path.read_bytes(), path, 1)
    rows = _json(content, path, 1) if content.strip() else []
    if not isinstance(rows, list):
        raise UserError(f"dataset: {path} is not a list of rows. Fix: write it as [{{…}}, {{…}}].")
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _read_csv(path: Path) -> Records:
    csv.field_size_limit(2**31 - 1)  # a long answer can exceed the default of 128 KiB
    with path.open("rb") as file:
        reader = csv.DictReader((_decode(raw, path, n) for n, raw in enumerate(file, 1)), strict=True)
        try:
            for row in reader:
                yield f"line {reader.line_num}", row
        except csv.Error as error:
            raise UserError(
                f"dataset: {path} is not valid CSV on line {reader.reader.line_num} ({error}). Fix: correct the line."
            ) from None


def _read_parquet(path: Path) -> Records:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(1000))
            yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
    except ArrowException as error:
        why = str(error).splitlines()[0]
        raise UserError(f"dataset: {path} is not a readable Parquet file ({why}). Fix: export it again.") from None


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}


def _decode(raw: bytes, path: Path, line: int) -> str:
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += raw[: error.start].count(b"\n")
        raise UserError(f"dataset: {path} is not UTF-8 on line {line}. Fix: save it as UTF-8.") from None


def _json(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        why = getattr(error, "msg", str(error).split(":")[0])
        raise UserError(f"dataset: {path} is not valid JSON on line {line} ({why}). Fix: correct the line.") from None


def _parse(parts: Iterable[tuple[str, Records]], source: str) -> Loaded:
    """Convert the records of all parts to rows. The schema is recognized separately for each part, such as a file."""
    rows: list[Row] = []
    rejected: list[dict[str, Any]] = []
    layouts: dict[str, None] = {}
    altered: Counter[str] = Counter()
    for name, records in parts:
        first = list(itertools.islice(records, SCHEMA_RECORDS))
        if not first:
            continue
        layout = schema.recognize([record for _, record in first], name)
        layouts[layout] = None
        for origin, record in itertools.chain(first, records):
            try:
                rows.append(schema.to_row(record, layout, origin, altered))
            except ValueError as error:
                rejected.append({"reason": str(error), "origin": origin, "row": record})
    if not layouts:
        raise UserError(f"dataset: {source} is empty or has no rows. Fix: use a file with one JSON object per line.")
    return Loaded(rows, rejected, " + ".join(layouts), altered, source)
