"""Print how long notebooks 00-07 take to read, and how much of their code calls the libraries, as a Markdown table.

usage: python tooling/reading_time.py

220 words a minute: adults read non-fiction at 238 on average (Brysbaert 2019, doi.org/10.1016/j.jml.2019.104047).
30 lines of code a minute is our assumption. The bootstrap cell, the same in every notebook, is not counted. Story cells
are the code cells after the parameters. A library line is one on which a name from `LIBRARIES` is called.
"""

import ast
import re
from pathlib import Path

import nbformat

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
WORDS, LINES = 220, 30  # read in a minute
LIBRARIES = {"transformers", "peft", "trl", "bitsandbytes", "datasets"}
COLUMNS = ("notebook", "words", "lines of code", "minutes", "story cells", "library lines")
TARGET = re.compile(r"\]\([^)]*\)")  # of a link
WORD = re.compile(r"\w[\w'’.,:/-]*")


def library_lines(sources: list[str]) -> int:
    """Count the lines of all calls of names imported from `LIBRARIES`, with the lines of their arguments."""
    trees = [ast.parse(source) for source in sources]
    imports = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if (node.module or "").split(".")[0] in LIBRARIES]
    names = {alias.asname or alias.name for node in ours for alias in node.names}
    lines = set()
    for number, tree in enumerate(trees):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[0] in names:
                lines |= {(number, line) for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    return len(lines)


def count(path: Path) -> tuple[int, int, float, int, int]:
    """Return the counts of `COLUMNS` for one notebook."""
    cells = nbformat.read(path, as_version=4).cells
    words = sum(len(WORD.findall(TARGET.sub("", cell.source))) for cell in cells if cell.cell_type == "markdown")
    parameters, *story = [cell.source for cell in cells[3:] if cell.cell_type == "code"]
    lines = sum(bool(line.strip()) for source in (parameters, *story) for line in source.splitlines())
    return words, lines, words / WORDS + lines / LINES, len(story), library_lines(story)


def main() -> None:
    counts = {path.stem[:2]: count(path) for path in sorted(NOTEBOOKS.glob("0[0-7]_*.ipynb"))}
    counts["all"] = tuple(map(sum, zip(*counts.values(), strict=True)))
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name, (words, lines, minutes, story, library) in counts.items():
        print(f"| {name} | {words:,} | {lines} | {minutes:.0f} | {story} | {library} |")


if __name__ == "__main__":
    main()
