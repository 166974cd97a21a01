"""Execute the notebooks in order with the CPU profile and store their outputs, without metadata of this machine.

usage: python tooling/store_outputs.py [NAME …]     (default: all notebooks)
"""

import itertools
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat

from qlora_helpers.experiments import series

METADATA = ("accelerator", "colab", "kernelspec", "language_info")


def clean(path: Path, target: Path) -> None:
    """Copy a notebook with its outputs and execution counts, without the metadata of papermill and the front end."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata = {key: notebook.metadata[key] for key in METADATA}
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    counts = itertools.count(1)  # papermill's injected cell had a count, too
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = {"tags": tags} if tags else {}
        if cell.cell_type == "code":
            cell.execution_count = next(counts)
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if not _of_this_run(output)]
        for output in cell.get("outputs", []):
            if "execution_count" in output:
                output.execution_count = cell.execution_count
            if "metadata" in output:  # a figure keeps its width and height, which are not those of its pixels
                output.metadata = {key: size for key, size in output.metadata.items() if key == "image/png"}
            output.pop("transient", None)
    nbformat.validate(notebook)
    nbformat.write(notebook, target)


def _of_this_run(output: nbformat.NotebookNode) -> bool:
    """Whether an output means nothing in a stored notebook: a widget without its state, or a warning with a path."""
    return output.get("name") == "stderr" or "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def main(names: list[str]) -> None:
    """Execute the notebooks in one work folder, so that 07 finds the runs of 05 and 06."""
    work = Path(tempfile.gettempdir()) / "qlora-demo"  # a fixed name, because it appears in the stored outputs
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    if not names:
        series.run_series(work, None, profile="cpu")
        for name in series.SERIES:
            clean(series.executed(work, name), series.notebooks_folder() / f"{name}.ipynb")
        names = sorted({path.stem for path in series.notebooks_folder().glob("*.ipynb")} - {*series.SERIES})
    for name in names:
        target = work / f"{name}.ipynb"
        series.execute(name, target, {"profile": "cpu", "workdir": str(work)}, name)
        clean(target, series.notebooks_folder() / f"{name}.ipynb")


if __name__ == "__main__":
    main(sys.argv[1:])
