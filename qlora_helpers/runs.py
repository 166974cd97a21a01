"""Run folders: where a run is stored, its lock, manifest and checkpoints, and finding runs of earlier notebooks."""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_helpers import files
from qlora_helpers.config import Config
from qlora_helpers.errors import UserError

SEAL = "complete.json"
INDEX, INDEXED = ".runs.json", 20  # see `_identities`; a folder with fewer new runs needs no index
MERGED, GGUF = "merged", "gguf"  # subfolders of an export
DRIVE = Path("/content/drive/MyDrive")  # Google Drive, where Colab mounts it


def workdir(given: str | None = None) -> Path:
    """Return the folder of all runs, created if it does not exist.

    It is the first of: the given one, `QLORA_WORKDIR`, Google Drive if it is mounted, `runs/` in the checkout, `runs/`
    in the current folder. Raises `UserError` if it is not writable.
    """
    if given or os.environ.get("QLORA_WORKDIR"):
        path = Path(given or os.environ["QLORA_WORKDIR"])
    elif DRIVE.is_dir():
        path = DRIVE / "qlora_runs"
    else:
        path = (files.ROOT if (files.ROOT / "pyproject.toml").exists() else Path.cwd()) / "runs"
    path = path.expanduser().resolve()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"output folder: {path} cannot be written ({reason}). Fix: choose another folder.") from None
    return path


@dataclass(frozen=True)
class RunFolder:
    """One run on disk. `metrics.json` is written last, so a folder that has it is a finished run."""

    path: Path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def name(self) -> str:
        """Name of the folder, such as exp1."""
        return self.path.name

    @property
    def finished(self) -> bool:
        """Whether the run is finished."""
        return (self / "metrics.json").exists()

    @property
    def adapter(self) -> Path:
        """Folder of the adapter, its tokenizer and its model card."""
        return self / "adapter"

    def read(self, name: str) -> Any:
        """Parse one of the run's JSON files. Raises `UserError` if it is missing or damaged."""
        try:
            content = json.loads((self / name).read_text("utf-8"))
            if not isinstance(content, dict):
                raise ValueError("not a JSON object")
            return content
        except FileNotFoundError:
            raise UserError(f"run folder: {self.path} has no {name}. Fix: run its notebook to the end.") from None
        except (ValueError, OSError) as error:
            raise UserError(
                f"run folder: {self / name} cannot be read ({error}). Fix: delete the folder and run again."
            ) from None

    def config(self) -> Config:
        """Return the config of the run. Raises `UserError` if another version of this package wrote it."""
        try:
            return Config(**self.read("config.json")["config"]).replace()
        except TypeError:
            raise UserError(
                f"run folder: {self.path} was written by another version of qlora_helpers. Fix: train it again."
            ) from None

    def identity(self) -> dict[str, str] | None:
        """Return the fingerprints of the run's config and data, or None for a new folder."""
        if not (self / "config.json").exists():
            return None
        identity = self.read("config.json").get("identity")
        if not isinstance(identity, dict):
            raise UserError(f"run folder: {self / 'config.json'} is damaged. Fix: delete the folder and run again.")
        return identity

    def compute_dtype(self) -> str | None:
        """Return the compute dtype of the run, from its manifest, or None for a run that has not started."""
        return self.read("manifest.json")["device"]["dtype"] if (self / "manifest.json").exists() else None

    def log(self) -> list[dict[str, Any]]:
        """Return the training and held-out losses, one line per step."""
        return files.read_jsonl(self / "log.jsonl")


def find(folder: Path, identity: dict[str, str]) -> RunFolder | None:
    """Return the run in `folder` with this identity, whatever its name, or None. Finished runs come first."""
    runs = [RunFolder(folder / name) for name, known in _identities(folder).items() if known == identity]
    same = [run for run in runs if run.identity() == identity]
    return next((run for run in same if run.finished), same[0] if same else None)


def _identities(folder: Path) -> dict[str, Any]:
    """Return the identity of each run in `folder`, by name, in order.

    The index keeps them with the time and size of their `config.json`, so that fewer than `INDEXED` files are read,
    those of new and changed runs: a folder may hold thousands of runs, and lie on a slow disk.
    """
    try:
        known = dict(json.loads((folder / INDEX).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        known = {}
    listed, new = {}, 0
    for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        try:
            stat = os.stat(f"{folder}/{name}/config.json")
        except OSError:  # no run
            continue
        match known.get(name):
            case [stat.st_mtime_ns, stat.st_size, identity]:
                pass
            case _:
                identity, new = RunFolder(folder / name).identity(), new + 1
        listed[name] = [stat.st_mtime_ns, stat.st_size, identity]
    if new >= INDEXED:
        with contextlib.suppress(OSError):
            files.write_json(folder / INDEX, listed)
    return {name: identity for name, (*_, identity) in listed.items()}


def choose(folder: Path, name: str, identity: dict[str, str]) -> RunFolder:
    """Return the folder for a run: `name` if that is free or holds an equal run.

    If `name` holds a different run, return an equal run under another name, else `name` with a suffix. Nothing is ever
    overwritten.
    """
    named = RunFolder(folder / name)
    if named.identity() in (None, identity):
        return named
    return find(folder, identity) or RunFolder(folder / f"{name}-{files.short_hash(identity)[:8]}")


def check_free(run: RunFolder, config: Config, identity: dict[str, str] | None = None) -> None:
    """Raise `UserError` if the folder holds another run, naming the settings that differ.

    The data are compared too if `identity` is given.
    """
    existing = run.identity()
    wanted = identity or {"config": config.identity}
    differ = [key for key in wanted if existing and existing.get(key) != wanted[key]]
    if not differ:
        return
    there, here = run.read("config.json").get("config"), config.to_dict()
    there = there if isinstance(there, dict) else {}
    what = [f"{key} {there.get(key)} there, {here[key]} here" for key in here if there.get(key) != here[key]]
    why = "; ".join(what[:3]) if "config" in differ else "its rows have changed"
    raise UserError(
        f"run folder: {run.path} holds another run ({why}). Fix: choose another output folder, or delete this one."
    )


@contextlib.contextmanager
def corrupt_files_as_user_error(folders: Iterable[RunFolder]) -> Iterator[None]:
    """Turn exceptions that damaged files cause, by a missing key or a value of the wrong type, into `UserError`."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, OSError) as error:
        names = ", ".join(str(folder.path) for folder in folders)
        raise UserError(
            f"run folder: a file in {names}, or in the folder of their base model, is damaged "
            f"({type(error).__name__}: {error}). Fix: run the notebook again with another output folder."
        ) from error


@contextlib.contextmanager
def lock(run: RunFolder) -> Iterator[None]:
    """Lock the run folder for this process. Raises `UserError` at once if another process holds the lock."""
    import filelock

    run.path.mkdir(parents=True, exist_ok=True)
    holder = filelock.FileLock(run / ".lock")
    try:
        holder.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(
            f"run folder: {run.path} is in use by another process. Fix: wait for it, or stop it first."
        ) from None
    try:
        yield
    finally:
        holder.release()


def manifest(config: Config, device: Any, data: dict[str, Any]) -> dict[str, Any]:
    """Return what is needed to reproduce the run: versions, device, git commit, data fingerprint and row ids."""
    from qlora_helpers.device import versions

    return {"versions": versions(), "device": device.to_dict(), "git_commit": git_commit(), "data": data} | {
        "config_fingerprint": config.identity
    }


def git_commit() -> str | None:
    """Return the commit of the checkout, with `-dirty` if files differ from it, or None outside a checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=files.ROOT, capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None


def seal(checkpoint: Path, identity: dict[str, str]) -> None:
    """Mark a checkpoint as complete by writing the size of every file and the run's identity. Call it last."""
    sizes = {
        str(file.relative_to(checkpoint)): file.stat().st_size
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file()
    }
    files.write_json(checkpoint / SEAL, {"identity": identity, "files": sizes})


def last_checkpoint(run: RunFolder, identity: dict[str, str]) -> Path | None:
    """Return the newest complete checkpoint, or None. Incomplete newer ones are removed, and a line says so.

    Raises `UserError` if a checkpoint belongs to another run.
    """
    checkpoints = sorted((run / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for checkpoint in reversed(checkpoints):
        if _is_complete(checkpoint, identity):
            return checkpoint
        print(f"{checkpoint} is incomplete (the run was interrupted while writing it) and is removed.")
        shutil.rmtree(checkpoint)
    return None


def _is_complete(checkpoint: Path, identity: dict[str, str]) -> bool:
    try:
        sealed = json.loads((checkpoint / SEAL).read_text("utf-8"))
        sizes_match = all((checkpoint / name).stat().st_size == size for name, size in sealed["files"].items())
    except (OSError, ValueError, KeyError):
        return False
    if sealed["identity"] != identity:
        raise UserError(
            f"checkpoint: {checkpoint} belongs to another config. Fix: delete it, or choose another run name."
        )
    return sizes_match
