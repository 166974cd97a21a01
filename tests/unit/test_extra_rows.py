"""Tests on your own rows: set QLORA_TEST_ROWS to one or more files, separated by `:`."""

import os
from pathlib import Path

import pytest

from qlora_helpers.config import Config
from qlora_helpers.data import cleaning, prompts, rendering

FILES = [name for name in os.environ.get("QLORA_TEST_ROWS", "").split(os.pathsep) if name]


@pytest.mark.skipif(not FILES, reason="set QLORA_TEST_ROWS=FILE[:FILE…] to test on your own rows")
@pytest.mark.parametrize("name", FILES, ids=lambda name: Path(name).stem)
@pytest.mark.parametrize("template", ["guanaco", "instruction", "auto"])
def test_every_row_is_counted_and_its_answers_are_trained(name, template, tokenizer):
    config = Config.from_params(profile="cpu", dataset=name, template=template, n_samples=50, max_length=4096)
    data = cleaning.prepare(config, tokenizer)
    counts = data.counts()
    parts = sum(n for key, n in counts.items() if key not in ("rows read", "train, cut at the token limit"))
    assert counts["rows read"] == parts
    for example in data.train + data.heldout:
        text, spans = rendering.render(example.row.messages, config, tokenizer)
        pieces = prompts.show_labels(example, tokenizer).pieces
        if not example.cut:
            assert "".join(piece for kind, piece in pieces if kind != "masked") == "".join(text[a:b] for a, b in spans)
