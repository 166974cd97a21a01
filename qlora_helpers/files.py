"""Files: written atomically and flushed to disk, folders built beside their place, hashes, and the cache folder."""

import contextlib
import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qlora_helpers import locks, parse

ROOT = Path(__file__).resolve().parents[1]
PART, LOCK, REPLACED = ".part", ".building", "replaced"  # of a folder that is being built
CANNOT_FLUSH = (errno.EINVAL, errno.ENOTSUP)  # answers of file systems that have no flush


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON to a temporary file, flush it to disk, then rename it.

    If the process is killed or the power fails, the old file or the new one remains, never a partial one. A file that
    is replaced keeps its mode, and a link stays a link.
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
    path = Path(os.path.realpath(path))
    make_folder(path.parent)
    part = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        with part.open("xb") as file:
            file.writelines(parts)
        if path.exists():
            shutil.copymode(path, part)
        flush(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Write a file's content, or the names in a folder, from memory to the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in CANNOT_FLUSH:
            raise
    finally:
        os.close(handle)


def flush_all(folder: Path) -> None:
    """Flush a folder and all files and folders in it."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            flush(Path(parent, name))
        flush(Path(parent))


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing. Their names are flushed."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        flush(folder.parent)


@contextlib.contextmanager
def building(target: Path) -> Iterator[Path]:
    """Yield a new folder. At the end, flush it and rename it to `target`, which never holds a part of it.

    It is built in a hidden folder beside `target`. After an error, `target` is as it was; a folder that it names
    already is replaced, so the caller decides whether it may be.
    """
    make_folder(target.parent)
    clear_leftovers(target)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-", suffix=PART))
    with locks.hold(scratch / LOCK):
        try:
            built = scratch / "built"
            built.mkdir()
            yield built
            flush_all(built)
            if target.exists():
                shutil.copymode(target, built)
                target.rename(scratch / REPLACED)
            built.rename(target)
            flush(target.parent)
        finally:
            _clear(scratch, target)


def clear_leftovers(target: Path) -> None:
    """Delete what killed processes left of folders that they built for `target`.

    Those still being built stay, and so do all where the file system has no locks that would tell them apart.
    """
    import filelock

    for scratch in target.parent.glob(f".{glob.escape(target.name)}-*{PART}"):
        with contextlib.suppress(filelock.Timeout, OSError, NotImplementedError):
            if (scratch / LOCK).exists():
                with filelock.FileLock(scratch / LOCK, timeout=0):
                    _clear(scratch, target)


def _clear(scratch: Path, target: Path) -> None:
    """Delete a scratch folder. What `target` held comes back if the new folder has not taken its place."""
    if (scratch / REPLACED).exists() and not target.exists():
        (scratch / REPLACED).rename(target)
    shutil.rmtree(scratch, ignore_errors=True)


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


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a folder and its subfolders, by relative path."""
    found = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {file.relative_to(folder).as_posix(): sha256(file) for file in found}


def cache_folder() -> Path:
    """Return the cache folder: `qlora_helpers/` in `QLORA_CACHE`, else in the user's cache folder."""
    home = os.environ.get("QLORA_CACHE") or os.environ.get("XDG_CACHE_HOME")
    return Path(home).expanduser() / "qlora_helpers" if home else Path.home() / ".cache" / "qlora_helpers"
