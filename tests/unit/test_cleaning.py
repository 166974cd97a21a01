"""Which rows are dropped and why, and a split that depends only on the text of the rows."""

import dataclasses
from collections import Counter

import pytest

from qlora_helpers import Config, UserError
from qlora_helpers.data import cleaning, prompts, sources
from qlora_helpers.data.cleaned import Cleaned

ROWS = [{"instruction": f"Question number {i}?", "output": f"Answer {i}."} for i in range(40)]
LONG = [{"instruction": f"Long story {i}?", "output": f"{i} words. " * 60} for i in range(10)]


@pytest.fixture
def prepare(tokenizer, write_rows):
    """Write rows to a file, then clean and split them."""

    def run(rows=ROWS, **settings):
        wanted = {"n_samples": 8, "n_heldout": 10, "max_length": 64, **settings}
        return cleaning.prepare(Config(dataset=write_rows(rows), **wanted), tokenizer)

    return run


@pytest.fixture
def tokenized(monkeypatch):
    """Count how often each text is tokenized."""
    counts = Counter()
    tokenize = prompts._tokens

    def count(texts, tokenizer):
        counts.update(texts)
        return tokenize(texts, tokenizer)

    monkeypatch.setattr(prompts, "_tokens", count)
    return counts


def ids(examples):
    return [example.row.id for example in examples]


def reasons(data):
    return [drop["reason"] for drop in data.dropped]


def test_heldout_rows_are_never_trained_on(prepare):
    data = prepare(n_samples=None)
    assert (len(data.train), len(data.heldout)) == (30, 10)
    assert not set(ids(data.train)) & set(ids(data.heldout))


def test_a_smaller_sample_is_the_start_of_a_larger_one(prepare):
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


def test_a_different_data_seed_gives_a_different_split(prepare):
    assert set(ids(prepare(data_seed=0).heldout)) != set(ids(prepare(data_seed=1).heldout))


def test_the_training_seed_does_not_affect_the_split(prepare):
    assert ids(prepare(seed=0).heldout) == ids(prepare(seed=1).heldout)


def test_another_seed_draws_other_training_rows_and_holds_out_the_same(small, tokenizer):
    cleaned = cleaning.clean(small, tokenizer)
    first, second = (cleaning.select(cleaned, small.replace(seed=seed), tokenizer) for seed in (0, 1))
    assert set(ids(first.train)) != set(ids(second.train))
    assert ids(first.heldout) == ids(second.heldout)
    assert not set(ids(second.train)) & set(ids(second.heldout))
    assert (first.draw, second.to_manifest()["draw"]) == (0, 1)
    more = cleaning.select(cleaned, small.replace(seed=1, n_samples=16), tokenizer)
    assert ids(more.train)[:8] == ids(second.train)
    given = cleaning.select(cleaned, small.replace(seed=1, draw=0), tokenizer)
    assert given.to_manifest() == first.to_manifest()


def test_all_rows_are_all_rows_in_every_draw(prepare):
    assert set(ids(prepare(n_samples=None, seed=0).train)) == set(ids(prepare(n_samples=None, seed=1).train))


@pytest.mark.parametrize("chooses", [{}, {"keep_best": True, "n_selection": 5}])
def test_a_draw_from_rows_cleaned_for_another_is_the_same_draw(small, tokenizer, chooses):
    cleaned = cleaning.clean(small.replace(seed=0, **chooses), tokenizer)
    for seed in range(5):
        own = small.replace(seed=seed, max_length=16, **chooses)
        drawn, whole = cleaning.select(cleaned, own, tokenizer), cleaning.prepare(own, tokenizer)
        for part in ("train", "heldout", "selection"):
            assert getattr(drawn, part) == getattr(whole, part)


def test_which_near_duplicate_is_kept_does_not_depend_on_the_draw(write_rows, tokenizer):
    twins = [{"instruction": f"question number {i}", "output": f"Answer, {i}!"} for i in range(40)]
    path = write_rows([*ROWS, *twins])
    kept = []
    for seed in (0, 1, 2):
        cleaned = cleaning.clean(Config(dataset=path, n_samples=8, n_heldout=10, seed=seed), tokenizer)
        kept.append([item.row.origin for item in [*cleaned.heldout, *cleaned.train]])
        assert len(cleaned.near_duplicates) == 40
    assert kept[0] == kept[1] == kept[2]


def test_duplicates_are_dropped_but_a_different_answer_to_the_same_prompt_is_kept(prepare):
    other = {"instruction": "QUESTION  number 3?", "output": "It is something else altogether, as was shown."}
    data = prepare([*ROWS, ROWS[3], other], n_samples=None, n_heldout=2)
    assert reasons(data) == ["same row twice"]
    assert len(data.train + data.heldout) == 41


def test_a_different_input_makes_a_different_prompt(prepare):
    data = prepare([*ROWS, ROWS[3] | {"input": "with this"}], n_samples=None)
    assert not data.dropped


def test_long_rows_are_cut_or_dropped(prepare):
    rows = [*ROWS, *LONG]
    cut, dropped = prepare(rows, n_samples=None), prepare(rows, n_samples=None, over_length="drop")
    assert len(cut.train) == 40
    assert sum(example.cut > 0 for example in cut.train) > 2
    assert len(dropped.train) == 30
    assert reasons(dropped) == ["over 64 tokens"] * 10
    assert all(len(example.input_ids) <= 64 for example in cut.train)


@pytest.mark.parametrize(
    ("settings", "limit"),
    [({}, 2048), ({"heldout_max_length": 100}, 100), ({"heldout_max_length": 8}, 64), ({"model": "tiny"}, 512)],
)
def test_heldout_rows_are_whole_up_to_their_own_limit(prepare, model_folder, settings, limit):
    """No row is longer than the model has positions, or cut where a training row would not be."""
    if "model" in settings:
        settings = {"model": str(model_folder)}
    long = [row | {"output": row["output"] * 3} for row in LONG]
    data = prepare([*ROWS, *long], n_samples=None, n_heldout=25, **settings)
    lengths = {item.row.id: item.tokens for item in data.cleaned.heldout}
    assert max(lengths.values()) > 512
    assert [len(example.input_ids) for example in data.heldout] == [min(n, limit) for n in lengths.values()]
    assert all(example.cut == max(0, lengths[example.row.id] - limit) for example in data.heldout)
    assert all(len(example.input_ids) <= 64 for example in data.train)


def test_a_heldout_row_needs_a_trained_token_within_the_limit_of_training_rows(prepare):
    data = prepare([*ROWS, {"instruction": "word " * 200, "output": "b"}], n_heldout=30)
    assert reasons(data) == ["no trained token within 64 tokens"]


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
    with pytest.raises(UserError, match=f"but {left} usable rows left"):
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
    if reason == "nearly the same as another row":  # the order of the split decides which of the two is kept
        assert kept["output"] in ("Answer, 7!", "Answer 7.")
    else:
        assert str(kept["instruction"]).strip() == row["instruction"]


def test_labels_may_repeat(prepare):
    """If there are few distinct answers, they are class labels rather than mistakes."""
    rows = [
        {"instruction": f"Which sign has {i} - 20?", "output": "negative" if i < 20 else "positive"} for i in range(40)
    ]
    assert not prepare(rows, n_samples=None).dropped


def test_answers_may_follow_several_phrasings(prepare):
    rows = [
        {"instruction": f"{ask} item {i * 7919}?", "output": f"Answer {i * 104729}."}
        for i in range(20)
        for ask in ("Where is", "Would you please show me the place of")
    ]
    assert "answer equal to that of the row before" not in reasons(prepare(rows))


def test_short_rows_in_chinese_are_kept(prepare):
    short = [{"instruction": "一加一？", "output": "二"}, {"instruction": "日本首都？", "output": "东京"}]
    data = prepare([*ROWS, *short, {"instruction": "Hi?", "output": "Ho."}], n_samples=None)
    assert reasons(data) == ["too short: under 10 characters"]
    assert data.dropped[0]["row"]["instruction"] == "Hi?"


def test_a_changed_end_token_needs_another_encoding(small, tokenizer):
    cleaned = cleaning.clean(small, tokenizer)
    other = small.replace(end_token="<s>")
    assert cleaning.select(cleaned, other, tokenizer).train[0].input_ids[-1] == tokenizer.bos_token_id


SHOWS_CALLS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for call in m.get('tool_calls') or [] %}<call>{{ call['function'] | tojson }}</call>{% endfor %}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("auto", "the chat template has no place for tool calls"),
        ("instruction", "the instruction template has no place for tool calls"),
        (SHOWS_CALLS, None),
    ],
)
def test_tool_calls_that_the_template_does_not_show_are_dropped(make_tokenizer, write_rows, template, reason):
    tokenizer = make_tokenizer()
    if template == SHOWS_CALLS:
        tokenizer.chat_template = SHOWS_CALLS
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"bird": "heron"}}}
    turns = [
        {"role": "user", "content": "Where do herons nest?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "Tall trees"},
        {"role": "assistant", "content": "In tall trees."},
    ]
    config = Config(dataset=write_rows([{"messages": turns}]), template="auto" if reason is None else template)
    cleaned = cleaning.clean(config, tokenizer, 0)
    assert [drop["reason"] for drop in cleaned.dropped] == [reason] * (reason is not None)
    assert len(cleaned.train) == (reason is None)


def test_prompts_like_a_heldout_one_are_taken_out_of_training(prepare):
    rows = [{"instruction": f"Explain entry {i} of the list, please.", "output": f"Answer {i}."} for i in range(40)]
    heldout = prepare(rows, n_samples=None).heldout[0].row
    close = {
        "instruction": heldout.messages[0]["content"].upper() + " Now",
        "output": "Something else.",
    }
    data = prepare([*rows, close], n_samples=None)
    assert reasons(data) == ["prompt nearly the same as a held-out one"]
    (match,) = data.cleaned.near_duplicates
    assert 0.7 <= match.similarity <= 1
    assert len(data.train) == 30


def test_rehearsal_is_mixed_in_and_counted_apart(prepare, write_rows):
    second = [{"instruction": f"General question {i}?", "output": f"General answer {i}."} for i in range(20)]
    second.append(ROWS[0])  # can be a held-out row
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
    with pytest.raises(UserError, match=r"but 2[01] usable in \S*second.jsonl"):
        prepare(n_samples=30, rehearsal=1.0, rehearsal_dataset=path)


def test_a_heldout_row_is_not_rehearsed(prepare, write_rows):
    heldout = prepare(n_samples=20).heldout[0].row.to_record()
    second = [{"instruction": f"General question {i}?", "output": f"General answer {i}."} for i in range(4)]
    path = write_rows([heldout, *second], "second.jsonl")
    data = prepare(n_samples=20, rehearsal=0.2, rehearsal_dataset=path)
    assert {example.row.messages[0]["content"] for example in data.rehearsal} == {row["instruction"] for row in second}


@pytest.mark.parametrize(
    "settings",
    [{}, {"n_samples": None}, {"template": "auto", "n_heldout": 2}, {"seed": 3}, {"keep_best": True, "n_heldout": 4}],
)
def test_each_row_is_tokenized_once(prepare, tokenized, settings):
    data = prepare(**settings)
    assert len(tokenized) == len(ROWS) == data.cleaned.rows_read
    assert set(tokenized.values()) == {1}


def test_each_rehearsal_row_is_tokenized_once(prepare, write_rows, tokenized):
    second = [{"instruction": f"General question {i}?", "output": f"General answer {i}."} for i in range(20)]
    data = prepare(n_samples=20, rehearsal=0.2, rehearsal_dataset=write_rows(second, "second.jsonl"))
    assert len(data.rehearsal) == 4
    assert len(tokenized) == len(ROWS) + len(second)
    assert set(tokenized.values()) == {1}


@pytest.fixture
def small(write_rows):
    """A config with 8 training rows and 10 held-out rows."""
    return Config(dataset=write_rows(ROWS), n_samples=8, n_heldout=10, max_length=64)


def test_each_draw_tokenizes_only_the_rows_it_adds(small, tokenizer, tokenized):
    cleaned = cleaning.clean(small, tokenizer)
    seen = set(cleaned.examples)
    for seed in (0, 1, 2, 1):
        tokenized.clear()
        drawn = cleaning.select(cleaned, small.replace(seed=seed), tokenizer)
        assert tokenized.total() == len(set(ids(drawn.train)) - seen)
        seen |= set(ids(drawn.train))


def test_a_larger_selection_tokenizes_only_the_additional_rows(small, tokenizer, tokenized):
    cleaned = cleaning.clean(small, tokenizer)
    assert sorted(cleaned.examples) == sorted(item.row.id for item in cleaned.heldout + cleaned.train[:8])
    tokenized.clear()
    few = cleaning.select(cleaned, small, tokenizer)
    assert not tokenized
    more = cleaning.select(cleaned, small.replace(n_samples=12), tokenizer)
    assert tokenized.total() == 4
    assert more.train[:8] == few.train


def test_kept_rows_are_not_used_for_another_encoding(small, tokenizer):
    cleaned = cleaning.clean(small, tokenizer)
    shorter = small.replace(max_length=16)
    want = list(prompts.encode([item.row for item in cleaned.train[:8]], shorter, tokenizer))
    assert cleaning.select(cleaned, shorter, tokenizer).train == want


def test_encoded_rows_are_not_kept_if_the_split_depends_on_the_number_of_rows(small, tokenizer):
    cleaned = cleaning.clean(small, tokenizer, lambda usable: usable // 10)
    assert len(cleaned.heldout) == 4
    assert cleaned.examples == {}


def test_an_error_counts_the_reasons_that_it_leaves_out():
    loaded = sources.Loaded([], [], "instruction", Counter(), "rows")
    cleaned = Cleaned(loaded, 512, dropped=[{"reason": f"reason {n}"} for n in range(7)])
    with pytest.raises(UserError, match=r"1 × reason 4; 2 more reasons\)"):
        cleaning.check_enough(cleaned, 1, 1)
