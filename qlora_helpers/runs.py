"""Run folders: where a run is stored, its lock, manifest and checkpoints, and finding runs of earlier notebooks."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from qlora_helpers import distributed, files, locks, parse
from qlora_helpers.config import Config
from qlora_helpers.errors import UserError

SEAL = "complete.json"
KEPT = 3  # checkpoints of a run: the newest ones, and the best one if it is kept
INDEX, INDEXED = ".runs.json", 20  # see `_identities`; a folder with fewer new runs needs no index
MERGED, GGUF = "merged", "gguf"  # subfolders of an export
DRIVE = Path("/content/drive/MyDrive")  # Google Drive, where Colab mounts it


def workdir(given: str | None = None) -> Path:
    """Return the folder of all runs, created if it does not exist.

    It is the first of: the given one, `QLORA_WORKDIR`, Google Drive if it is mounted, `runs/` in the checkout, `runs/`
    in the current folder. Raises `UserError` if it is not writable.
    """
    if given or os.environ.get("QLORA_WORKDIR"):
        path = parse.path(given or os.environ["QLORA_WORKDIR"], "output folder", is_input=False)
    elif DRIVE.is_dir():
        path = DRIVE / "qlora_runs"
    else:
        path = (files.ROOT if (files.ROOT / "pyproject.toml").exists() else Path.cwd()) / "runs"
    path = path.resolve()
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
        if not (self / name).exists():
            raise UserError(f"run folder: {self.path} has no {name}. Fix: run its notebook to the end.")
        return parse.json_object(self / name, "run folder", fix="Fix: delete the folder and run again.")

    def config(self) -> Config:
        """Return the config of the run. Raises `UserError` if another version of this package wrote it."""
        try:
            return Config(**self.read("config.json")["config"]).replace()
        except TypeError:
            raise UserError(
                f"run folder: {self.path} was written by another version of qlora_helpers. Fix: train it again."
            ) from None

    def identity(self) -> dict[str, str] | None:
        """Return the fingerprints of the run's config and data.

        None for a new folder, and no fingerprints for one with a `config.json` of something else, such as a model.
        """
        if not (self / "config.json").exists():
            return None
        identity = self.read("config.json").get("identity")
        return identity if isinstance(identity, dict) else {}

    def compute_dtype(self) -> str | None:
        """Return the compute dtype of the run, from its manifest, or None for a run that has not started."""
        return self.read("manifest.json")["device"]["dtype"] if (self / "manifest.json").exists() else None

    def training_path(self) -> dict[str, Any]:
        """Return how the steps of the run were computed, from its manifest; empty for a run that has not started."""
        manifest = self.read("manifest.json") if (self / "manifest.json").exists() else {}
        return dict(manifest.get("training_path", {}))

    def log(self) -> list[dict[str, Any]]:
        """Return the training and held-out losses, one line per step."""
        return files.read_jsonl(self / "log.jsonl")


def find(folder: Path, identity: dict[str, str]) -> RunFolder | None:
    """Return the run in `folder` with this identity, whatever its name, or None. Finished runs come first."""
    runs = [RunFolder(folder / name) for name, known in _identities(folder).items() if known == identity]
    same = [run for run in runs if _identity(run) == identity]
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
                identity, new = _identity(RunFolder(folder / name)), new + 1
        listed[name] = [stat.st_mtime_ns, stat.st_size, identity]
    if new >= INDEXED:
        with contextlib.suppress(OSError):
            files.write_json(folder / INDEX, listed)
    return {name: identity for name, (*_, identity) in listed.items()}


def _identity(run: RunFolder) -> dict[str, str] | None:
    """Return the identity of a run, or None for a folder whose `config.json` is not a run's."""
    try:
        return run.identity()
    except UserError:
        return None


def suffixed(run: RunFolder, identity: dict[str, str]) -> RunFolder:
    """Return the folder for a run whose name another run has taken."""
    return RunFolder(run.path.with_name(f"{run.name}-{files.short_hash(identity)[:8]}"))


def choose(folder: Path, name: str, identity: dict[str, str]) -> RunFolder:
    """Return the folder for a run: `name` if that is free or holds an equal run.

    If `name` holds a different run, return an equal run under another name, else `name` with a suffix. Nothing is ever
    overwritten.
    """
    named = RunFolder(folder / name)
    if named.identity() in (None, identity):
        return named
    return find(folder, identity) or suffixed(named, identity)


def check_free(run: RunFolder, config: Config, identity: dict[str, str] | None = None) -> None:
    """Raise `UserError` if the folder holds another run, naming the settings that differ.

    The data are compared too if `identity` is given.
    """
    existing = run.identity()
    if existing == {}:
        raise UserError(f"run folder: {run.path} holds something else than a run. Fix: choose another output folder.")
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
def lock(run: RunFolder) -> Iterator[None]:
    """Lock the run folder for this process. Raises `UserError` at once if another process holds the lock."""
    import filelock

    files.make_folder(run.path)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locks.hold(run / ".lock", timeout=0))
        except filelock.Timeout:
            raise UserError(
                f"run folder: {run.path} is in use by another process. Fix: wait for it, or stop it first."
            ) from None
        yield


def manifest(config: Config, device: Any, data: dict[str, Any]) -> dict[str, Any]:
    """Return what is needed to reproduce the run: versions, device, git commit, data fingerprint and row ids."""
    from qlora_helpers.device import versions

    return {"versions": versions(), "device": device.to_dict(), "git_commit": git_commit(), "data": data} | {
        "config_fingerprint": config.identity,
        "processes": distributed.count(),
    }


def git_commit() -> str | None:
    """Return this package's commit, with `-dirty` if a checkout differs from it, or None if it is unknown.

    An installed copy may lie inside another repository, whose commit says nothing about it. pip notes the commit of a
    copy that it installed from a repository (PEP 610).
    """
    if not (files.ROOT / ".git").exists():
        return _installed_commit()
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=files.ROOT, capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None


def _installed_commit() -> str | None:
    try:
        noted = json.loads(metadata.distribution("qlora-helpers").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return None
    return noted.get("vcs_info", {}).get("commit_id")


def seal(checkpoint: Path, identity: dict[str, str], best: str | None = None) -> None:
    """Flush a checkpoint, then mark it as complete with the hash of every file and the run's identity. Call it last.

    `best` is the name of another checkpoint without which the run cannot end as it should.
    """
    (checkpoint / SEAL).unlink(missing_ok=True)
    files.flush_all(checkpoint)
    files.write_json(checkpoint / SEAL, {"identity": identity, "best": best, "files": files.hashes(checkpoint)})
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        files.flush(folder)


def checkpoints(run: RunFolder) -> list[Path]:
    """Return the folders of a run's checkpoints in order of steps, and nothing else that lies beside them."""
    folders = [path for path in (run / "checkpoints").glob("checkpoint-*") if path.is_dir()]
    return sorted((path for path in folders if re.fullmatch(r"checkpoint-\d+", path.name)), key=step)


def step(checkpoint: Path) -> int:
    """Return the number of steps after which a checkpoint was saved."""
    return int(checkpoint.name.split("-")[1])


def remove_old(run: RunFolder, *needed: str) -> None:
    """Delete all but the newest `KEPT` checkpoints. The `needed` ones are always kept, and count."""
    others = [path for path in checkpoints(run) if path.name not in needed]
    for path in others[: max(0, len(others) - KEPT + len(set(needed)))]:
        shutil.rmtree(path, ignore_errors=True)


def last_checkpoint(run: RunFolder, identity: dict[str, str]) -> Path | None:
    """Return the newest complete checkpoint, or None. A line names newer ones that are not. Nothing is deleted.

    Raises `UserError` if a checkpoint belongs to another run or cannot be read: a run that began anew would replace it.
    """
    for checkpoint in reversed(checkpoints(run)):
        if _is_complete(checkpoint, identity):
            return checkpoint
        print(f"{checkpoint} is incomplete or damaged, so the run does not continue from it.")
    return None


def _is_complete(checkpoint: Path, identity: dict[str, str]) -> bool:
    sealed = _read_seal(checkpoint)
    if sealed is None:
        return False
    if sealed["identity"] != identity:
        raise UserError(
            f"checkpoint: {checkpoint} belongs to another config. Fix: delete it, or choose another run name."
        )
    return sealed["best"] is None or _read_seal(checkpoint.with_name(sealed["best"])) is not None


def _read_seal(checkpoint: Path) -> dict[str, Any] | None:
    """Return the seal of a checkpoint, or None if it has none or if a file is not as it was sealed."""
    try:
        sealed = json.loads((checkpoint / SEAL).read_text("utf-8"))
        intact = all(files.sha256(checkpoint / name) == digest for name, digest in sealed["files"].items())
        return sealed if intact and {"identity", "best"} <= sealed.keys() else None
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):
        return None
    except OSError as error:
        raise UserError(
            f"checkpoint: {checkpoint} cannot be read ({error.strerror}). Nothing was changed. Fix: check the disk and "
            "run again; or move that folder elsewhere to continue without it."
        ) from None


def check_adapter(adapter: Path) -> None:
    """Raise `UserError` if a file of an adapter is not the one for which its run's `metrics.json` was written."""
    run = RunFolder(adapter.parent)
    recorded = run.read("metrics.json").get("adapter_sha256") if run.finished else None
    for name, digest in recorded.items() if isinstance(recorded, dict) else ():
        path = adapter / name
        if not path.is_file() or files.sha256(path) != digest:
            raise UserError(
                f"adapter: {path} is damaged, or was changed after training. Fix: restore it; or delete "
                f"{run / 'metrics.json'} and run again, which continues from the last checkpoint."
            )
