"""What every notebook needs: its parameters, checked, and its work folder; uploads, downloads and tables of texts."""

import ast
import contextlib
import html
import re
import shutil
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from qlora_helpers import device, drive, files, runs
from qlora_helpers.config import Config, as_kind, load_preset
from qlora_helpers.errors import UserError

if TYPE_CHECKING:
    from IPython.display import HTML

NUMBERED = re.compile(r"_\d$")
KINDS = {bool: bool, int: int, float: float, str: str, "Optional[str]": str}  # annotations in a parameters cell
CELL = "text-align: left; vertical-align: top; padding: 3px 4px"  # of a table of texts
COMMIT = re.compile(r"([0-9a-f]{12})[0-9a-f]{28}")  # its first digits are enough to know it
LONG = re.compile(r"\S{12,}")  # a word, such as a commit, that makes a table wider than a phone
BREAK = re.compile(r"([^\W_]{9}|[/._-])(?=\S)")  # where it may be broken
MARK = "# Parameters"  # first line of a notebook's parameters cell, and of the cell that papermill injects
STUDY = "h100-smollm2-study"  # recorded runs that notebook 07 can show
ANSWERED = ("base", "100 rows", "1600 rows")  # its models whose answers are shown beside those of a short run


@dataclass(frozen=True)
class Setup:
    """A notebook's config, the folder of its runs, and the requested run name, if any.

    At the end of a cell it shows the settings that differ from the preset and, folded in HTML, all of them.
    """

    config: Config
    folder: Path
    run_name: str | None

    def __repr__(self) -> str:
        lines = [f"{name:<24}{value} instead of {was} ({by})" for name, value, was, by in self.changes]
        return "\n".join([self._title, *lines, "all settings: print(config)"])

    def _repr_html_(self) -> str:
        names = ("setting", "here", "in the preset", "set by")
        table = texts([dict(zip(names, line, strict=True)) for line in self.changes], list(names)).data
        every = f"<details><summary>all settings</summary><pre>{html.escape(str(self.config))}</pre></details>"
        return f'<div class="tex2jax_ignore"><p>{html.escape(self._title)}</p>{table}{every}</div>'

    @property
    def _title(self) -> str:
        return f"Preset {self.config.preset_name}, profile {self.config.profile}."

    @property
    def changes(self) -> list[tuple[str, str, str, str]]:
        """Name, value and preset's value of each setting that differs, and who set it: the profile or a cell."""
        config, preset = self.config, self.config.preset_name
        of_profile = Config.from_params(preset=preset, profile=config.profile).to_dict()
        published = Config(**load_preset(preset)).to_dict() | {"preset_name": preset, "profile": config.profile}
        return [
            (name, _brief(value), _brief(published[name]), "profile" if value == of_profile[name] else "cell")
            for name, value in config.to_dict().items()
            if value != published[name]
        ]


def resolve(namespace: Mapping[str, Any], experiment: int | None = None, apart: Collection[str] = ()) -> Setup:
    """Turn a notebook's parameters into a `Config`. Call it as `resolve(globals())`.

    Any setting of `Config` may be injected, whether or not the notebook lists it. An unknown name raises `UserError`
    with the closest known one; papermill itself only warns. In a notebook about several experiments, `preset_1` is the
    `preset` of experiment 1, and so on. Names in `apart` are parameters of the notebook that are not settings: their
    type is checked, and the notebook reads them itself. An empty text, as a cleared field of a form leaves it, counts
    as None. On Colab without a GPU, `UserError` says how to get one, unless a profile is named.
    """
    given = _parameters(namespace)
    for name in apart:
        kind = KINDS.get(namespace.get("__annotations__", {}).get(name))
        if (value := given.pop(name, None)) is not None and kind:
            as_kind(name, value, kind)
    given = {name: value for name, value in given.items() if value != ""}
    _check_gpu(given.get("profile"))
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


def _brief(value: Any) -> str:
    text = str(value)
    commit = COMMIT.fullmatch(text)
    return f"{commit[1]}…" if commit else text


def texts(rows: list[dict[str, Any]], columns: list[str] | None = None) -> "HTML":
    """Return rows of texts as a table: left-aligned, with line breaks kept and HTML escaped.

    The columns are the keys of the first row, unless they are given. Each cell has its style, because JupyterLab
    ignores style sheets in notebooks that others have executed.
    """
    from IPython.display import HTML

    names = columns or list(rows[0])
    head = "".join(f'<th style="{CELL}">{html.escape(name)}</th>' for name in names)
    lines = ["".join(_cell(str(row.get(name) or "–")) for name in names) for row in rows]
    return HTML(f'<table class="tex2jax_ignore">{"".join(f"<tr>{line}</tr>" for line in [head, *lines])}</table>')


def _cell(text: str) -> str:
    """A cell of a table, in which a word that is too long for a phone may be broken."""
    breakable = LONG.sub(lambda word: BREAK.sub("\\g<0>\0", word[0]), text)
    escaped = html.escape(breakable).replace("\0", "<wbr>").replace("\n", "<br>")
    return f'<td style="{CELL}">{escaped}</td>'


def _parameters(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the names in the newest parameters cell, and in the cell that papermill injected after it.

    The cells are in IPython's input history. `__annotations__`, which Python maintains, also has the names of lines
    that were deleted since, so it counts only where there is no history.
    """
    names: set[str] = set()
    injected: set[str] = set()
    for source in namespace.get("In", []):
        if not source.lstrip().startswith(MARK):
            continue
        with contextlib.suppress(SyntaxError):  # a cell that could not run
            nodes = list(ast.walk(ast.parse(source)))
            stored = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            if any(isinstance(node, ast.AnnAssign) for node in nodes):
                names, injected = stored, set()
            else:
                injected = stored
    names = (names or set(namespace.get("__annotations__", {}))) | injected
    if not names:
        raise UserError("parameters: none found. Fix: run the cell that begins with '# Parameters' first.")
    return {name: namespace[name] for name in names if name in namespace}


def _check_gpu(profile: str | None) -> None:
    """Raise `UserError` on a Colab machine without a GPU: it would train a small model that nobody asked for."""
    if profile in (None, "auto") and device.on_colab() and device.profile() == "cpu":
        raise UserError(
            "GPU: this Colab machine has none. Fix: Runtime > Change runtime type > T4 GPU > Save, then Runtime > Run "
            "all; or profile='cpu', which takes a small model."
        )


def upload(workdir: str | None = None) -> str:
    """Ask for a file with rows, store it in `uploads/` of the work folder, and return its path.

    Colab waits for the file. Elsewhere a button appears, and the cell has to run again once the file is chosen. Raises
    `UserError` as long as there is no file, and if nobody is there to choose one.
    """
    if not is_interactive():
        raise UserError("upload_rows: nobody is there to choose a file. Fix: dataset=FILE.")
    folder = runs.workdir(workdir or None) / "uploads"
    folder.mkdir(exist_ok=True)
    if device.on_colab():
        from google.colab import files as browser

        for name, content in browser.upload().items():
            _store(folder, name, content)
    else:
        _show_button(folder)
    newest = max(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns, default=None)
    if newest is None:
        raise UserError("upload_rows: no file yet. Fix: choose one with the button, then run the cell again.")
    print(f"rows: {newest}. To use other rows, choose another file and run the cell again.")
    return str(newest)


def _store(folder: Path, name: str, content: bytes) -> None:
    """Write an uploaded file. Only the last part of its name counts, so it cannot leave the folder."""
    (folder / Path(name).name).write_bytes(content)


def _show_button(folder: Path) -> None:
    import ipywidgets as widgets
    from IPython.display import display

    button = widgets.FileUpload(description="choose a file")

    def store(change: Any) -> None:
        new = change["new"].values() if isinstance(change["new"], dict) else change["new"]  # ipywidgets 7, 8
        for item in new:
            _store(folder, item.get("name") or item["metadata"]["name"], bytes(item["content"]))

    button.observe(store, names="value")
    display(button)


def download(path: Path) -> None:
    """Offer a file, or a folder as a zip file, for download: Colab's browser saves it. Print its path and size."""
    if path.is_dir():
        path = Path(shutil.make_archive(str(path.parent / f"{path.parent.name}-{path.name}"), "zip", path))
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
    if device.on_colab() and is_interactive():
        from google.colab import files as browser

        browser.download(str(path))


def recorded() -> Path:
    """Return the folder of the recorded study, which `comparison.read` reads. Raises `UserError` if it is missing."""
    folders = (files.ROOT / "results" / STUDY, Path(__file__).parent / "_results")
    found = next((folder for folder in folders if (folder / "comparison.json").exists()), None)
    if found is None:
        raise UserError(f"recorded runs: {STUDY} is not installed. Fix: use a checkout of the repository.")
    return found


def recorded_answers() -> dict[str, dict[str, str]]:
    """Return the beginnings of the recorded study's answers, by question and model: of the base and two adapters.

    Beside the answers of a laptop's short run, they show what more rows do. Raises `UserError` if the study is missing.
    """
    entries = runs.RunFolder(recorded()).read("comparison.json")["answers"]
    return {
        entry["prompt"]: {f"recorded: {name}": shorten(entry[name], 300, placeholder=" …") for name in ANSWERED}
        for entry in entries
    }


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
