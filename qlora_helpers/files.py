"""Files: JSON written atomically, the cache folder, and short hashes."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qlora_helpers import parse

ROOT = Path(__file__).resolve().parents[1]


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON to a temporary file, then rename it.

    If the process is killed, the old file or the new one remains, never a partial one.
    """
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically, like `write_json`."""
    _write(path, [text.encode(errors="backslashreplace")])


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` atomically, like `write_json`."""
    _write(path, [content])


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line, atomically, like `write_json`.

    Values that JSON cannot represent, such as a date from a Parquet file, become text. Lone surrogates are escaped.
    """
    lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    _write(path, (line.encode(errors="backslashreplace") for line in lines))


def _write(path: Path, parts: Iterable[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines(parts)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return all rows of a JSONL file written by this package.

    Raises `UserError` for a damaged file and `FileNotFoundError` for a missing one.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    return parse.json_rows(path, "file", "Fix: delete its folder and run again.")


def short_hash(content: Any) -> str:
    """Return the first 12 hex digits of the SHA-256 of a JSON value, for use in names."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def cache_folder() -> Path:
    """Return the cache folder: `qlora_helpers/` in `QLORA_CACHE`, else in the user's cache folder."""
    home = os.environ.get("QLORA_CACHE") or os.environ.get("XDG_CACHE_HOME")
    return Path(home).expanduser() / "qlora_helpers" if home else Path.home() / ".cache" / "qlora_helpers"
