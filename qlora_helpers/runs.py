"""Where a run goes: its folder, its lock, its manifest, its checkpoints; and finding what an earlier notebook made."""

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
MERGED, GGUF = "merged", "gguf"  # folders of an export
DRIVE = Path("/content/drive/MyDrive")  # Google Drive, where Colab mounts it


def workdir(given: str | None = None) -> Path:
    """The folder that holds all runs: the given one, else `QLORA_WORKDIR`, else Google Drive if it is mounted, else
    `runs/` in the checkout, else `runs/` here. It is made if it is missing; one that cannot be written is an error.
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
    """One run on disk. `metrics.json` is written last, so a folder that has it is complete."""

    path: Path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def name(self) -> str:
        """The folder's own name, such as exp1."""
        return self.path.name

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self / "metrics.json").exists()

    @property
    def adapter(self) -> Path:
        """Where the adapter, its tokenizer and its model card are."""
        return self / "adapter"

    def read(self, name: str) -> Any:
        """Parse one of the run's JSON files; a damaged one is an error that names it."""
        try:
            content = json.loads((self / name).read_text("utf-8"))
            if not isinstance(content, dict):
                raise ValueError("no JSON object")
            return content
        except FileNotFoundError:
            raise UserError(f"run folder: {self.path} has no {name}. Fix: run its notebook to the end.") from None
        except (ValueError, OSError) as error:
            raise UserError(
                f"run folder: {self / name} cannot be read ({error}). Fix: delete the folder and run again."
            ) from None

    def config(self) -> Config:
        """What was run; a folder of another version, with other settings, is an error."""
        try:
            return Config(**self.read("config.json")["config"])
        except TypeError:
            raise UserError(f"run folder: {self.path} was written by another version. Fix: train it again.") from None

    def identity(self) -> dict[str, str] | None:
        """Fingerprints of the config and the data this folder belongs to; None for a new folder."""
        if not (self / "config.json").exists():
            return None
        found = self.read("config.json").get("identity")
        if not isinstance(found, dict):
            raise UserError(f"run folder: {self / 'config.json'} is damaged. Fix: delete the folder and run again.")
        return found

    def compute_dtype(self) -> str | None:
        """The dtype that the run computes in, from its manifest; None for a run that has not begun."""
        return self.read("manifest.json")["device"]["dtype"] if (self / "manifest.json").exists() else None

    def log(self) -> list[dict[str, Any]]:
        """Training and held-out losses, a line a step."""
        return files.read_jsonl(self / "log.jsonl")


def find(folder: Path, identity: dict[str, str]) -> RunFolder | None:
    """The run in `folder` that has this identity, complete ones first, whatever its name."""
    runs = [RunFolder(path.parent) for path in sorted(folder.glob("*/config.json"))]
    same = [run for run in runs if run.identity() == identity]
    return next((run for run in same if run.finished), same[0] if same else None)


def choose(folder: Path, name: str, identity: dict[str, str]) -> RunFolder:
    """The folder a run goes to: `name`, if it is free or holds an equal run. Where another run has it, an equal one
    under any name, or `name` with a suffix: nothing is overwritten.
    """
    named = RunFolder(folder / name)
    if named.identity() in (None, identity):
        return named
    return find(folder, identity) or RunFolder(folder / f"{name}-{files.short_hash(identity)[:8]}")


def check_free(run: RunFolder, config: Config, identity: dict[str, str] | None = None) -> None:
    """Raise `UserError` if the folder holds another run, naming what differs; the data too, if `identity` is given."""
    found = run.identity()
    wanted = identity or {"config": config.identity}
    differ = [key for key in wanted if found and found.get(key) != wanted[key]]
    if not differ:
        return
    there, here = run.read("config.json").get("config"), config.to_dict()
    there = there if isinstance(there, dict) else {}
    what = [f"{key} {there.get(key)} there, {here[key]} here" for key in here if there.get(key) != here[key]]
    why = "; ".join(what[:3]) if "config" in differ else "its rows have changed"
    raise UserError(
        f"run folder: {run.path} holds another run ({why}). Fix: choose another output folder, or delete that one."
    )


@contextlib.contextmanager
def corrupt_files_as_user_error(folders: Iterable[RunFolder]) -> Iterator[None]:
    """Whatever a file of a run folder that lacks a key, or holds another kind of value, leads to is a `UserError`."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, OSError) as error:
        names = ", ".join(str(folder.path) for folder in folders)
        raise UserError(
            f"run folder: a file of {names}, or of their base model, is damaged ({type(error).__name__}: {error}). "
            "Fix: run its notebook again in another folder."
        ) from error


@contextlib.contextmanager
def lock(run: RunFolder) -> Iterator[None]:
    """Keep the run folder for this process; another one that wants it gets a `UserError` at once."""
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
    """What a reader needs to repeat the run: versions, device, git commit, data fingerprint and row ids."""
    from qlora_helpers.device import versions

    return {"versions": versions(), "device": device.to_dict(), "git_commit": git_commit(), "data": data} | {
        "config_fingerprint": config.identity
    }


def git_commit() -> str | None:
    """Commit of the checkout, with `-dirty` where files differ from it; None outside a checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=files.ROOT, capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None


def seal(checkpoint: Path, identity: dict[str, str]) -> None:
    """Mark a checkpoint as whole: every file's size, and whose run it is. Written last."""
    sizes = {
        str(file.relative_to(checkpoint)): file.stat().st_size
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file()
    }
    files.write_json(checkpoint / SEAL, {"identity": identity, "files": sizes})


def last_checkpoint(run: RunFolder, identity: dict[str, str]) -> Path | None:
    """The newest whole checkpoint; half-written newer ones are removed, and said so."""
    found = sorted((run / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for checkpoint in reversed(found):
        if _is_whole(checkpoint, identity):
            return checkpoint
        print(f"{checkpoint} is not whole (the run was cut off while writing it): passed over.")
        shutil.rmtree(checkpoint)
    return None


def _is_whole(checkpoint: Path, identity: dict[str, str]) -> bool:
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
