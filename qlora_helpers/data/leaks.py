"""Find leaks: rows whose question, answer or later round is also held out.

A leak is found by one of three comparisons with the held-out rows:

- the question: the first one of a conversation that is no greeting, with its input;
- an answer, whatever the question: a model that was trained on it knows it already;
- a round with a short answer, such as a label: the question and the answer.

Set phrases are left out: greetings, labels and standard replies that many rows share.
"""

import heapq
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from qlora_helpers.data.near_duplicates import Index, same_question, same_text
from qlora_helpers.data.normal_form import PART, normalize
from qlora_helpers.data.schema import Message, Row
from qlora_helpers.data.workers import shared

NEAR_PROMPT = "prompt nearly the same as a held-out one"
NEAR_ANSWER = "answer nearly the same as a held-out one"
NEAR_ROUND = "question and answer nearly the same as held-out ones"
FIELDS = ("content", "input", "tool_calls", "tools", "learn")
SAMPLE = 10_000  # rows in which set phrases are counted
QUESTIONS = 2_000  # rows in which the words of questions are counted
ENOUGH = 100  # questions, below which no word counts as common
COMMON = 0.1  # share of the questions that contain a common word, such as "how", "the" or "can"
SET_PHRASE = 0.01  # share of the rows that contain a set phrase,
TWICE_ASKED = 4  # and the number of rows that an answer or a greeting may have before it counts as one
GREETING = 15  # bytes: a shorter question opens a conversation without asking anything ("Hi", "Thank you!")
LABEL = 20  # bytes: a shorter answer ("positive", "in 1969") belongs to many questions


@dataclass(frozen=True, slots=True)
class Leak:
    """The held-out row that another row resembles, their similarity from 0 to 1, and in what they agree."""

    heldout: Row
    similarity: float
    reason: str


def parts(row: Row) -> str:
    """Return all that a row teaches, for comparing whole rows: the fields of each turn, joined by `PART`."""
    fields = [turn[name] for turn in row.messages for name in FIELDS if name in turn]
    return PART.join(f if isinstance(f, str) else json.dumps(f, ensure_ascii=False, sort_keys=True) for f in fields)


class HeldOut:
    """The held-out rows, searched by their questions, answers and rounds.

    `rows` is the data set. Its set phrases and common words are counted in a sample that does not depend on the order
    of the rows.
    """

    def __init__(self, rows: Iterable[Row], threshold: float) -> None:
        sample = list({row.id: row for row in heapq.nsmallest(SAMPLE, rows, key=lambda row: row.id)}.values())
        self._phrases = _set_phrases(sample)
        worded = partial(same_question, common=self._common_words(sample[:QUESTIONS]))
        tests: dict[str, Callable[[str, str], bool]] = {
            NEAR_PROMPT: worded,
            NEAR_ANSWER: same_question,
            NEAR_ROUND: same_text,
        }
        self._indexes = {reason: Index(threshold, test) for reason, test in tests.items()}
        self._owners: dict[str, list[Row]] = {reason: [] for reason in tests}

    def add(self, row: Row) -> None:
        """Hold out a row."""
        for reason, text in self._texts(row):
            if self._indexes[reason].first_similar(text) is None:
                self._owners[reason].append(row)

    def leak(self, row: Row) -> Leak | None:
        """Return in what the row agrees with a held-out one, or None if it is unlike all of them."""
        for reason, text in self._texts(row):
            match = self._indexes[reason].first_similar(text, add=False)
            if match is not None:
                return Leak(self._owners[reason][match[0]], match[1], reason)
        return None

    def leaks(self, rows: Sequence[Row]) -> dict[str, Leak]:
        """Return the leaks among rows by the rows' ids. Several processes search many rows."""
        found = shared(partial(_each_leak, self), rows)
        return {row.id: leak for row, leak in zip(rows, found, strict=True) if leak}

    def _texts(self, row: Row) -> Iterator[tuple[str, str]]:
        """Yield the texts of a row that must not be held out and trained on, with the reason each would be a leak."""
        yield NEAR_PROMPT, self._opening(row)
        for question, answer in row.rounds:
            content = answer["content"]
            if content in self._phrases or not answer.get("learn", True):
                continue
            if len(content.encode()) >= LABEL:
                yield NEAR_ANSWER, content
            elif len(question["content"].encode()) >= GREETING:
                yield NEAR_ROUND, f"{_asked(question)}{PART}{content}"

    def _opening(self, row: Row) -> str:
        """Return the first question that is no greeting, or the first of all."""
        questions = [question for question, _ in row.rounds] or [row.messages[0]]
        return _asked(next(filter(self._is_specific, questions), questions[0]) if len(questions) > 1 else questions[0])

    def _is_specific(self, question: Message) -> bool:
        return len(question["content"].encode()) >= GREETING and question["content"] not in self._phrases

    def _common_words(self, sample: list[Row]) -> frozenset[str]:
        if len(sample) < ENOUGH:
            return frozenset()
        counts = Counter(word for row in sample for word in set(normalize(self._opening(row)).split()))
        return frozenset(word for word, count in counts.items() if count >= COMMON * len(sample))


def _each_leak(held: HeldOut, rows: Sequence[Row]) -> list[Leak | None]:
    return [held.leak(row) for row in rows]


def _asked(question: Message) -> str:
    return f"{question['content']}\n{question.get('input', '')}"


def _set_phrases(sample: list[Row]) -> frozenset[str]:
    """Return the answers, and the first questions of conversations, that many rows of the sample share."""
    counts: Counter[str] = Counter()
    for row in sample:
        counts.update({answer["content"] for _, answer in row.rounds})
        if len(row.rounds) > 1:
            counts[row.rounds[0][0]["content"]] += 1
    most = max(TWICE_ASKED, SET_PHRASE * len(sample))
    return frozenset(text for text, count in counts.items() if count > most)
