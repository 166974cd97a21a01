"""Read records from one file (JSON Lines, JSON, CSV or Parquet, also compressed) or from a folder of `datasets`."""

import codecs
import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qlora_helpers import parse
from qlora_helpers.errors import UserError, blame

Records = Iterator[tuple[str, Any]]  # the place in the file, such as `line 3`, and the record
COMPRESSED = (".gz", ".zst", ".bz2")
SEPARATORS = ",;\t|"  # of CSV files; spreadsheets write the semicolon where the comma separates decimals
LISTS = ("train", "test", "validation", "data", "rows", "examples", "records")  # keys of a JSON object that hold rows


def suffix(path: Path) -> str:
    """Return the suffix that names a file's format, without that of a compression: `.jsonl` for `a.jsonl.gz`."""
    return (Path(path.stem) if path.suffix in COMPRESSED else path).suffix


def read(path: Path) -> dict[str, Records]:
    """Return the records of a file by split, which is empty unless the file itself has splits.

    Raises `UserError`, also later while the records are read, if the file cannot be read.
    """
    with blame("dataset", path):
        found = READERS[suffix(path)](path)
        return {split: _with_errors(records, path) for split, records in found.items()}


def read_saved(folder: Path) -> dict[str, Records]:
    """Return the records of a folder written by `save_to_disk` of `datasets`, by split.

    Raises `UserError` if it cannot be read.
    """
    import datasets

    with blame("dataset", folder):
        saved = datasets.load_from_disk(str(folder))
    splits = saved if isinstance(saved, dict) else {"": saved}
    return {str(split): _with_errors(numbered(rows), folder) for split, rows in splits.items()}


def is_saved(folder: Path) -> bool:
    """Return whether a folder was written by `save_to_disk` of `datasets`."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def numbered(rows: Any) -> Records:
    """Yield rows with their number, from 1."""
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _with_errors(records: Records, path: Path) -> Records:
    with blame("dataset", path):
        yield from records


def _open(path: Path) -> BinaryIO:
    return parse.unpacked(path, "dataset") if path.suffix in COMPRESSED else path.open("rb")


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file in UTF-8, or in UTF-16 if it begins with the mark of that encoding."""
    with _open(path) as file:
        if file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):  # type: ignore[attr-defined]
            try:
                yield from io.TextIOWrapper(file, "utf-16", newline="\n")
            except UnicodeError as error:
                raise UserError(f"dataset: {path} is not valid UTF-16 ({error}). Fix: save it as UTF-8.") from None
            return
        for number, raw in enumerate(file, 1):
            try:
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise UserError(
                    f"dataset: {path} is not UTF-8 on line {number}; in Windows-1252, as spreadsheets save it, "
                    f"it reads '{_excerpt(raw)}'. Fix: save it as UTF-8 (in a spreadsheet: CSV UTF-8)."
                ) from None


def _excerpt(raw: bytes) -> str:
    """Return the first characters around a byte that is not ASCII, decoded as Windows-1252."""
    first = next(number for number, byte in enumerate(raw) if byte > 127)
    return raw[max(0, first - 10) : first + 10].decode("cp1252", "replace").strip()


def _read_jsonl(path: Path) -> dict[str, Records]:
    return {"": _json_lines(path)}


def _json_lines(path: Path) -> Records:
    for number, line in enumerate(_lines(path), 1):
        if text := line.strip():
            yield f"line {number}", _json(text, path, number)


def _read_json(path: Path) -> dict[str, Records]:
    if _is_jsonl(path):
        return _read_jsonl(path)
    joined = io.StringIO()  # a list of short lines takes many times the memory of their text
    joined.writelines(_lines(path))
    content = joined.getvalue()
    lists = _lists(_json(content, path, 1) if content.strip() else [], path)
    return {key: numbered(rows) for key, rows in lists.items()}


def _is_jsonl(path: Path) -> bool:
    """Return whether the first line is a complete record and another one follows."""
    filled = (line for line in _lines(path) if line.strip())
    first, second = next(filled, ""), next(filled, None)
    try:
        return second is not None and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _lists(content: Any, path: Path) -> dict[str, list[Any]]:
    """Return the rows of a JSON file by split: a list, a list in an object, or an object of columns, as pandas writes.

    Raises `UserError` if it has another form.
    """
    if isinstance(content, list):
        return {"": content}
    content = content if isinstance(content, dict) else {}
    named = {key: rows for key in LISTS if isinstance(rows := content.get(key), list)}
    if named and all(isinstance(row, dict) for rows in named.values() for row in rows):
        return named if len(named) > 1 else {"": next(iter(named.values()))}
    columns = {key: [*c.values()] if isinstance(c, dict) else c for key, c in content.items()}
    if columns and all(isinstance(c, list) for c in columns.values()) and len({*map(len, columns.values())}) == 1:
        return {"": [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]}
    has = f"an object with the keys {', '.join(content)}" if content else "empty or a single value"
    raise UserError(
        f"dataset: {path} is not a list of rows but {has}. Fix: write it as [{{…}}, {{…}}], or the list under data."
    )


def _read_csv(path: Path) -> dict[str, Records]:
    return {"": _csv_rows(path)}


def _csv_rows(path: Path) -> Records:
    csv.field_size_limit(2**31 - 1)  # a long answer can exceed the default of 128 KiB
    lines = _lines(path)
    header = next(lines, "")
    separator = max(SEPARATORS, key=header.count)
    reader = csv.DictReader(itertools.chain([header], lines), delimiter=separator, strict=True)
    try:
        for row in reader:
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise UserError(
            f"dataset: {path} is not valid CSV on line {reader.reader.line_num} ({error}). Fix: correct the line."
        ) from None


def _read_parquet(path: Path) -> dict[str, Records]:
    return {"": numbered(parse.parquet_rows(path, "dataset"))}


READERS: dict[str, Callable[[Path], dict[str, Records]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def _json(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        why = "a comma ends the line" if text.endswith("},") else getattr(error, "msg", str(error).split(":")[0])
        raise UserError(f"dataset: {path} is not valid JSON on line {line} ({why}). Fix: correct the line.") from None
