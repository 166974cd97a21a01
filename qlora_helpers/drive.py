"""Runs on Google Drive, which can disconnect or fill up: they are written to the local disk and then copied."""

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from qlora_helpers import files, runs
from qlora_helpers.device import on_colab
from qlora_helpers.errors import UserError
from qlora_helpers.runs import RunFolder

HERE = Path("/content/qlora_runs")  # Colab's own disk
LAST = "metrics.json"  # marks a run as finished, so it is copied after everything else


def mount() -> None:
    """Mount Google Drive, unless it is mounted already or this is not Colab. Raises `UserError` if that fails."""
    if not on_colab():
        print("use_drive: this is not Colab, so there is no Drive to mount; runs stay in the work folder.")
        return
    if runs.DRIVE.is_dir():
        return
    try:
        from google.colab import drive

        drive.mount(str(runs.DRIVE.parent))
    except Exception as error:  # Colab raises different exceptions for the page, the user and a timeout
        raise UserError(
            f"use_drive: Google Drive could not be mounted ({error}). Fix: run the cell again and allow it, or "
            "use_drive=False."
        ) from None


def mirror(run: RunFolder) -> "Mirror | None":
    """Return the mirror that syncs a run on Drive with its local copy, or None for a run that is not on Drive."""
    if not run.path.is_relative_to(runs.DRIVE):
        return None
    return Mirror(run, RunFolder(HERE / run.path.relative_to(runs.DRIVE)))


@dataclass(frozen=True)
class Mirror:
    """A run on Drive (`there`) and the local folder it is written to (`here`).

    Locks work on one machine only, so two machines must not train the same run on one Drive.
    """

    there: RunFolder
    here: RunFolder

    def pull(self, identity: dict[str, str]) -> None:
        """Copy the files of this run, and the losses of base models, that are on Drive and missing here.

        Another run in the local folder may be nowhere else, so it is renamed; under its new name it can be continued.
        Raises `UserError` if Drive cannot be read.
        """
        other = self.here.identity()
        if other not in (None, identity):
            kept = runs.suffixed(self.here, other or {})
            if kept.path.exists():
                raise UserError(f"run folder: {self.here.path} and {kept.path} hold another run. Fix: move one away.")
            with runs.lock(self.here):
                self.here.path.rename(kept.path)
            print(f"{self.here.path} held another run, which is not on Google Drive. It is kept as {kept.path}.")
        try:
            for folder in [self.there.path, *self.there.path.parent.glob("base-*")]:
                _copy_missing(folder, self.here.path.parent / folder.name)
        except OSError as error:
            raise UserError(
                f"Google Drive: {self.there.path} cannot be read ({error.strerror}). Fix: mount Drive again."
            ) from None

    def push(self) -> bool:
        """Copy new and changed files to Drive, `metrics.json` last, and return whether that worked.

        If Drive is disconnected or full, one line says so. All files that were saved remain, here and there, and the
        next push tries again.
        """
        try:
            for base in self.here.path.parent.glob("base-*"):
                if (base / "heldout_losses.jsonl").exists():  # written last
                    _copy_missing(base, self.there.path.parent / base.name)
            _copy_changed(self.here.path, self.there.path)
        except OSError as error:
            print(
                f"Google Drive: {self.there.path} could not be updated ({error.strerror}). All files are kept in "
                f"{self.here.path}, and training continues. Fix: free up space on Drive, or mount it again."
            )
            return False
        return True

    def finish(self) -> RunFolder:
        """Return the finished run: on Drive, or here if it could not be copied there."""
        return self.there if self.push() else self.here


def _visible(folder: Path) -> list[Path]:
    """Return the entries of a folder without hidden ones, which are locks and interrupted copies."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    return [entry for entry in entries if not entry.name.startswith(".")]


def _copy_missing(source: Path, target: Path) -> None:
    for entry in _visible(source):
        if entry.is_dir() and entry.name == "checkpoints":
            _copy_missing(entry, target / entry.name)
        elif not (target / entry.name).exists():
            _copy(entry, target / entry.name)


def _copy_changed(source: Path, target: Path) -> None:
    """Copy files that differ in size or time, `metrics.json` last."""
    for entry in sorted(_visible(source), key=lambda entry: entry.name == LAST):
        there = target / entry.name
        if entry.name == "checkpoints":
            _copy_checkpoints(RunFolder(source), RunFolder(target))
        elif entry.is_dir():
            _copy_changed(entry, there)
        elif not there.exists() or _stamp(there) != _stamp(entry):
            _copy(entry, there)


def _copy_checkpoints(here: RunFolder, there: RunFolder) -> None:
    """Copy the complete checkpoints that are missing or different there, then remove those that are older.

    Whatever else lies beside them is left alone.
    """
    complete = [path for path in runs.checkpoints(here) if (path / runs.SEAL).exists()]
    for checkpoint in complete:
        copied = there / "checkpoints" / checkpoint.name
        if _seal(copied) != _seal(checkpoint):
            _copy(checkpoint, copied)
    kept = [path.name for path in complete]
    for old in runs.checkpoints(there):
        if complete and old.name not in kept and runs.step(old) < runs.step(complete[-1]):
            shutil.rmtree(old)


def _seal(checkpoint: Path) -> bytes:
    return (checkpoint / runs.SEAL).read_bytes() if (checkpoint / runs.SEAL).exists() else b""


def _stamp(file: Path) -> tuple[int, int]:
    """Return size and modification time in seconds, the attributes that Drive preserves."""
    status = file.stat()
    return status.st_size, int(status.st_mtime)


def _copy(source: Path, target: Path) -> None:
    """Copy a file or folder under a hidden name, flush it, then rename it, so that a visible copy is complete."""
    files.make_folder(target.parent)
    part = target.with_name(f".{target.name}-part")
    _remove(part)
    try:
        if source.is_dir():
            shutil.copytree(source, part, copy_function=shutil.copy2)
            files.flush_all(part)
            _remove(target)
        else:
            shutil.copy2(source, part)
            files.flush(part)
        os.replace(part, target)
        files.flush(target.parent)
    except OSError as error:
        _remove(part)
        if isinstance(error, shutil.Error):  # copytree collects all errors; the first names the cause
            raise OSError(None, str(error.args[0][0][2])) from None
        raise


def _remove(part: Path) -> None:
    """Remove an interrupted copy. On a disconnected Drive this fails silently."""
    if part.is_dir():
        shutil.rmtree(part, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            part.unlink()
