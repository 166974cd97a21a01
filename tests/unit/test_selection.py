"""Rows to choose a checkpoint on, and groups of rows that stay on one side of the split."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_helpers import Config, UserError, __main__
from qlora_helpers.data import cleaning, python_docs, sources
from qlora_helpers.data.schema import VALIDATION
from qlora_helpers.data.splitting import SAME_GROUP

ROWS = [{"instruction": f"Question number {i}?", "output": f"Answer {i}."} for i in range(40)]
KEPT_ASIDE = "validation split, kept for selection"


def ids(examples):
    return [example.row.id for example in examples]


def reasons(data):
    return Counter(drop["reason"] for drop in data.dropped)


@pytest.fixture
def folder(tmp_path):
    """A data set with 12 validation rows, two of which are training rows as well and stay there."""
    (tmp_path / "rows").mkdir()
    for name, part in (("train", ROWS[:30]), ("validation", ROWS[28:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (tmp_path / "rows" / f"{name}.jsonl").write_text(text)
    return str(tmp_path / "rows")


@pytest.fixture
def prepare(tokenizer):
    def run(dataset, **changes):
        return cleaning.prepare(Config(dataset=dataset, **{"n_samples": 8, "n_heldout": 6, **changes}), tokenizer)

    return run


@pytest.mark.parametrize("chooses", [{"keep_best": True}, {"early_stopping_patience": 2}])
def test_selection_rows_follow_the_training_rows_in_the_draw(prepare, write_rows, chooses):
    path = write_rows(ROWS)
    data, plain = prepare(path, **chooses), prepare(path)
    assert plain.selection == []
    assert "selection" not in plain.counts()
    assert (ids(data.train), ids(data.heldout)) == (ids(plain.train), ids(plain.heldout))
    assert ids(data.selection) == ids(prepare(path, n_samples=14).train)[8:]
    assert ids(prepare(path, n_selection=3, **chooses).selection) == ids(data.selection)[:3]
    assert ids(prepare(path, seed=1, **chooses).selection) != ids(data.selection)
    counts = data.counts()
    assert (
        counts["rows read"] == 40 == sum(counts[k] for k in ("usable, not asked for", "held-out", "selection", "train"))
    )


def test_selection_rows_are_whole(prepare, write_rows):
    path = write_rows([row | {"output": row["output"] * 30} for row in ROWS])
    data = prepare(path, max_length=32, keep_best=True)
    assert all(example.cut and len(example.input_ids) == 32 for example in data.train)
    assert all(not example.cut and len(example.input_ids) > 32 for example in [*data.selection, *data.heldout])


@pytest.mark.parametrize("few", [{"n_samples": None}, {"n_samples": 30}, {"n_selection": 27}])
def test_too_few_rows_to_choose_on_are_none(prepare, write_rows, few):
    assert prepare(write_rows(ROWS), keep_best=True, **few).selection == []


def test_the_validation_split_is_chosen_on_first(prepare, folder):
    data = prepare(folder, keep_best=True, n_selection=8)
    assert {example.row.split for example in data.selection} == {VALIDATION}
    assert reasons(data) == {"same row twice": 2, "validation split, over n_selection=8": 2}
    more = prepare(folder, keep_best=True, n_selection=15)
    assert [example.row.split for example in more.selection] == [VALIDATION] * 10 + [""] * 5
    assert not set(ids(more.selection)) & set(ids([*more.train, *more.heldout]))
    for one in (data, more):
        counts = one.counts()
        dropped = sum(n for name, n in counts.items() if name.startswith("dropped: "))
        rest = sum(counts[name] for name in ("usable, not asked for", "held-out", "selection", "train"))
        assert counts["rows read"] == 42 == dropped + rest


def test_a_validation_split_that_is_too_small_is_filled_or_named(prepare, folder, tmp_path, capsys):
    prepare(folder, keep_best=True, n_selection=8)
    assert capsys.readouterr().out == ""
    filled = prepare(folder, keep_best=True, n_selection=15)
    assert capsys.readouterr().out == (
        "The validation split has 10 usable rows, fewer than n_selection=15: filled up with 5 training rows from "
        "further on in the draw.\n"
    )
    assert len(filled.selection) == 15
    assert prepare(folder, keep_best=True, n_selection=15, n_samples=None).selection == []
    said = capsys.readouterr().out
    assert "10 usable rows, fewer than n_selection=15, and the draw leaves 0 training rows: it is not used" in said
    assert "set n_selection=10 or a smaller n_samples.\n" in said
    assert len(prepare(folder, keep_best=True, n_selection=10, n_samples=None).selection) == 10
    assert capsys.readouterr().out == ""


def test_a_validation_split_without_a_usable_row_is_named(prepare, write_rows, folder, tmp_path, capsys):
    (tmp_path / "rows" / "validation.jsonl").write_text(json.dumps(ROWS[0]) + "\n")  # a training row as well
    assert len(prepare(folder, keep_best=True, n_selection=8).selection) == 8
    assert "has 0 usable rows, fewer than n_selection=8: filled up with 8 training rows" in capsys.readouterr().out
    prepare(folder)  # chooses nothing
    prepare(write_rows(ROWS), keep_best=True, n_selection=27)  # no validation split
    assert capsys.readouterr().out == ""


def test_without_a_choice_the_validation_split_is_kept_aside(prepare, folder):
    data = prepare(folder)
    assert reasons(data)[KEPT_ASIDE] == 12
    assert not data.selection


def test_a_validation_row_like_a_heldout_one_is_not_chosen_on(prepare, folder, tmp_path):
    heldout = prepare(folder, keep_best=True, n_selection=8).heldout[0].row
    near = {"instruction": heldout.question["content"].upper() + " Now", "output": "Something else."}
    with (tmp_path / "rows" / "validation.jsonl").open("a") as file:
        file.write(json.dumps(near) + "\n")
    data = prepare(folder, keep_best=True, n_selection=13)
    assert reasons(data)["prompt nearly the same as a held-out one"] == 1
    assert "SOMETHING" not in "".join(example.text for example in data.selection)


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    return tmp_path_factory.mktemp("grouped") / "rows.jsonl"


@settings(max_examples=20)
@given(
    st.lists(st.one_of(st.none(), st.integers(0, 12)), min_size=20, max_size=60), st.integers(2, 15), st.integers(0, 3)
)
def test_no_group_is_on_both_sides_and_every_row_is_counted(rows_file, tokenizer, groups, n_heldout, seed):
    rows = [{"question": f"Number {i * 7919}?", "answer": f"It is {i * 7907}.", "Doc": g} for i, g in enumerate(groups)]
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config(dataset=str(rows_file), group_by="doc", n_heldout=n_heldout, data_seed=seed, keep_best=True)
    if all(group is None for group in groups):
        return
    cleaned = cleaning.clean(config, tokenizer)
    assert len(cleaned.train) + len(cleaned.heldout) + len(cleaned.dropped) == len(rows) == cleaned.rows_read
    held = Counter(item.row.group for item in cleaned.heldout)
    alone = held.pop("", 0)
    assert not held.keys() & {item.row.group for item in cleaned.train}
    assert max(held.values(), default=0) <= max(1, n_heldout // 10)
    if len(cleaned.heldout) == n_heldout:
        assert len(held) + alone >= min(10, n_heldout)
    assert {drop["reason"] for drop in cleaned.dropped} <= {SAME_GROUP}


def test_groups_are_drawn_by_the_data_seed(write_rows, tokenizer):
    path = write_rows([row | {"doc": f"d{i // 2}"} for i, row in enumerate(ROWS)])
    held = [
        {
            e.row.group
            for e in cleaning.prepare(Config(dataset=path, group_by="doc", n_heldout=5, data_seed=s), tokenizer).heldout
        }
        for s in (0, 0, 1)
    ]
    assert len(held[0]) == 5
    assert held[0] == held[1] != held[2]


def test_an_unknown_field_is_refused_with_the_nearest_name(write_rows, tokenizer):
    config = Config(dataset=write_rows([row | {"document": "a"} for row in ROWS]), group_by="documents")
    with pytest.raises(UserError, match=r"'documents'\. Did you mean 'document'\?") as caught:
        cleaning.clean(config, tokenizer)
    assert len(str(caught.value).splitlines()) == 1


def test_groups_reach_the_losses_and_the_written_rows(write_rows, tokenizer):
    path = write_rows([row | {"doc": f"d{i}"} for i, row in enumerate(ROWS)])
    loaded = sources.load(Config(dataset=path, group_by="DOC"))
    assert [row.group for row in loaded.rows] == [f"d{i}" for i in range(40)]
    assert loaded.columns == ("instruction = question, output = answer, doc = group",)
    again = write_rows([row.to_record() for row in loaded.rows], "again.jsonl")
    assert [row.group for row in sources.load(Config(dataset=again, group_by="group")).rows] == [
        f"d{i}" for i in range(40)
    ]


def test_the_command_counts_the_groups(model_folder, tmp_path, capsys, monkeypatch):
    records = [(f"row {i}", row | {"module": f"m{i // 2}"}) for i, row in enumerate(ROWS)]
    monkeypatch.setattr(python_docs, "records", lambda: iter(records))
    words = ["data", "python-stdlib", "--out", str(tmp_path), "--model", str(model_folder), "--n-heldout", "5"]
    assert __main__.main(words) == 0
    assert "        20  groups, 5 of them held out" in capsys.readouterr().out
    facts = json.loads((tmp_path / "report.json").read_text())
    assert (facts["train"], facts["heldout"], facts["dropped_by_reason"]) == (30, 5, {SAME_GROUP: 5})
    assert "20 groups, and no group is on both sides" in (tmp_path / "report.md").read_text()
