"""`python -m qlora_helpers data` writes five consistent files, or prints a one-line error for unusable input."""

import json
import os
import shutil

import pytest

from qlora_helpers import __main__, files
from qlora_helpers.data import sources
from qlora_helpers.files import read_jsonl

FILES = ("train.jsonl", "heldout.jsonl", "dropped.jsonl", "report.md", "report.json")
ROWS = [{"instruction": f"Question number {i}?", "input": "", "output": f"Answer {i}."} for i in range(30)]


@pytest.fixture
def data(model_folder, tmp_path, capsys):
    """Run the command with the output folder `tmp_path/out`. Returns the exit code, stdout and stderr."""

    def run(source, *options):
        words = ["data", str(source), "--out", str(tmp_path / "out"), "--model", str(model_folder), *options]
        code = __main__.main(words)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def parts(folder):
    return [read_jsonl(folder / name) for name in FILES[:3]]


def test_every_row_read_is_written_once(data, write_rows, tmp_path):
    bad = [{"instruction": None, "output": "x"}, {"other": 1}, ROWS[0], {"instruction": "Long?", "output": "w " * 900}]
    code, out, _ = data(write_rows([*ROWS, *bad]))
    assert code == 0
    train, heldout, dropped = parts(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(train) + len(heldout) + len(dropped) == 34 == report["rows_read"]
    assert (
        (report["train"], report["heldout"], report["dropped"])
        == (len(train), len(heldout), len(dropped))
        == (27, 3, 4)
    )
    assert report["dropped_by_reason"] == {
        "no column instruction, output": 1,
        "null where text should be": 1,
        "over 512 tokens": 1,
        "same row twice": 1,
    }
    assert all(row["reason"] for row in dropped)
    assert sorted(row["instruction"] for row in train + heldout) == sorted(row["instruction"] for row in ROWS)
    assert "layout: instruction" in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES)


def test_the_report_shows_each_section_and_escapes_text(data, write_rows, tmp_path):
    twin = {"instruction": "Question, number 3?", "output": "Answer 3!"}
    evil = {"instruction": "A | pipe and <script>alert(1)</script>\x1b[31m", "output": "`code` *bold* indeed"}
    data(write_rows([*ROWS, twin, evil]), "--template", "guanaco", "--n-heldout", "2")
    report = (tmp_path / "out" / "report.md").read_text()
    for heading in ("## Rows", "## Lengths", "## Quality", "## Near duplicates", "## Sample rows"):
        assert heading in report
    assert "dropped: nearly the same as another row" in report
    assert "█" in report
    assert "<script" not in report
    assert "\x1b" not in report
    assert "was trained with its own chat template" in report


def test_the_fingerprints_do_not_depend_on_order_or_files(data, write_rows, tmp_path):
    fingerprints = []
    for number, rows in enumerate((ROWS, ROWS[::-1])):
        folder = tmp_path / f"in{number}"
        folder.mkdir()
        for part, name in enumerate("ab" if number else "zy"):
            shutil.move(write_rows(rows[15 * part : 15 * part + 15]), folder / f"{name}.jsonl")
        data(folder, "--n-heldout", "5")
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        fingerprints.append({key: report[key] for key in report if key.endswith("fingerprint")})
    assert fingerprints[0] == fingerprints[1]
    assert fingerprints[0] == {  # the same on every machine and Python
        "source_fingerprint": "0583fcbd4f2e38ec",
        "train_fingerprint": "a549c6f31ee8fa95",
        "heldout_fingerprint": "bfca1e4051d22901",
    }


def test_the_written_rows_can_be_read_again(data, write_rows, tmp_path):
    data(write_rows(ROWS))
    train = json.loads((tmp_path / "out" / "report.json").read_text())["train_fingerprint"]
    shutil.copy(tmp_path / "out" / "train.jsonl", tmp_path / "again.jsonl")
    data(tmp_path / "again.jsonl")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["source_fingerprint"] == train


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        (b'{"instruction": "a question", "output": "an answer"}\n{"instruc\n', (), "line 2"),
        (b"\xff", (), "not UTF-8 on line 1"),
        (b"", (), "is empty"),
        (b'{"a": 1}', (), "lacks the required columns"),
        (b'{"a": 1}', ("--max-tokens", "0"), "max_length: 0 is too small"),
        (b'{"a": 1}', ("--near-duplicates", "0.1"), "near_duplicates: 0.1 is too small"),
        (b'{"a": 1}', ("--near-duplicate", "0.7"), "Did you mean '--near-duplicates'?"),
    ],
)
def test_bad_input_gives_a_one_line_error_and_no_files(data, tmp_path, content, options, says):
    (tmp_path / "in.jsonl").write_bytes(content)
    code, _, err = data(tmp_path / "in.jsonl", *options)
    assert code == 2
    assert says in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_what_each_column_is_taken_for_is_printed_and_reported(data, write_rows, tmp_path):
    rows = [{"prompt": row["instruction"], "chosen": row["output"], "rejected": "No."} for row in ROWS]
    code, out, _ = data(write_rows(rows))
    assert code == 0
    line = "prompt = question, chosen = answer; not used: rejected"
    assert f"columns: {line}" in out.splitlines()
    assert line in (tmp_path / "out" / "report.md").read_text()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["columns"] == [line]


def test_changes_to_rows_are_printed(data, write_rows):
    asked = {"role": "user", "content": "Please."}
    told = [{"role": "assistant", "content": row["output"]} for row in ROWS]
    rows = [{"messages": [asked, asked | {"content": f"Number {n}?"}, turn]} for n, turn in enumerate(told)]
    _, out, _ = data(write_rows(rows))
    assert "30  altered: turns of one role joined" in out


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        (ROWS[:1], (), "0 usable rows left"),
        (
            [*ROWS[:3], *ROWS[:2], {"instruction": None, "output": "x"}],
            ("--n-heldout", "3"),
            "; 2 × same row twice; 1 × null where text should be",
        ),
        (
            [{**row, "output": "word " * 700 + row["output"]} for row in ROWS],
            (),
            "no answer survives 512 tokens: the 30 rows have",
        ),
        (
            [{**row, "instruction": "word " * 700 + row["instruction"]} for row in ROWS],
            ("--over-length", "truncate"),
            "no answer survives 512 tokens: the 30 rows have",
        ),
    ],
)
def test_if_too_few_rows_are_left_the_error_says_why_and_only_the_dropped_rows_are_written(
    data, write_rows, tmp_path, rows, options, says
):
    data(write_rows(ROWS))  # leaves files that no longer hold
    code, _, err = data(write_rows(rows), *options)
    assert code == 2
    assert says in err
    assert len(err.splitlines()) == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["dropped.jsonl"]
    read = len(rows) - len(read_jsonl(tmp_path / "out" / "dropped.jsonl"))
    assert read <= 3


def test_the_test_split_of_a_folder_is_held_out(data, tmp_path):
    (tmp_path / "rows").mkdir()
    for name, part in (("train", ROWS[:14]), ("test", [*ROWS[14:26], ROWS[0]]), ("validation", ROWS[26:])):
        (tmp_path / "rows" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    code, out, _ = data(tmp_path / "rows")
    assert code == 0
    train, heldout, dropped = parts(tmp_path / "out")
    assert "13  held-out, 13 from the test split" in out
    assert sorted(row["instruction"] for row in heldout) == sorted(
        row["instruction"] for row in [*ROWS[14:26], ROWS[0]]
    )
    assert sorted(row["instruction"] for row in train) == sorted(row["instruction"] for row in ROWS[1:14])
    assert sorted(row["reason"] for row in dropped) == [
        "same row twice",
        *["validation split, kept for selection"] * 4,
    ]
    data(tmp_path / "rows", "--n-heldout", "5")
    train, heldout, dropped = parts(tmp_path / "out")
    assert (len(train), len(heldout)) == (13, 5)
    assert [row["reason"] for row in dropped].count("test split, over n_heldout=5") == 8


def test_unusual_but_readable_files(data, tmp_path):
    """A line of 20 MB, a BOM, Windows line endings, an escaped NUL, nested nulls and half a surrogate pair."""
    lines = [json.dumps(row) for row in ROWS]
    lines.append(json.dumps({"instruction": "Huge?", "output": "x" * 20_000_000}))
    lines.append('{"instruction": "Nul\\u0000?", "output": "Yes, there is one."}')
    lines.append('{"instruction": [null, [null, {"a": null}]], "output": null}')
    lines.append('{"instruction": "Half \\ud83d?", "output": "Half a character."}')
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    code, out, _ = data(tmp_path / "in.jsonl")
    assert code == 0
    reasons = [row["reason"] for row in read_jsonl(tmp_path / "out" / "dropped.jsonl")]
    assert sorted(reasons) == [
        "broken encoding",
        "broken encoding",
        "list where text should be",
        "too long: over 1000000 characters",
    ]
    assert "34  read" in out


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["train.jsonl", "rows.jsonl"])
def test_an_output_folder_that_contains_the_source_is_refused(data, write_rows, tmp_path, name):
    (tmp_path / "out").mkdir()
    shutil.move(write_rows(ROWS), tmp_path / "out" / name)
    before = snapshot(tmp_path)
    code, _, err = data(tmp_path / "out" / name)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "overlap" in err
    assert snapshot(tmp_path) == before


def test_rows_that_the_command_wrote_are_not_replaced_by_what_is_made_of_them(data, write_rows, tmp_path):
    data(write_rows(ROWS))
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "out" / "train.jsonl")
    before = snapshot(tmp_path)
    for source in ("out", "out/train.jsonl", "link.jsonl"):
        assert data(tmp_path / source)[0] == 2
    assert snapshot(tmp_path) == before


def test_an_output_folder_inside_the_source_is_refused(data, write_rows, tmp_path):
    """It would be read as data the next time."""
    write_rows(ROWS)
    code, _, err = data(tmp_path)
    assert code == 2
    assert "overlap" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("foreign", ["train.jsonl", "notes.txt", ".DS_Store"])
def test_an_output_folder_with_other_files_is_refused(data, write_rows, tmp_path, foreign):
    source = write_rows(ROWS)
    if foreign != "train.jsonl":  # beside files of the command
        data(source)
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / foreign).write_text("mine")
    before = snapshot(tmp_path)
    code, _, err = data(source)
    assert (code, len(err.splitlines())) == (2, 1)
    assert foreign in err
    assert snapshot(tmp_path) == before


def test_a_linked_output_folder_stays_a_link(data, write_rows, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    assert data(write_rows(ROWS))[0] == 0
    assert (tmp_path / "out").is_symlink()
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == sorted(FILES)


def test_stopped_at_any_file_it_leaves_the_old_output(data, write_rows, tmp_path, monkeypatch):
    """The other rows have another split, so old and new files together would train on held-out rows."""
    data(write_rows(ROWS), "--data-seed", "1")
    before = snapshot(tmp_path / "out")
    source = write_rows(ROWS[::-1])
    for last in range(len(FILES)):
        written, real = iter(range(last)), os.replace

        def stop(*args, written=written, real=real):
            if next(written, None) is None:
                raise KeyboardInterrupt
            real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", stop)
            assert data(source)[0] == 130
        assert snapshot(tmp_path / "out") == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows.jsonl"]
    data(source)
    assert snapshot(tmp_path / "out") != before
    train, heldout, _ = parts(tmp_path / "out")
    assert not {row["instruction"] for row in train} & {row["instruction"] for row in heldout}


def test_no_row_of_the_sample_data_is_dropped(data):
    code, out, _ = data(sources.sample_data(), "--max-tokens", "4000")
    assert code == 0
    assert "dropped" not in out
