"""The first step of every notebook: read its parameters, check them, and find its work folder."""

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
KINDS = {bool: bool, int: int, float: float, str: str, "Optional[str]": str}  # annotations in a parameters cell
MARK = "# Parameters"  # first line of a notebook's parameters cell, and of the cell that papermill injects


@dataclass(frozen=True)
class Setup:
    """A notebook's config, the folder of its runs, and the requested run name, if any."""

    config: Config
    folder: Path
    run_name: str | None


def resolve(namespace: Mapping[str, Any], experiment: int | None = None, apart: Collection[str] = ()) -> Setup:
    """Turn a notebook's parameters into a `Config`. Call it as `resolve(globals())`.

    Any setting of `Config` may be injected, whether or not the notebook lists it. An unknown name raises `UserError`
    with the closest known one; papermill itself only warns. In a notebook about several experiments, `preset_1` is the
    `preset` of experiment 1, and so on. Names in `apart` are parameters of the notebook that are not settings: their
    type is checked, and the notebook reads them itself.
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
    """Return rows of texts as a table: left-aligned, with line breaks kept and HTML escaped."""
    import pandas as pd

    table = pd.DataFrame(rows, columns=columns).fillna("–")
    left = {"text-align": "left", "vertical-align": "top", "white-space": "pre-wrap"}
    heads = [{"selector": "th", "props": "text-align: left"}]
    return table.style.format(escape="html").hide().set_properties(None, **left).set_table_styles(heads)


def _parameters(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the names that the parameters cell annotates and of those that papermill's cell assigns.

    The former are in `__annotations__`, which Python maintains, the latter in IPython's input history.
    """
    names = set(namespace.get("__annotations__", {}))
    for source in namespace.get("In", []):
        if source.lstrip().startswith(MARK):
            nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
            names |= {node.id for node in nodes if isinstance(node.ctx, ast.Store)}
    if not names:
        raise UserError("parameters: none found. Fix: run the cell that begins with '# Parameters' first.")
    return {name: namespace[name] for name in names}


def in_notebook() -> bool:
    """Return whether this runs in a Jupyter kernel."""
    return _kernel() is not None


def is_interactive() -> bool:
    """Return whether a person's front end runs this cell.

    Each execution request of such a front end allows asking for input; those of papermill, nbval and nbconvert do not.
    """
    kernel = _kernel()
    return kernel is not None and bool(kernel.get_parent().get("content", {}).get("allow_stdin"))


def _kernel() -> Any:
    """Return the Jupyter kernel that runs this, or None outside one. A kernel has always imported IPython."""
    ipython = sys.modules.get("IPython")
    return getattr(ipython.get_ipython(), "kernel", None) if ipython else None
