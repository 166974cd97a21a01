"""Refuse links and paths that lead out of a folder of someone else: what they point to may be private."""

import os
from collections.abc import Iterable
from pathlib import Path

from qlora_helpers.errors import UserError


def check(paths: Iterable[Path], folder: Path) -> None:
    """Raise `UserError` if one of `paths`, as its links are followed, lies outside `folder`.

    A hub's cache keeps a model's files in `blobs/` and links to them from `snapshots/REVISION/`. For such a folder, the
    model's folder in the cache is the border.
    """
    border = Path(os.path.realpath(folder))
    if border.parent.name == "snapshots":
        border = border.parents[1]
    for path in paths:
        if not Path(os.path.realpath(path)).is_relative_to(border):
            raise UserError(
                f"link: {path} leads out of {folder}. Fix: if you trust it, put the file itself in its place."
            )
