"""What is dropped and why, and a split that depends on words only."""

import dataclasses

import pytest

from qlora_helpers import Config, UserError
from qlora_helpers.data import cleaning

ROWS = [{"instruction": f"Question number {i}?", "output": f"Answer {i}."} for i in range(40)]


@pytest.fixture
def prepare(tokenizer, write_rows):
    """Write rows to a file, clean and split them."""

    def run(rows=ROWS, **settings):
        wanted = {"n_samples": 8, "n_heldout": 10, "max_length": 64, **settings}
        return cleaning.prepare(Config(dataset=write_rows(rows), **wanted), tokenizer)

    return run


def ids(examples):
    return [example.row.id for example in examples]


def reasons(data):
    return [drop["reason"] for drop in data.dropped]


def test_heldout_rows_are_never_trained_on(prepare):
    data = prepare(n_samples=None)
    assert (len(data.train), len(data.heldout)) == (30, 10)
    assert not set(ids(data.train)) & set(ids(data.heldout))


def test_fewer_rows_are_the_first_of_more(prepare):
    few, more = prepare(n_samples=8), prepare(n_samples=16)
    assert ids(few.train) == ids(more.train)[:8]
    assert len(more.train) == 16
    assert ids(few.heldout) == ids(more.heldout)
    assert few.heldout_fingerprint == more.heldout_fingerprint


def test_the_split_does_not_depend_on_the_files_order(prepare):
    twin = {"instruction": "Question number 3?", "output": "Another answer."}
    rows = [*ROWS, twin]
    a, b = prepare(rows, n_samples=None), prepare(rows[::-1], n_samples=None)
    assert (ids(a.train), ids(a.heldout)) == (ids(b.train), ids(b.heldout))
    assert a.source_fingerprint == b.source_fingerprint


def test_rows_added_to_the_file_keep_the_others_order(prepare):
    before, after = prepare(ROWS[:30], n_samples=None), prepare(ROWS, n_samples=None)
    old = set(ids(before.train) + ids(before.heldout))
    everything = ids(after.heldout) + ids(after.train)
    assert [i for i in everything if i in old] == ids(before.heldout) + ids(before.train)


def test_another_data_seed_gives_another_split(prepare):
    assert set(ids(prepare(data_seed=0).heldout)) != set(ids(prepare(data_seed=1).heldout))


def test_the_training_seed_does_not_touch_the_split(prepare):
    assert ids(prepare(seed=0).heldout) == ids(prepare(seed=1).heldout)


def test_equal_rows_count_once_and_other_answers_to_a_prompt_stay(prepare):
    other = {"instruction": "QUESTION  number 3?", "output": "It is something else altogether, as was shown."}
    data = prepare([*ROWS, ROWS[3], other], n_samples=None, n_heldout=2)
    assert reasons(data) == ["same row twice"]
    assert len(data.train + data.heldout) == 41


def test_an_input_makes_another_prompt(prepare):
    data = prepare([*ROWS, ROWS[3] | {"input": "with this"}], n_samples=None)
    assert not data.dropped


def test_long_rows_are_cut_or_dropped(prepare):
    rows = [*ROWS, {"instruction": "Long?", "output": "word " * 200}]
    cut, dropped = prepare(rows, n_samples=None), prepare(rows, n_samples=None, over_length="drop")
    assert len(cut.train) == 31
    assert sum(example.cut > 0 for example in cut.train + cut.heldout) == 1
    assert len(dropped.train) == 30
    assert reasons(dropped) == ["over 64 tokens"]
    assert all(len(example.input_ids) <= 64 for example in cut.train + cut.heldout)


def test_rows_without_a_trained_token_are_dropped(prepare):
    data = prepare([*ROWS, {"instruction": "word " * 200, "output": "b"}], n_samples=None)
    assert reasons(data) == ["no trained token within 64 tokens"]
    assert all(example.trained for example in data.train + data.heldout)


def test_counts_add_up(prepare):
    rows = [*ROWS, ROWS[0], {"instruction": "", "output": "b"}, {"instruction": "word " * 200, "output": "b"}]
    data = prepare(rows)
    counts = data.counts()
    dropped = sum(n for name, n in counts.items() if name.startswith("dropped: "))
    assert dropped == len(data.dropped) == 3
    rest = counts["usable, not asked for"] + counts["held-out"] + counts["train"]
    assert counts["rows read"] == len(rows) == dropped + rest
    manifest = data.to_manifest()
    assert manifest["train_ids"] == ids(data.train)
    assert manifest["heldout_ids"] == ids(data.heldout)


@pytest.mark.parametrize(("settings", "left"), [({"n_samples": 31}, "30"), ({"n_heldout": 40}, "0")])
def test_asking_for_more_rows_than_there_are(prepare, settings, left):
    with pytest.raises(UserError, match=f"but {left} usable rows are left"):
        prepare(**settings)


def test_a_planted_leak_is_found(prepare):
    data = prepare()
    leak = dataclasses.replace(data, train=[*data.train, data.heldout[0]])
    with pytest.raises(UserError, match="1 of its rows are also trained on"):
        cleaning.check_no_leak(leak)
    cleaning.check_no_leak(data)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "Hi?", "output": "Ho."}, "too short: under 10 characters"),
        ({"instruction": "Long?", "output": "word " * 250_000}, "too long: over 1000000 characters"),
        ({"instruction": "Say this again.", "output": "say THIS  again."}, "answer equal to its prompt"),
        ({"instruction": "Something else?", "output": "Answer 39."}, "answer equal to that of the row before"),
        ({"instruction": "question number 7", "output": "Answer, 7!"}, "nearly the same as another row"),
        ({"instruction": "Null?", "output": None}, "null where text should be"),
        ({"instruction": "Nested?", "output": [None, [None]]}, "list where text should be"),
        ({"instruction": "Broken\ufffd?", "output": "Indeed it is."}, "broken encoding"),
        ({"instruction": "Zero\0byte?", "output": "Indeed it is."}, "broken encoding"),
        ({"instruction": "Empty, isn't it?", "output": "  "}, "an empty turn"),
    ],
)
def test_every_dropped_row_is_kept_with_its_reason(prepare, row, reason):
    data = prepare([*ROWS, row], n_samples=None)
    assert reasons(data) == [reason]
    assert len(data.train + data.heldout) == 40
    (drop,) = data.dropped
    kept = drop["row"]
    if reason == "nearly the same as another row":  # which of the two comes first is the split's choice
        assert kept["output"] in ("Answer, 7!", "Answer 7.")
    else:
        assert str(kept["instruction"]).strip() == row["instruction"]


def test_labels_may_repeat(prepare):
    """Where the answers are few they are classes, not slips."""
    rows = [
        {"instruction": f"Which sign has {i} - 20?", "output": "negative" if i < 20 else "positive"} for i in range(40)
    ]
    assert not prepare(rows, n_samples=None).dropped


def test_prompts_like_a_heldout_one_are_taken_out_of_training(prepare):
    rows = [{"instruction": f"Explain entry {i} of the list, please.", "output": f"Answer {i}."} for i in range(40)]
    heldout = prepare(rows, n_samples=None).heldout[0].row
    close = {
        "instruction": heldout.messages[0]["content"].upper() + " Now",
        "output": "Nothing of it.",
    }
    data = prepare([*rows, close], n_samples=None)
    assert reasons(data) == ["prompt nearly the same as a held-out one"]
    (twin,) = data.cleaned.twins
    assert 0.7 <= twin.similarity <= 1
    assert len(data.train) == 30


def test_rehearsal_is_mixed_in_and_counted_apart(prepare, write_rows):
    second = [{"instruction": f"General question {i}?", "output": f"General answer {i}."} for i in range(20)]
    second.append(ROWS[0])  # may be held out
    path = write_rows(second, "second.jsonl")
    plain = prepare(n_samples=20)
    data = prepare(n_samples=20, rehearsal=0.2, rehearsal_dataset=path)
    assert ids(data.train) == ids(plain.train)
    assert ids(data.heldout) == ids(plain.heldout)
    assert len(data.rehearsal) == 4
    assert len(data.trained_on) == 24
    assert data.counts() == plain.counts()
    manifest = data.to_manifest()
    assert manifest["rehearsal"] == {"source": path, "rows": 4, "ids": ids(data.rehearsal)}
    assert "rehearsal" not in plain.to_manifest()
    assert data.source_fingerprint != plain.source_fingerprint
    more = prepare(n_samples=30, rehearsal=0.2, rehearsal_dataset=path)
    assert ids(more.rehearsal)[:4] == ids(data.rehearsal)
    with pytest.raises(UserError, match=r"second.jsonl has 2[01] usable ones"):
        prepare(n_samples=30, rehearsal=1.0, rehearsal_dataset=path)


def test_a_heldout_row_is_not_rehearsed(prepare, write_rows):
    heldout = prepare(n_samples=20).heldout[0].row.to_record()
    second = [{"instruction": f"General question {i}?", "output": f"General answer {i}."} for i in range(4)]
    path = write_rows([heldout, *second], "second.jsonl")
    data = prepare(n_samples=20, rehearsal=0.2, rehearsal_dataset=path)
    assert {row.row.messages[0]["content"] for row in data.rehearsal} == {row["instruction"] for row in second}
