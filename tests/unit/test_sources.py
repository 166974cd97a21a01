"""Rows from files: schemas, rejected rows, and the errors for files that cannot be read."""

import csv
import json
from collections import Counter

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from qlora_helpers import Config, UserError
from qlora_helpers.data import sources
from qlora_helpers.models import hub

GOOD = {"text": "### Human: a### Assistant: b"}


def turns(row):
    """Return the turns of a row as pairs of role and text."""
    return [(m["role"], m["content"]) for m in row.messages]


def load(path):
    return sources.load(Config(dataset=str(path)))


def error_message(path):
    """Return the message of the error for this data set, which is always one line."""
    with pytest.raises(UserError) as caught:
        load(path)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("### Human: a### Assistant: b", ["a", "b"]),
        ("### Human: a\n### Assistant: b\n### Human: c### Assistant: d", ["a", "b", "c", "d"]),
        ("### Human: a### Assistant: ### Steps\n1. x\n### More\ny", ["a", "### Steps\n1. x\n### More\ny"]),
        ("### Human: a### Assistant: b### Human: unanswered", ["a", "b"]),
        ("### Human: a### Human: b### Assistant: c", ["a\n\nb", "c"]),
        ("### Assistant: hello### Human: a### Assistant: b", ["a", "b"]),
        ("  ### Human:a### Assistant:b  ", ["a", "b"]),
    ],
)
def test_guanaco(write_rows, text, want):
    loaded = load(write_rows([{"text": text}]))
    assert loaded.layout == "guanaco"
    assert turns(loaded.rows[0]) == list(zip(["user", "assistant"] * 2, want, strict=False))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Hello ### Human: a### Assistant: b", "does not start with"),
        ("no markers at all", "does not start with"),
        ("### Human: only a question", "no answer"),
        ("### Assistant: b", "no question before an answer"),
        ("### Human: a### Assistant: b### Assistant: c", "alternate"),
        ("### Human: a### Assistant:  ", "empty turn"),
        ([7], "list where text should be"),
    ],
)
def test_a_bad_row_among_good_ones_is_rejected_with_its_reason(write_rows, text, reason):
    loaded = load(write_rows([GOOD, {"text": text}, GOOD]))
    assert len(loaded.rows) == 2
    assert [r["origin"] for r in loaded.rejected] == ["line 2"]
    assert reason in loaded.rejected[0]["reason"]


@pytest.mark.parametrize(
    ("row", "layout", "user", "given"),
    [
        ({"instruction": " a ", "output": "b"}, "instruction", "a", None),
        ({"instruction": "a", "input": "x ", "output": "b"}, "instruction", "a", "x"),
        ({"instruction": "a", "input": None, "output": "b"}, "instruction", "a", None),
        ({"prompt": "a", "completion": "b"}, "prompt-completion", "a", None),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "messages",
            "a",
            None,
        ),
    ],
)
def test_other_schemas(write_rows, row, layout, user, given):
    loaded = load(write_rows([row]))
    assert loaded.layout == layout
    assert turns(loaded.rows[0]) == [("user", user), ("assistant", "b")]
    assert loaded.rows[0].messages[0].get("input") == given


def test_invalid_messages_are_rejected(write_rows):
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    loaded = load(write_rows([{"messages": m} for m in (good, "text", [1], [{"role": []}], [{"content": "x"}])]))
    assert [turns(row) for row in loaded.rows] == [[("user", "a"), ("assistant", "b")]]
    assert len(loaded.rejected) == 4


def test_later_rows_without_the_columns_are_rejected(write_rows):
    loaded = load(write_rows([GOOD, {"other": 1}, [1], "text"]))
    assert len(loaded.rows) == 1
    assert [r["reason"] for r in loaded.rejected] == ["no column text"] * 3


def test_json_lists_boms_and_crlf_give_the_same_rows(tmp_path):
    rows = [GOOD, {"text": "### Human: é🎉### Assistant: ü"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    files = {
        "list.json": json.dumps(rows).encode(),
        "plain.jsonl": "\n".join(lines).encode(),
        "bom.jsonl": b"\xef\xbb\xbf" + "\n".join(lines).encode(),
        "crlf.jsonl": ("\r\n".join(lines) + "\r\n\r\n").encode(),
    }
    read = []
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        read.append([row.messages for row in load(tmp_path / name).rows])
    assert read == [read[0]] * 4
    assert read[0][1][0]["content"] == "é🎉"


def test_every_file_format_gives_the_same_rows(tmp_path):
    """CSV with quoted cells, Parquet with types, and a folder, whose files are read in the order of their names."""
    records = [
        {"instruction": 'A "quoted", line', "input": "two\nlines", "output": "é🎉"},
        {"instruction": "Second?", "input": "", "output": "Yes."},
    ]
    table = pa.Table.from_pylist(records)
    pq.write_table(table, tmp_path / "a.parquet")
    with (tmp_path / "a.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        writer.writerows(records)
    (tmp_path / "a.json").write_text(json.dumps(records), "utf-8")
    read = [load(tmp_path / name) for name in ("a.parquet", "a.csv", "a.json")]
    assert {loaded.layout for loaded in read} == {"instruction"}
    assert [[row.id for row in loaded.rows] for loaded in read] == [[row.id for row in read[0].rows]] * 3
    assert [row.to_record() for row in read[0].rows] == records

    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.jsonl").write_text(json.dumps(GOOD) + "\n", "utf-8")
    (tmp_path / "sub" / "empty.jsonl").write_text("", "utf-8")
    (tmp_path / "notes.txt").write_text("not a row", "utf-8")
    folder = load(tmp_path)
    assert folder.layout == "instruction + guanaco"
    assert [row.origin for row in folder.rows][:2] == ["a.csv line 3", "a.csv line 4"]
    assert folder.rows[-1].origin == "sub/b.jsonl line 1"
    assert len(folder.rows) == 7


@pytest.mark.parametrize(
    ("record", "user", "answer"),
    [
        ({"question": "a", "answer": "b"}, "a", "b"),
        ({"instruction": "a", "instances": [{"input": "x", "output": "b"}, {"output": "c"}]}, "a", "b"),
    ],
)
def test_two_more_schemas(write_rows, record, user, answer):
    (row,) = load(write_rows([record])).rows
    assert turns(row) == [("user", user), ("assistant", answer)]


def test_the_schema_is_that_of_most_rows(write_rows):
    loaded = load(write_rows([{"text": None}, {"other": 1}, GOOD, GOOD, {"prompt": "a", "completion": "b"}]))
    assert loaded.layout == "guanaco"
    assert len(loaded.rows) == 2
    assert [r["reason"] for r in loaded.rejected] == ["null where text should be", *["no column text"] * 2]


def test_rows_from_which_a_turn_is_left_out_are_counted(write_rows):
    asked = {"text": GOOD["text"] + "### Human: and?"}
    assert load(write_rows([GOOD, asked])).altered == {"unanswered last turn left out": 1}


@pytest.mark.parametrize(
    "record",
    [
        {"text": "### Human: a### Assistant: b### Human: c### Assistant: d"},
        {"messages": [{"role": "user", "content": "a", "input": "x"}, {"role": "assistant", "content": "b"}]},
        {"instruction": "a", "input": "x", "output": "b"},
        {"prompt": "a", "completion": "b"},
        {"question": "a", "answer": "b"},
        {"question": "a", "input": "x", "answer": "b"},
        {"question": "a", "system": "s", "answer": "b"},
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "learn": False, "content": "b"},
                {"role": "user", "content": "c"},
                {"role": "assistant", "content": "d"},
            ],
            "tools": '[{"name": "f"}]',
        },
    ],
)
def test_a_written_row_can_be_read_again(write_rows, record):
    (row,) = load(write_rows([record])).rows
    (again,) = load(write_rows([row.to_record()])).rows
    assert row.to_record() == record
    assert again.id == row.id


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b" \n\n", "is empty"),
        ("a.json", b"[]", "has no rows"),
        ("a.json", b"{}", "not a list of rows"),
        ("a.json", b'[\n{"text": "x"},\n{"text": \n', "line 4"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "x\n', "line 3"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "not UTF-8 on line 2"),
        ("a.jsonl", b'{"text": "x"},\n{"text": "y"}\n', "line 1 (a comma ends the line)"),
        ("a.jsonl", b"\xff\xfe\x00", "not valid UTF-16"),
        ("a.jsonl.gz", b"not compressed", "cannot be used"),
        ("a.json", b'{"name": "x", "items": 3}', "an object with the keys name, items"),
        ("a.json", b'{"question": ["a", "b"], "answer": ["c"]}', "an object with the keys question, answer"),
        ("a.csv", b"text\nna\xefve\n", "in Windows-1252, as spreadsheets save it, it reads 'naïve'"),
        ("a.jsonl", b'{"question": "a", "reply": "b"}', "has: question, reply"),
        ("a.jsonl", b"[1, 2]", "has: none"),
        ("a.jsonl", b"[" * 100_000, "line 1"),
        ("a.jsonl", b'{"one\\ntwo": 1}', "columns"),
        ("a.csv", b"", "is empty"),
        ("a.csv", b'text\nx\n"open', "not valid CSV on line 3"),
        ("a.csv", b"text\n\xff\n", "not UTF-8 on line 2"),
        ("a.csv", b"a,b\n1,2\n", "has: a, b"),
        ("a.parquet", b"PAR1 not a Parquet file", "Parquet magic bytes not found"),
        ("a.jsonl", b'{"n": ' + b"9" * 5000 + b"}", "line 1"),
        ("a.txt", b"text\nx\n", "not a .jsonl, .json, .csv, .tsv or .parquet file"),
    ],
)
def test_the_error_for_an_unreadable_file_says_why_and_where(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    message = error_message(tmp_path / name)
    assert message.startswith("dataset: ")
    assert says in message
    assert "Fix: " in message


PAIRS = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in PAIRS).encode()


def compressed(kind):
    """Return three rows as compressed JSON lines."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, kind) as stream:
        stream.write(LINES)
    return sink.getvalue().to_pybytes()


CELLS = "question;answer\nq0;a0\nq1;a1\nq2;a2\n"
COLUMNS = {name: [row[name] for row in PAIRS] for name in PAIRS[0]}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl.gz", compressed("gzip")),
        ("rows.jsonl.zst", compressed("zstd")),
        ("rows.json", LINES),
        ("rows.json", json.dumps({"version": 2, "data": PAIRS}).encode()),
        ("rows.json", json.dumps({"train": PAIRS}, indent=1).encode()),
        ("rows.json", json.dumps(COLUMNS).encode()),
        ("rows.json", json.dumps({name: dict(enumerate(cells)) for name, cells in COLUMNS.items()}).encode()),
        ("rows.csv", CELLS.encode("utf-8-sig")),
        ("rows.csv", CELLS.replace(";", "\t").replace("\n", "\r\n").encode("utf-16")),
        ("rows.tsv", CELLS.replace(";", "\t").encode()),
        ("rows.csv", CELLS.replace(";", ",").replace("question", "Question").encode()),
        ("rows.csv", b",question,answer\n0,q0,a0\n1,q1,a1\n2,q2,a2\n"),
    ],
)
def test_files_as_tools_write_them_are_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    loaded = load(tmp_path / name)
    assert [turns(row) for row in loaded.rows] == [[("user", f"q{n}"), ("assistant", f"a{n}")] for n in range(3)]
    assert not loaded.rejected
    assert "not used: version" not in str(loaded.columns)
    assert loaded.columns[0].lower() == "question = question, answer = answer"


def test_a_row_with_more_cells_than_columns_is_rejected(tmp_path):
    (tmp_path / "rows.csv").write_text("question,answer\nq,a\nq,a comma, unquoted\n")
    assert [drop["reason"] for drop in load(tmp_path / "rows.csv").rejected] == ["more cells than columns"]


def write_splits(folder, *names):
    """Write a file of 20 rows for each name, with different numbers."""
    folder.mkdir()
    for place, name in enumerate(names):
        rows = [
            {"question": f"What is {n * 7919}?", "answer": f"{n * 104729}"} for n in range(place * 20, place * 20 + 20)
        ]
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ("test.jsonl", "train.jsonl", "validation.jsonl"),
        ("test-00000-of-00001.jsonl", "train-00000-of-00001.jsonl", "dev.jsonl"),
        ("test/part.jsonl", "train/part.jsonl", "val/part.jsonl"),
    ],
)
def test_the_splits_of_a_folder_come_from_its_names(tmp_path, names):
    rows = load(write_splits(tmp_path / "rows", *names)).rows
    assert {row.origin.split()[0]: row.split for row in rows} == dict(
        zip(names, ("test", "", "validation"), strict=True)
    )
    assert [row.split for row in rows[:20]] == ["test"] * 20  # first, so that of equal rows theirs is kept


def test_splits_in_one_json_file_or_saved_folder_are_read(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps({"train": PAIRS, "test": [{"question": "q", "answer": "a"}]}))
    rows = {name: datasets.Dataset.from_list(PAIRS) for name in ("train", "test")}
    datasets.DatasetDict(rows).save_to_disk(tmp_path / "saved")
    rows["train"].save_to_disk(tmp_path / "one")
    assert Counter(row.split for row in load(tmp_path / "rows.json").rows) == {"": 3, "test": 1}
    assert Counter(row.split for row in load(tmp_path / "saved").rows) == {"": 3, "test": 3}
    assert turns(load(tmp_path / "one").rows[0]) == [("user", "q0"), ("assistant", "a0")]
    assert "cannot be used" in error_message(broken(tmp_path / "one"))


def broken(saved):
    """Damage a folder written by `save_to_disk`."""
    for file in saved.glob("*.arrow"):
        file.write_bytes(b"not a table")
    return saved


def test_a_folder_with_only_test_rows_has_no_splits(tmp_path):
    assert {row.split for row in load(write_splits(tmp_path / "rows", "test_a.jsonl", "test_b.jsonl")).rows} == {""}


def test_one_split_or_subset_can_be_chosen(tmp_path):
    folder = write_splits(tmp_path / "rows", "test.jsonl", "train.jsonl")
    write_splits(folder / "small", "train.jsonl")

    def count(**settings):
        loaded = sources.load(Config(dataset=str(folder), **settings))
        return Counter(row.split for row in loaded.rows)

    assert count(split="test") == {"": 20}
    assert count(split="train") == {"": 40}
    assert count(subset="small") == {"": 20}
    with pytest.raises(UserError, match=r"no split 'dev' .has: test, train.*Fix"):
        count(split="dev")
    with pytest.raises(UserError, match=r"no folder 'large'.*Fix"):
        count(subset="large")


def test_the_hub_is_asked_for_the_subset_and_split(monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or PAIRS)
    assert len(sources.load(Config(dataset="someone/rows")).rows) == 3
    sources.load(Config(dataset="someone/rows", subset="small", split="dev[:10]", dataset_revision="v1"))
    assert asked == [
        (("someone/rows", None), {"revision": "main", "split": "train"}),
        (("someone/rows", "small"), {"revision": "v1", "split": "dev[:10]"}),
    ]


def test_a_missing_file_or_data_set_is_an_error(tmp_path):
    assert "does not exist" in error_message(tmp_path / "none.jsonl")
    assert "contains no .jsonl, .json, .csv, .tsv or .parquet file" in error_message(tmp_path)
    with pytest.raises(UserError, match="does not define one"):
        sources.load(Config(dataset=None))


def test_the_sample_data_is_read_completely():
    loaded = sources.load(Config())
    assert len(loaded.rows) >= 128
    assert not loaded.rejected


def test_rows_with_equal_text_have_equal_ids(make_row):
    assert make_row("a", "b").id == make_row("a", "b").id
    assert len({make_row("a", "b").id, make_row("a", "c").id, make_row("a", "b", given="x").id}) == 3
    assert make_row("How  ARE\nyou?", "b").prompt == make_row("how are you?", "c").prompt


def test_half_a_surrogate_pair_does_not_stop_loading(write_rows):
    """JSON can contain the escape of half a surrogate pair. Such a row cannot be encoded, so it is rejected here."""
    loaded = load(write_rows([GOOD, {"text": "### Human: \ud83d### Assistant: b"}]))
    assert len([row.id for row in loaded.rows]) + len(loaded.rejected) == 2


texts = st.text() | st.just("### Human: a### Assistant: b")
records = st.dictionaries(
    st.sampled_from(["text", "messages", "prompt", "completion", "instruction", "output", "input"]) | st.text(),
    texts | st.none() | st.integers() | st.lists(texts),
)
contents = st.binary() | st.lists(records.map(json.dumps) | st.text(), max_size=4).map(
    lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass")
)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "jsonl.gz"])
@given(contents)
@example(b'{"one\\ntwo": 1}')
@hypothesis_settings(max_examples=300)
def test_any_bytes_give_rows_or_a_one_line_error(tmp_path_factory, kind, content):
    path = tmp_path_factory.getbasetemp() / f"any.{kind}"
    path.write_bytes(content)
    message = "fine"
    try:
        for row in load(path).rows:
            assert row.id
    except UserError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
