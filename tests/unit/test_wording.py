"""Numbers of things: one has no plural ending."""

import pytest

from qlora_helpers.wording import counted


@pytest.mark.parametrize(
    ("number", "thing", "words"),
    [
        (0, "tie", "0 ties"),
        (1, "row", "1 row"),
        (1, "loss", "1 loss"),
        (2, "held-out row", "2 held-out rows"),
        (2, "loss", "2 losses"),
        (1600, "row", "1,600 rows"),
    ],
)
def test_only_one_has_no_plural_ending(number, thing, words):
    assert counted(number, thing) == words
