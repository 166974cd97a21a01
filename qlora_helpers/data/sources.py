"""Where rows come from: a hub id, files of four kinds, a folder of them, the sample data, Python's documentation."""

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
LOOKED_AT = 100  # records that decide the layout


@dataclass(frozen=True)
class Loaded:
    """What a source gave: rows in order, the rejected ones with their reason, and what was recognized."""

    rows: list[Row]
    rejected: list[dict[str, Any]]
    layout: str
    altered: Counter[str]
    name: str


def load(config: Config) -> Loaded:
    """Read the config's data set. Raises `UserError` for a source that cannot be read as rows."""
    if config.dataset is None:
        raise UserError(
            f"dataset: the preset '{config.preset_name}' has none of its own. Fix: pass dataset=FILE or a hub id."
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
    """The data set in words that say nothing of this machine: its id on the hub, or its file's own name."""
    if config.dataset is None or config.dataset in (SAMPLE_DATA, PYTHON_DOCS) or not _is_path(config.dataset):
        return config.dataset
    return Path(config.dataset).name


def sample_data() -> Path:
    """The project's own conversations."""
    return own_data("conversations.jsonl")


def general_data() -> Path:
    """The project's own general questions, which show what fine-tuning forgets."""
    return own_data("general.jsonl")


def own_data(name: str) -> Path:
    """A file of `data/`: in the checkout, else in the installed package."""
    checkout = ROOT / "data" / name
    return checkout if checkout.exists() else Path(__file__).parents[1] / "_data" / name


def _is_path(dataset: str) -> bool:
    path = Path(dataset).expanduser()
    return path.exists() or path.suffix in READERS or dataset.count("/") != 1


def _from_hub(name: str, revision: str) -> Records:
    import datasets

    if not hub.reachable():
        datasets.config.HF_HUB_OFFLINE = True  # the cache, or an error at once
    try:
        rows = datasets.load_dataset(name, revision=revision, split="train")
    except Exception as error:  # datasets raises many kinds: no network, no such id, no such revision, gated
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"dataset: '{name}' at {revision} cannot be had from the hub ({why}). "
            "Fix: check the name and the connection, or pass dataset=FILE."
        ) from None
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _files(path: Path) -> list[Path]:
    """The file itself, or all files of a known kind in the folder and below, in the order of their names."""
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.suffix in READERS and file.is_file()]
        if not found:
            raise UserError(f"dataset: {path} holds no file of a known kind. Fix: put one of {_known()} there.")
        return sorted(found, key=lambda file: file.relative_to(path).as_posix())
    if not path.is_file():
        raise UserError(f"dataset: there is no file {path}. Fix: check the path.")
    if path.suffix not in READERS:
        raise UserError(f"dataset: {path} is none of {_known()}. Fix: convert it to one of these.")
    return [path]


def _known() -> str:
    return ", ".join(READERS)


def _from_file(file: Path, source: Path) -> Records:
    """Records with their origin: which line or row, of which file if the source is a folder."""
    head = f"{file.relative_to(source).as_posix()} " if source.is_dir() else ""
    try:
        for place, record in READERS[file.suffix](file):
            yield f"{head}{place}", record
    except OSError as error:
        raise UserError(f"dataset: {file} cannot be read ({error.strerror}). Fix: check the file.") from None


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
        raise UserError(f"dataset: {path} holds no list of rows. Fix: make it [{{…}}, {{…}}].")
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _read_csv(path: Path) -> Records:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is less than one long answer
    with path.open("rb") as file:
        reader = csv.DictReader((_decode(raw, path, n) for n, raw in enumerate(file, 1)), strict=True)
        try:
            for row in reader:
                yield f"line {reader.line_num}", row
        except csv.Error as error:
            raise UserError(
                f"dataset: {path} is no valid CSV on line {reader.reader.line_num} ({error}). Fix: repair the line."
            ) from None


def _read_parquet(path: Path) -> Records:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(1000))
            yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
    except ArrowException as error:
        why = str(error).splitlines()[0]
        raise UserError(f"dataset: {path} is no readable Parquet file ({why}). Fix: write it anew.") from None


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
        raise UserError(f"dataset: {path} is no valid JSON on line {line} ({why}). Fix: repair the line.") from None


def _parse(parts: Iterable[tuple[str, Records]], source: str) -> Loaded:
    """Rows of all parts; each part, a file for example, has a layout of its own."""
    rows: list[Row] = []
    rejected: list[dict[str, Any]] = []
    seen: dict[str, None] = {}
    altered: Counter[str] = Counter()
    for name, records in parts:
        first = list(itertools.islice(records, LOOKED_AT))
        if not first:
            continue
        layout = schema.recognize([record for _, record in first], name)
        seen[layout] = None
        for origin, record in itertools.chain(first, records):
            try:
                rows.append(schema.to_row(record, layout, origin, altered))
            except ValueError as error:
                rejected.append({"reason": str(error), "origin": origin, "row": record})
    if not seen:
        raise UserError(f"dataset: {source} is empty or has no rows. Fix: give a file with one JSON object a line.")
    return Loaded(rows, rejected, " + ".join(seen), altered, source)
