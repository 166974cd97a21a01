"""Split a data set into held-out rows, rows to choose a checkpoint on, and training rows in the order of a draw.

Held-out rows depend only on the rows and the data seed. Which rows are trained on depends on the draw as well.
"""

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator

from qlora_helpers.config import Config
from qlora_helpers.data import prompts
from qlora_helpers.data.cleaned import Cleaned, NearDuplicate, TokenizedRow
from qlora_helpers.data.leaks import HeldOut, Leak
from qlora_helpers.data.prompts import Example
from qlora_helpers.data.schema import TEST, VALIDATION, Row

GROUPS = 10  # groups that the held-out rows come from, at least: with fewer, an interval says little
SAME_GROUP = "group of a held-out row"
Fit = Callable[[Iterable[Row]], Iterator[tuple[TokenizedRow, Example | None]]]  # yields the rows that can be learned
Key = tuple[str, str]


def split_key(row: Row, seed: int) -> tuple[int, str, str, str]:
    """Return the place of a row in the split: test rows, validation rows, others; in each, by hashes of seed and text.

    Rows of a group follow each other.
    """
    place, own = {TEST: 0, VALIDATION: 1}.get(row.split, 2), draw_key(row, seed)
    return place, _digest(seed, row.group) if row.group else own[0], *own


def draw_key(row: Row, draw: int) -> Key:
    """Return the place of a training row in a draw: a hash of the draw and the prompt, then the row's id."""
    return _digest(draw, row.prompt), row.id


def in_draw(items: Iterable[TokenizedRow], draw: int) -> list[TokenizedRow]:
    """Return training rows in the order of a draw. The first ones are trained on, so sizes are nested."""
    return sorted(items, key=lambda item: draw_key(item.row, draw))


def _digest(seed: int, text: str) -> str:
    return hashlib.sha256(f"{seed}\n{text}".encode()).hexdigest()


class Split:
    """Divides rows among the lists of `cleaned`. Call `hold_out`, then `choose_on`, then `train_on`, then `finish`.

    `fit` tokenizes rows and yields those that can be learned, so no row is tokenized before it is needed.
    """

    def __init__(self, cleaned: Cleaned, config: Config, fit: Fit) -> None:
        self.cleaned, self.config, self.fit = cleaned, config, fit
        self._held = HeldOut(cleaned.loaded.rows, config.near_duplicates)
        self._groups: Counter[str] = Counter()
        self._leaks: list[NearDuplicate] = []

    def hold_out(self, rows: deque[Row], wanted: int) -> int:
        """Take rows from the left until `wanted` are held out, and return how many of those taken could be learned.

        Held-out rows are unlike each other, so that they are independent. At most a tenth comes from one group.
        """
        usable, most = 0, max(1, wanted // GROUPS)
        while rows and len(self.cleaned.heldout) < wanted:
            row = rows.popleft()
            if row.group and self._groups[row.group] >= most:
                self.cleaned.drop(row, SAME_GROUP)
                continue
            for item, example in self.fit([row]):
                usable += 1
                if self._is_leak(row, self._held.leak(row)):
                    continue
                self._held.add(row)
                self._groups[row.group] += 1
                self._keep(example, prompts.heldout_limit(self.config))
                self.cleaned.heldout.append(item)
        return usable

    def choose_on(self, rows: Iterable[Row]) -> None:
        """Take rows of a validation split to choose a checkpoint on. Drop those over `selection_rows`."""
        wanted = self.config.selection_rows
        for row in self._other_groups(rows):
            if len(self.cleaned.selection) == wanted:
                self.cleaned.drop(row, f"validation split, over n_selection={wanted}")
                continue
            for item, example in self.fit([row]):
                if not self._is_leak(row, self._held.leak(row)):
                    self._keep(example, prompts.heldout_limit(self.config))
                    self.cleaned.selection.append(item)

    def train_on(self, rows: Iterable[Row]) -> None:
        """Use every row for training that is no leak (see `leaks`) and of no group that is held out.

        Encodings are kept of the rows that the config's own draw trains and chooses on.
        """
        config, limit = self.config, prompts.heldout_limit(self.config)
        chosen = config.selection_rows - len(self.cleaned.selection)
        ordered = sorted(self._other_groups(rows), key=self._draw_key)
        leaks = self._held.leaks(ordered)
        for item, example in self.fit(ordered):
            if self._is_leak(item.row, leaks.get(item.row.id)):
                continue
            number = len(self.cleaned.train)
            if config.n_samples is None or number < config.n_samples:
                self._keep(example, config.max_length)
            elif number < config.n_samples + chosen:
                self._keep(example, limit)
            self.cleaned.train.append(item)

    def finish(self, rows: Iterable[Row]) -> None:
        """Order the training rows and the leaks as in `rows`, and drop the leaks."""
        place = {row.id: number for number, row in enumerate(rows)}
        self.cleaned.train.sort(key=lambda item: place[item.row.id])
        self._leaks.sort(key=lambda leak: place[leak.dropped.id])
        for leak in self._leaks:
            self.cleaned.drop(leak.dropped, leak.reason)
        self.cleaned.near_duplicates.extend(self._leaks)

    def _draw_key(self, row: Row) -> Key:
        return draw_key(row, self.config.training_draw)

    def _other_groups(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield the rows of groups that are not held out, and drop the others."""
        for row in rows:
            if row.group and self._groups[row.group]:
                self.cleaned.drop(row, SAME_GROUP)
            else:
                yield row

    def _is_leak(self, row: Row, leak: Leak | None) -> bool:
        """Record a leak of a row, if there is one, and return whether there is."""
        if leak is not None:
            self._leaks.append(NearDuplicate(row, leak.heldout, leak.similarity, leak.reason))
        return leak is not None

    def _keep(self, example: Example | None, limit: int) -> None:
        if example:
            self.cleaned.examples[example.row.id] = prompts.shortened(example, limit)
