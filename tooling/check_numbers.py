"""Find numbers in the prose of notebooks that nothing bears out.

usage: python tooling/check_numbers.py [NOTEBOOK …]     (default: all notebooks; part of make lint; exit code 1)

A number may come from the notebook's stored text outputs, from a literal in its code, or from its settings as they are
in the stored output (not as they are in the preset). It may be rounded. A time must occur there with its unit. Every
other number is a fact: a phrase with its source in tooling/numbers.yaml, under the notebook's name or under `all`. A
source that begins with a file of the repository is looked up there. Headings, code spans, links, versions, citations
and names such as T4 or *notebook 03* hold no numbers.
"""

import ast
import html
import json
import re
import sys
from collections.abc import Iterator
from math import isclose
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
FACTS = Path(__file__).with_name("numbers.yaml")

TEENS = ["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
DIGITS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
VALUES = {
    **{word: number for number, word in enumerate(DIGITS, 1)},
    **{word: number for number, word in enumerate(TEENS, 10)},
    **{word: 10 * number for number, word in enumerate(TENS, 2)},
    **{"a": 1, "dozen": 12, "hundred": 100, "thousand": 1000},
}
SCALES = {"%": -2, "thousand": 3, "million": 6, "billion": 9}
# Words below ten are counts of what the sentence lists, so only larger ones are numbers here.
WORD = re.compile(
    rf"\b(?:({'|'.join(TENS)})(?:-({'|'.join(DIGITS)}))?|({'|'.join(TEENS)})"
    rf"|(a|{'|'.join(DIGITS)})\s(dozen|hundred|thousand))\b"
)
NUMBER = re.compile(
    r"(?<![\w.#])(?<![A-Za-z]-)(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?(e[+-]?\d+)?(?![\w]|\.\d)(?:\s?(%|thousand|million|billion)\b|(%))?"
)
NO_PROSE = (
    r"```.*?```",
    r"^#+ .*$",
    r"`[^`]*`",
    r"!?\[[^\]]*\]\([^)]*\)",
    r"https?://\S+",
    r"^\s*\d+\. ",
    r"\b0\d\b",  # notebooks: 00 to 09
    r"\b[Nn]otebooks? \d\d\b(?:(?:,| and| to|–|-) ?\d\d\b)*",
    r"(?<=\d–)\d\d\b",
    r"\b(?:Python|Llama|Gemma|Qwen) \d+(?:\.\d+)?",
    r"et\s+al\.,?\s+\d{4}",
)
DURATION = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?) (?:s|min|h|seconds|minutes|hours)\b")


def numbers(text: str) -> Iterator[tuple[float, int]]:
    """Yield each number with the power of ten to which it is rounded: (0.5, -1) for 0.5, (0.09, -2) for 9%."""
    for whole, fraction, exponent, scale, percent in NUMBER.findall(text):
        power = (int(exponent[1:]) if exponent else 0) + SCALES.get(scale or percent, 0)
        value = float(f"{whole.replace(',', '')}{fraction}e{power}")
        yield value, power - max(len(fraction) - 1, 0)
    for ten, digit, teen, factor, unit in WORD.findall(text.lower()):
        value = (
            VALUES[factor] * VALUES[unit] if unit else VALUES.get(ten, 0) + VALUES.get(digit, 0) + VALUES.get(teen, 0)
        )
        yield float(value), 0


def occurs(number: tuple[float, int], known: set[float]) -> bool:
    """Whether a known value is this number, or is rounded to it. Integers below ten are not rounded."""
    value, power = number
    step = 0 if power == 0 and value < 10 else 10.0**power / 2
    return any(isclose(value, other, rel_tol=1e-9) or abs(value - other) < step for other in known)


def sentences(source: str) -> list[str]:
    """Split a markdown cell into sentences, without the parts that hold no numbers."""
    for pattern in NO_PROSE:
        source = re.sub(pattern, " ", source, flags=re.MULTILINE | re.DOTALL if "```" in pattern else re.MULTILINE)
    blocks = re.split(r"\n\s*\n|\n(?=\s*[-|*] )|\n(?=\|)", source)
    return [s for block in blocks for s in re.split(r"(?<=[.!?])\s+", " ".join(block.split())) if s]


def origins(notebook: dict[str, Any]) -> str:
    """Join a notebook's stored text outputs, with its settings, and the literals in its code."""
    known: list[str] = []
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            if isinstance(node, ast.Constant) and not isinstance(node.value, bool | bytes | None | type(...)):
                known.append(str(node.value))
        known += map(_shown, cell["outputs"])
    return "\n".join(known)


def _shown(output: dict[str, Any]) -> str:
    """The text of one output. Of the table of settings, the effective values only."""
    if output["output_type"] == "stream":
        return "".join(output["text"])
    data = {kind: "".join(text) for kind, text in output.get("data", {}).items() if kind.startswith("text/")}
    page, plain = data.get("text/html", ""), data.get("text/plain", "")
    if plain.startswith("Preset ") and "<pre>" in page:
        settings = html.unescape(page.split("<pre>")[1].split("</pre>")[0])
        return "\n".join(re.split(r"\s{2,}", line)[1] for line in settings.splitlines() if re.search(r"\S\s{2,}", line))
    page = html.unescape(re.sub(r"<style.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL))
    return "\n".join([page, *([] if plain.startswith("<") else [plain]), data.get("text/markdown", "")])


def in_file(path: Path) -> set[float]:
    """Collect the numbers in a file of the repository."""
    return {value for value, _ in numbers(path.read_text("utf-8"))}


def without_facts(sentence: str, facts: dict[str, str], used: set[str]) -> str:
    """Take the phrases that are facts out of a sentence, and add them to `used`."""
    for phrase in sorted(facts, key=len, reverse=True):
        sentence, count = re.subn(rf"(?<![\w.,]){re.escape(phrase)}(?!\w|[.,]\d)", " ", sentence)
        if count:
            used.add(phrase)
    return sentence


def check(path: Path, everywhere: dict[str, str], own: dict[str, str]) -> list[str]:
    """Return a line for each number without an origin, and for each fact that is not used or not in its source."""
    notebook = json.loads(path.read_text("utf-8"))
    text, used, found = origins(notebook), set[str](), []
    known = {value for value, _ in numbers(text)}
    for place, cell in enumerate(notebook["cells"]):
        for sentence in sentences("".join(cell["source"])) if cell["cell_type"] == "markdown" else []:
            rest = without_facts(sentence, {**everywhere, **own}, used)
            wrong = [f"{number[0]:g}" for number in numbers(rest) if not occurs(number, known)]
            wrong += [time[0] for time in DURATION.finditer(rest) if time[0] not in text and time[1] not in wrong]
            found += [f"{path.name}: cell {place}: {number} has no origin: {sentence}" for number in wrong]
    found += [f"{path.name}: the fact {phrase!r} is not in the text" for phrase in own if phrase not in used]
    for phrase, source in {**everywhere, **own}.items():
        file = ROOT / source.split(":")[0].split(",")[0].strip()
        if file.is_file() and not all(occurs(number, in_file(file)) for number in numbers(phrase)):
            found.append(f"{path.name}: {phrase!r} is not in {file.relative_to(ROOT)}")
    return found


def main(names: list[str]) -> int:
    """Print what was found in the notebooks."""
    facts = yaml.load(FACTS.read_text("utf-8"), yaml.BaseLoader)  # a phrase such as 7.5 is a text
    paths = [Path(name) for name in names] or sorted((ROOT / "notebooks").glob("*.ipynb"))
    found = [line for path in paths for line in check(path, facts["all"], facts.get(path.stem, {}))]
    print("\n".join(found) or "numbers: every one has an origin")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
