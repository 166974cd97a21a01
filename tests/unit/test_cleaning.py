"""What is dropped and why, and a split that depends on words only."""

import dataclasses

import pytest

from qlora_helpers import Config, UserError, cleaning

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


def test_one_row_of_each_prompt_is_kept(prepare):
    same = ROWS[3]
    other = {"instruction": "QUESTION  number 3?", "output": "Another answer."}
    data = prepare([*ROWS, same, other], n_samples=None)
    assert sorted(reasons(data)) in (
        ["same prompt as another row", "same row twice"],
        ["same prompt as another row"] * 2,  # if the other answer came first
    )
    prompts = [example.row.prompt for example in data.train + data.heldout]
    assert len(prompts) == len(set(prompts)) == 40


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
