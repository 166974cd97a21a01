"""Write a repository's URL into the badge and bootstrap cell of every notebook, and into the README's badge.

usage: python tooling/set_repository.py URL [FOLDER]     (make set-repo URL=https://github.com/NAME/REPOSITORY)
"""

import re
import sys
from pathlib import Path

from qlora_helpers import files

ADDRESS = re.compile(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?")
PLACES = (
    re.compile(r"(?<=colab\.research\.google\.com/github/)[\w.-]+/[\w.-]+(?=/blob/)"),
    re.compile(r"(?<=kernels/welcome\?src=https://github\.com/)[\w.-]+/[\w.-]+(?=/blob/)"),
    re.compile(r"(?<=git\+https://github\.com/)[\w.-]+/[\w.-]+(?=[\s\"'`])"),
    re.compile(r'(?<=REPOSITORY = \\"https://github\.com/)[\w.-]+/[\w.-]+(?=\\")'),
)


def set_repository(url: str, folder: Path) -> int:
    """Change the README and the notebooks in `folder`, and return the number of files."""
    match = ADDRESS.fullmatch(url)
    if match is None:
        raise SystemExit(f"error: '{url}' is not a GitHub repository. Fix: URL=https://github.com/NAME/REPOSITORY.")
    paths = [folder / "README.md", *sorted((folder / "notebooks").glob("*.ipynb"))]
    for path in paths:
        text = path.read_text("utf-8")
        for place in PLACES:
            text = place.sub(match[1], text)
        files.write_text(path, text)
    return len(paths)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    where = Path(sys.argv[2]) if len(sys.argv) == 3 else files.ROOT
    print(f"{set_repository(sys.argv[1], where)} files point to {sys.argv[1]}")
