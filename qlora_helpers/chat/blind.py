"""Judge two models' answers without knowing which is which, and test which one is preferred."""

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

from qlora_helpers import files, parse
from qlora_helpers.chat.panel import STYLE
from qlora_helpers.chat.side_by_side import Entry, bundle
from qlora_helpers.errors import UserError
from qlora_helpers.evaluation import intervals
from qlora_helpers.evaluation.intervals import CONFIDENCE, POWER, Interval
from qlora_helpers.notebook import is_interactive
from qlora_helpers.runs import RunFolder
from qlora_helpers.wording import counted

VOTES = "votes.jsonl"
FIRST, SECOND, TIE, SKIP = CHOICES = ("first", "second", "tie", "skip")


@dataclass(frozen=True)
class Vote:
    """One judgment: the pair that was shown, which model's answer came first and which second, and the choice."""

    pair: str
    first: str
    second: str
    vote: str

    @property
    def winner(self) -> str | None:
        """The preferred model, or None for a tie or a skipped pair."""
        return {FIRST: self.first, SECOND: self.second}.get(self.vote)


@dataclass(frozen=True)
class Result:
    """Votes between two models: how often `b` was preferred to `a` (wins), `a` to `b` (losses), neither, or skipped."""

    a: str
    b: str
    wins: int
    losses: int
    ties: int
    skipped: int

    @property
    def decided(self) -> int:
        """Pairs with a winner."""
        return self.wins + self.losses

    @property
    def share(self) -> Interval:
        """Share of the decided pairs in which `b` was preferred, with Wilson's interval."""
        return intervals.share(self.wins, self.decided) if self.decided else Interval(math.nan, 0.0, 1.0)

    @property
    def p_value(self) -> float:
        """Two-sided sign test of "either is preferred equally often"; ties do not count.

        Dixon and Mood, "The statistical sign test", 1946.
        """
        from scipy.stats import binomtest

        return float(binomtest(self.wins, self.decided).pvalue) if self.decided else 1.0

    @property
    def more(self) -> int | None:
        """Further pairs for an 80% chance that the sign test decides, if the observed shares are the true ones.

        0 if it has decided, None at a share of one half or without a decided pair. Normal approximation for the decided
        pairs (Noether, "Sample size determination for some common nonparametric tests", 1987, sign test); ties are
        expected at their rate so far.
        """
        from scipy.stats import norm

        if self.decided and self.p_value < 1 - CONFIDENCE:
            return 0
        if self.wins == self.losses:
            return None
        quantiles = norm.ppf((1 + CONFIDENCE) / 2) + norm.ppf(POWER)
        wanted = max((quantiles / (2 * self.share.value - 1)) ** 2, self.decided + 1)
        return math.ceil((wanted - self.decided) * (self.decided + self.ties) / self.decided)

    def __str__(self) -> str:
        votes = map(counted, (self.wins, self.losses, self.ties), ("win", "loss", "tie"))
        counts = f"{', '.join(votes)}, {self.skipped} skipped"
        if not self.decided:
            return f"{self.b} against {self.a}: {counts}. No pair is decided yet."
        sure = "" if self.p_value < 1 - CONFIDENCE else "not distinguishably "
        which = self.b if self.wins >= self.losses else self.a
        verdict = "neither is preferred" if self.wins == self.losses else f"{which} is {sure}preferred"
        lines = [
            f"{self.b} against {self.a}: {counts}",
            f"{self.b} was preferred in {self.share.value:.0%} of {counted(self.decided, 'decided pair')} (95% "
            f"interval {self.share.low:.0%} to {self.share.high:.0%}; sign test p = {self.p_value:.3f}): {verdict}",
        ]
        if self.more:
            lines.append(
                f"about {counted(self.more, 'more pair')} would decide it with 80% power, if this share is true"
            )
        return "\n".join(lines)


def read(path: Path) -> list[Vote]:
    """Votes of a file, the first one of each pair; none if the file does not exist.

    Raises `UserError` if a line is not a vote.
    """
    votes: dict[str, Vote] = {}
    content = parse.text(path, "votes", fix="Fix: name a file written by this panel.") if path.exists() else ""
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                vote = Vote(**json.loads(line))
                valid = all(isinstance(text, str) for text in vars(vote).values())
                if not valid or vote.vote not in CHOICES or vote.first == vote.second:
                    raise ValueError
            except (TypeError, ValueError, RecursionError):
                raise UserError(f"votes: line {number} of {path} is not a vote. Fix: delete that line.") from None
            votes.setdefault(vote.pair, vote)
    return list(votes.values())


def results(run: RunFolder) -> list[Result]:
    """Results of the votes in a run folder, one for each two models that were compared, with their names in order.

    Raises `UserError` for a damaged file.
    """
    votes = read(run / VOTES)
    names = dict.fromkeys(tuple(sorted((vote.first, vote.second))) for vote in votes)
    return [count(votes, a, b) for a, b in names]


def count(votes: Sequence[Vote], a: str, b: str) -> Result:
    """Count the votes between two models."""
    own = [vote for vote in votes if {vote.first, vote.second} == {a, b}]
    winners = [vote.winner for vote in own]
    kinds = [vote.vote for vote in own]
    return Result(a, b, winners.count(b), winners.count(a), kinds.count(TIE), kinds.count(SKIP))


class Ballot:
    """Pairs of answers in random order, shown without names, and the votes on them.

    A pair is a question with the answers of models `a` and `b`; equal answers are left out. Each vote is written to
    `votes.jsonl` in the run folder at once, so that judging can stop and go on at any pair. The seed decides the order
    of the pairs and of the answers in each. Raises `UserError` if one of the models did not answer.
    """

    def __init__(self, entries: Sequence[Entry], a: str, b: str, run: RunFolder, seed: int = 0) -> None:
        self.a, self.b, self.run, self.seed = a, b, run, seed
        self.lock = RLock()  # JupyterLab 4 handles each click in its own thread
        both = [entry for entry in entries if a in entry and b in entry]
        if not both or a == b:
            raise UserError(
                f"blind test: there are no answers of two models {a} and {b}. Fix: name two of the models in the "
                "comparison."
            )
        pairs = {_key(entry, a, b): entry for entry in both if entry[a] != entry[b]}
        self.pairs = {key: pairs[key] for key in sorted(pairs, key=lambda key: files.short_hash([seed, key]))}

    @property
    def votes(self) -> list[Vote]:
        """Votes in the file, also those of other models."""
        return read(self.run / VOTES)

    @property
    def left_over(self) -> list[str]:
        """Pairs that nobody voted on, in their order."""
        seen = {vote.pair for vote in self.votes}
        return [key for key in self.pairs if key not in seen]

    def order(self, pair: str) -> tuple[str, str]:
        """The models whose answers are shown first and second."""
        swap = int(files.short_hash([self.seed, "order", pair]), 16) % 2
        return (self.b, self.a) if swap else (self.a, self.b)

    def shown(self, pair: str) -> tuple[str, str, str]:
        """Question, first answer and second answer."""
        entry, (first, second) = self.pairs[pair], self.order(pair)
        return entry["prompt"], entry[first], entry[second]

    def vote(self, choice: str) -> "Ballot":
        """Vote on the next pair: "first", "second", "tie" or "skip". Returns the ballot, which shows the next pair.

        Raises `UserError` for another choice, or if no pair is left.
        """
        if choice not in CHOICES:
            raise UserError(f"blind test: unknown vote '{choice}'. Fix: use one of {', '.join(CHOICES)}.")
        with self.lock:
            pairs = self.left_over
            if not pairs:
                raise UserError("blind test: every pair has a vote. Fix: read the result.")
            added = Vote(pairs[0], *self.order(pairs[0]), choice)
            files.write_jsonl(self.run / VOTES, [vars(vote) for vote in [*self.votes, added]])
        return self

    @property
    def result(self) -> Result:
        """Result of the votes so far. Looking before the end, and then deciding whether to go on, inflates it."""
        return count(self.votes, self.a, self.b)

    @property
    def outcome(self) -> str:
        """The result in words, or that there is nothing to judge."""
        if self.pairs:
            return str(self.result)
        return f"{self.a} and {self.b} gave the same answers everywhere: there is nothing to judge."

    @property
    def progress(self) -> str:
        """Number of the next pair, in words."""
        left = len(self.left_over)
        return f"pair {len(self.pairs) - left + 1} of {len(self.pairs)}" if left else "every pair has a vote"

    def __repr__(self) -> str:
        """The next pair and how to vote on it, or the result."""
        if not (pairs := self.left_over):
            return self.outcome
        question, first, second = self.shown(pairs[0])
        how = 'To vote: ballot = blind.Ballot(…), then ballot.vote("first"), or "second", "tie", "skip".'
        return f"{self.progress}\n\n{question}\n\n[first]\n{first}\n\n[second]\n{second}\n\n{how}"


def _key(entry: Entry, a: str, b: str) -> str:
    """A pair's name, which does not depend on the order of the models."""
    return files.short_hash([entry["prompt"], *sorted([[a, entry[a]], [b, entry[b]]])])


class Panel:
    """A notebook widget: a question, two answers without names, and buttons; at the end, the result."""

    def __init__(self, ballot: Ballot) -> None:
        import ipywidgets as widgets

        self.ballot = ballot
        self.question = widgets.HTML()
        self.answers = [widgets.HTML(layout=widgets.Layout(flex="1 1 14em", min_width="0")) for _ in (FIRST, SECOND)]
        self.buttons = {choice: widgets.Button(description=choice) for choice in CHOICES}
        self.status = widgets.HTML()
        wrapped = widgets.Layout(flex_flow="row wrap")
        rows = [widgets.HBox(row, layout=wrapped) for row in (self.answers, list(self.buttons.values()))]
        self.box = widgets.VBox([self.question, *rows, self.status])
        for choice, button in self.buttons.items():
            button.on_click(lambda _, choice=choice: self._vote(choice))
        self._draw()

    def _vote(self, choice: str) -> None:
        with self.ballot.lock:
            try:
                self.ballot.vote(choice)
                self._draw()
            except UserError as error:
                self._say(f"error: {error}")

    def _draw(self) -> None:
        pairs = self.ballot.left_over
        question, *answers = self.ballot.shown(pairs[0]) if pairs else ("", "", "")
        self.question.value = _page(question, STYLE["user"]) if pairs else ""
        for shown, name, text in zip(self.answers, (FIRST, SECOND), answers, strict=True):
            shown.value = f'<div style="opacity:.7">{name}</div>{_page(text, STYLE["assistant"])}' if pairs else ""
        for button in self.buttons.values():
            button.disabled = not pairs
        self._say(f"{self.ballot.progress}. Which answer is better?" if pairs else self.ballot.outcome)

    def _say(self, text: str) -> None:
        self.status.value = html.escape(text).replace("\n", "<br>")

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        stored = "A blind test of two models: it works only in a running notebook."
        return bundle(self.box, stored, f"<p>{stored}</p>")


def _page(text: str, style: str) -> str:
    """A text as HTML, escaped; `tex2jax_ignore` keeps dollar signs from becoming math."""
    inner = html.escape(text) or "(empty)"
    return f'<div class="tex2jax_ignore" style="white-space:pre-wrap;overflow-wrap:anywhere;{style}">{inner}</div>'


def judge(entries: Sequence[Entry], a: str, b: str, run: RunFolder, seed: int = 0) -> Panel | Ballot:
    """Judge the answers of models `a` and `b` blind: a panel if a person runs the notebook, else a ballot as text.

    `entries` hold each question under "prompt" and each answer under the name of its model, as in `Comparison.answers`.
    Raises `UserError` if one of the models did not answer.
    """
    ballot = Ballot(entries, a, b, run, seed)
    return Panel(ballot) if is_interactive() else ballot
