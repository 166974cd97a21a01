"""What every notebook does first: take its parameters, check them, and find its work folder."""

import ast
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers import drive, runs
from qlora_helpers.config import Config, as_kind
from qlora_helpers.errors import UserError

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler

NUMBERED = re.compile(r"_\d$")
KINDS = {bool: bool, int: int, float: float, str: str, "Optional[str]": str}  # of annotations, as a notebook has them
MARK = "# Parameters"  # the first line of our parameters cells, and of the cell that papermill injects


@dataclass(frozen=True)
class Setup:
    """A notebook's config, the folder its runs are in, and the run name that was asked for, if any."""

    config: Config
    folder: Path
    run_name: str | None


def resolve(namespace: Mapping[str, Any], experiment: int | None = None, apart: Collection[str] = ()) -> Setup:
    """Turn a notebook's parameters into a `Config`; called as `resolve(globals())`.

    Any setting of `Config` may be injected, listed in the notebook or not. A name that is no parameter raises
    `UserError` with the nearest one: papermill itself only warns. In a notebook about several experiments,
    `preset_1` is the `preset` of experiment 1, and so on. Names in `apart` are the notebook's own, no settings: their
    type is checked, and the notebook uses them as they stand.
    """
    given = _parameters(namespace)
    for name in apart:
        kind = KINDS.get(namespace.get("__annotations__", {}).get(name))
        if (value := given.pop(name, None)) is not None and kind:
            as_kind(name, value, kind)
    if experiment is not None:
        own = {name.removesuffix(f"_{experiment}"): v for name, v in given.items() if name.endswith(f"_{experiment}")}
        given = {name: v for name, v in given.items() if not NUMBERED.search(name)} | own
    work, run_name = given.pop("workdir", None), given.pop("run_name", None)
    use_drive = given.pop("use_drive", False)
    if not isinstance(use_drive, bool):
        raise UserError(f"use_drive: expected true or false, got {use_drive!r}.")
    if use_drive:
        drive.mount()
    return Setup(Config.from_params(**given), runs.workdir(work), run_name)


def texts(rows: list[dict[str, Any]], columns: list[str] | None = None) -> "Styler":
    """Rows of texts as a table: read from the left, line breaks kept, and what looks like HTML shown, not rendered."""
    import pandas as pd

    table = pd.DataFrame(rows, columns=columns).fillna("–")
    left = {"text-align": "left", "vertical-align": "top", "white-space": "pre-wrap"}
    heads = [{"selector": "th", "props": "text-align: left"}]
    return table.style.format(escape="html").hide().set_properties(None, **left).set_table_styles(heads)


def _parameters(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the parameters: the names that our cell annotates, and those that papermill's cell assigns.

    The first are in `__annotations__`, which Python keeps; the second in IPython's history of inputs.
    """
    names = set(namespace.get("__annotations__", {}))
    for source in namespace.get("In", []):
        if source.lstrip().startswith(MARK):
            for node in ast.parse(source).body:
                targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
    if not names:
        raise UserError("parameters: none found. Fix: run the cell that begins with '# Parameters' first.")
    return {name: namespace[name] for name in names}


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this."""
    return _kernel() is not None


def is_interactive() -> bool:
    """Whether a person's front end runs this cell. It says with each request that it can be asked for input; papermill,
    nbval and nbconvert say that they cannot.
    """
    kernel = _kernel()
    return kernel is not None and bool(kernel.get_parent().get("content", {}).get("allow_stdin"))


def _kernel() -> Any:
    """The Jupyter kernel that runs this, which has then imported IPython itself; None outside one."""
    ipython = sys.modules.get("IPython")
    return getattr(ipython.get_ipython(), "kernel", None) if ipython else None
