"""Did the model learn the task? Answers are scored against their references, by a rule that suits the task."""

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import regex

from qlora_helpers.data.turns import split_thought
from qlora_helpers.evaluation import intervals, paired, run_code
from qlora_helpers.evaluation.intervals import Interval
from qlora_helpers.evaluation.paired import Answers, MetricDifference

REGEX_SECONDS = 1.0  # per text
UNUSABLE = "unusable reference"  # nothing can be compared with it
RIGHT, WRONG = "right", "wrong"
INVALID, VALID, SAME_KEYS, EQUAL = "invalid", "valid", "same keys", "equal"  # JSON, from worst to best

Outcome = str
Rule = Callable[[str, str], Outcome]  # answer, reference
_FENCE = regex.compile(r"```[\w+-]*[ \t]*\n(.*?)(?:\n?```|\Z)", regex.DOTALL)
_OPTION = regex.compile(r"\s*[(\[]?([A-Za-z])(?:[)\].:\s]*$|[)\].:])")  # "B", "(b)", "B) Paris"


def add(answers: Sequence[dict[str, Any]], score: str) -> list[dict[str, Any]]:
    """Score the answers that have a reference by the rule `score`, a value of the setting of this name.

    Adds to each: `score`, 1 or 0, or None if its reference cannot be compared with; and `outcome`, which says more.
    A thought does not count.

    - exact: equal, apart from upper and lower case and blanks around.
    - choice: the first option that the answer names is that of the reference. See `_choice`.
    - json: parses as JSON, and equals the reference. A code block around it is taken off.
    - regex:PATTERN: the pattern matches somewhere. With groups, they equal those in the reference.
    - python: the code, or its first code block, passes the row's `tests`, or else its reference. See `run_code`.
    """
    references = [_words((score == "python" and row.get("tests")) or row["reference"] or "") for row in answers]
    rule = _rule(score, [reference for reference in references if reference])
    scored = []
    for row, reference in zip(answers, references, strict=True):
        if reference:
            outcome = rule(row["answer"].strip(), reference)
            value = None if outcome == UNUSABLE else float(outcome in (RIGHT, EQUAL, run_code.PASSED))
            row = row | {"score": value, "outcome": outcome}
        scored.append(row)
    return scored


def metrics(answers: Answers) -> dict[str, Interval]:
    """Shares of the scored answers that are right, with Wilson's interval, and of JSON's weaker claims, if any."""
    rows = [row for row in answers if row.get("score") is not None]
    return {
        name: intervals.share(sum(row["outcome"] in outcomes for row in rows), len(rows))
        for name, outcomes in _claims(rows).items()
    }


def differences(a: Answers, b: Answers) -> list[MetricDifference]:
    """The same shares of model `b` minus those of model `a`, over the answers that both have a score for.

    With Holm's correction if there are several. Empty if no answer has a score in both. Raises `UserError` if the two
    answered different questions.
    """
    pairs = [pair for pair in paired.matched(a, b) if all(row.get("score") is not None for row in pair)]
    groups = [left.get("group", "") for left, _ in pairs]
    made = []
    for name, outcomes in _claims([row for pair in pairs for row in pair]).items():
        one, other = ([pair[side]["outcome"] in outcomes for pair in pairs] for side in (0, 1))
        made.append(paired.share(name, one, other, groups))
    return paired.holm(made)


def _claims(rows: Answers) -> dict[str, set[Outcome]]:
    """What is claimed of a share of the answers: outcomes that count, by name."""
    if not rows:
        return {}
    claims = {"score": {RIGHT, EQUAL, run_code.PASSED}}
    if any(row["outcome"] in (INVALID, VALID, SAME_KEYS, EQUAL) for row in rows):
        claims |= {"same keys": {SAME_KEYS, EQUAL}, "valid JSON": {VALID, SAME_KEYS, EQUAL}}
    return claims


def _rule(score: str, references: list[str]) -> Rule:
    kind, _, pattern = score.partition(":")
    if kind == "choice":
        return _choice(references)
    if kind == "regex":
        return _regex(pattern)
    return {"exact": _exact, "json": _json, "python": _python}[kind]


def _words(reference: str) -> str:
    return split_thought(reference.strip())[1]


def _exact(answer: str, reference: str) -> Outcome:
    return RIGHT if answer.strip().casefold() == reference.strip().casefold() else WRONG


def _choice(references: list[str]) -> Rule:
    """Rule for options, which are those of all references.

    If every reference begins with a single letter, as in `B`, `(B)` or `B) Paris`, the letters are the options. One in
    brackets, with a mark after it or after "answer" is preferred to the first letter that stands alone, which may be an
    article. Otherwise every reference as a whole is an option, such as `positive`, and the first one in the answer
    counts, the longest if several begin there.
    """
    letters = [match[1] for reference in references if (match := _OPTION.match(reference))]
    if letters and len(letters) == len(references):
        find = _letter_finder(frozenset(letters))
    else:
        find = _label_finder(frozenset(map(_label, references)) - {""})

    def rule(answer: str, reference: str) -> Outcome:
        wanted = find(reference)
        if wanted is None:
            return UNUSABLE
        return RIGHT if find(answer) == wanted else WRONG

    return rule


def _letter_finder(letters: frozenset[str]) -> Callable[[str], str | None]:
    known, one = {letter.upper() for letter in letters}, f"[{''.join(sorted(letters))}]"
    named = rf"(?i:\b(?:answer|option|choice)(?:\s+is)?)[\s:*(\[]*({one})(?!\w)"
    marked = rf"[(\[]({one})[)\]]|{named}|(?<!\w)({one})[).:\]]"
    patterns = [regex.compile(pattern) for pattern in (marked, rf"(?<![\w'’])({one})(?![\w'’])")]

    def find(text: str) -> str | None:
        if (match := _OPTION.match(text)) and match[1].upper() in known:
            return match[1].upper()
        found = next((match for pattern in patterns if (match := pattern.search(text))), None)
        return next(filter(None, found.groups())).upper() if found else None

    return find


def _label_finder(labels: frozenset[str]) -> Callable[[str], str | None]:
    longest_first = sorted(labels, key=lambda label: (-len(label), label))
    pattern = regex.compile(rf"(?<![\w-])(?:{'|'.join(map(regex.escape, longest_first))})(?![\w-])")

    def find(text: str) -> str | None:
        label = _label(text)
        if label in labels or not labels:
            return label or None
        found = pattern.search(label)
        return found[0] if found else None

    return find


def _label(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,:;!\"'`*")


def _json(answer: str, reference: str) -> Outcome:
    try:
        wanted = _parse(reference)
    except (ValueError, RecursionError):
        return UNUSABLE
    try:
        given = _parse(answer)
        if json.dumps(given, sort_keys=True) == json.dumps(wanted, sort_keys=True):
            return EQUAL
        return SAME_KEYS if _keys(given) == _keys(wanted) else VALID
    except (ValueError, RecursionError):  # not JSON, or nested too deeply
        return INVALID


def _parse(text: str) -> Any:
    """Value of a JSON text. 1.0 equals 1, but not true. Raises `ValueError` for NaN too, which is no JSON."""

    def number(digits: str) -> float | int:
        return int(value) if (value := float(digits)).is_integer() else value

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    return json.loads(_unfenced(text), parse_float=number, parse_constant=refuse)


def _keys(value: Any) -> Any:
    """The keys of nested objects, without what they hold; of a list, those of its items."""
    if isinstance(value, dict):
        return {key: _keys(item) for key, item in value.items()}
    return [_keys(item) for item in value] if isinstance(value, list) else None


def _regex(pattern: str) -> Rule:
    compiled = regex.compile(pattern)

    def groups(text: str) -> list[str] | None:
        match = compiled.search(text, timeout=REGEX_SECONDS)
        return [(group or "").strip() for group in match.groups()] if match else None

    def rule(answer: str, reference: str) -> Outcome:
        try:
            wanted = groups(reference) if compiled.groups else []
        except TimeoutError:
            wanted = None
        if wanted is None:
            return UNUSABLE
        try:
            return RIGHT if groups(answer) == wanted else WRONG
        except TimeoutError:
            return run_code.TIMED_OUT

    return rule


def _python(answer: str, reference: str) -> Outcome:
    tests = _unfenced(reference)
    return run_code.run(_unfenced(answer), tests) if _tests_something(tests) else UNUSABLE


@lru_cache(maxsize=4096)
def _tests_something(tests: str) -> bool:
    """Whether the tests fail without an answer. A solution instead of tests would pass with any answer before it."""
    return run_code.run("", tests) == run_code.FAILED


def _unfenced(text: str) -> str:
    """What is in the first code block of a text, or the text if it has none."""
    fence = _FENCE.search(text)
    return fence[1] if fence else text
