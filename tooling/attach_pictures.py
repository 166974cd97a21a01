"""Put the pictures of widgets from docs/ into the notebooks that show them.

usage: python tooling/attach_pictures.py     (a part of make pictures)

They are attachments of a cell, because a notebook that is opened alone does not find the files of the repository.
"""

import base64
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
SHOWN = {"05_train_exp1": "live_plot.png", "07_compare": "picker.png", "11_ship": "chat.png"}


def main() -> None:
    """Renew the attachment of the cell that names each picture."""
    for name, picture in SHOWN.items():
        path = ROOT / "notebooks" / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        (cell,) = (cell for cell in notebook.cells if f"(attachment:{picture})" in cell.source)
        content = base64.b64encode((ROOT / "docs" / picture).read_bytes()).decode("ascii")
        cell.attachments = {picture: {"image/png": content}}
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
