"""Find phrases that must not come back: tooling/phrases.txt has one regular expression per line.

usage: python tooling/phrases.py     (part of make lint; exit code 1 if one is found)
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PHRASES = Path(__file__).with_suffix(".txt")
PATTERNS = (
    "*.md",
    "*.toml",
    "Makefile",
    "docs/*.md",
    "notebooks/*.ipynb",
    "{folder}/**/*.py",
    "{folder}/**/*.md",
    "qlora_helpers/**/*.yaml",
)
FOLDERS = ("qlora_helpers", "tests", "tooling", "benchmarks", "results")


def files() -> list[Path]:
    """Every file whose text a person reads."""
    patterns = [pattern.format(folder=folder) for pattern in PATTERNS for folder in FOLDERS]
    return sorted({path for pattern in patterns for path in ROOT.glob(pattern)})


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines of a file with their place; of a notebook, the lines of its cells."""
    text = path.read_text("utf-8")
    if path.suffix != ".ipynb":
        yield from ((str(number), line) for number, line in enumerate(text.split("\n"), 1))
        return
    for number, cell in enumerate(json.loads(text)["cells"]):
        yield from ((f"cell {number}", line) for line in "".join(cell["source"]).split("\n"))


def main() -> int:
    """Print each place with its phrase."""
    phrase = re.compile("|".join(f"(?:{line})" for line in PHRASES.read_text("utf-8").split("\n") if line))
    hits = [
        f"{path.relative_to(ROOT)}:{place}: {found[0]}"
        for path in files()
        for place, line in lines(path)
        if (found := phrase.search(line))
    ]
    print("\n".join(hits) or "phrases: none found")
    return 1 if hits else 0


if __name__ == "__main__":
    sys.exit(main())
