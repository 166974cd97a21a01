"""Malformed parameters, data files and run folders as input for the command line's `main`, in one process.

The result must be success, or exit code 2 and a one-line error; never a traceback, a hang or a lost file. The examples
are the same in every test run.
"""

import hashlib
import io
import json
import shutil
import signal

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from qlora_helpers import __main__
from qlora_helpers.experiments import matrix, series
from qlora_helpers.models import hub

SECONDS = 120  # a command that takes longer counts as hanging
FEW_AND_ALL = [15, pytest.param(170, marks=pytest.mark.slow)]  # examples for each of three tests: 510 in total


@pytest.fixture(scope="module")
def trained(config, tokenizer, tmp_path_factory):
    """Two small finished runs and their baseline, trained once and then only read."""
    folder = tmp_path_factory.mktemp("trained")
    configs = {f"exp{n}": config.replace(n_samples=4 * n, n_heldout=4, n_answers=2) for n in (1, 2)}
    matrix.train_missing(matrix.plan_runs(configs, folder))
    for checkpoints in folder.glob("*/checkpoints"):
        shutil.rmtree(checkpoints)
    return folder


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """Run `main(argv)` in its own folder and check the outcome. Returns the exit code.

    Notebooks are not executed, because these tests are about what happens before.
    """
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("QLORA_WORKDIR", raising=False)
    monkeypatch.setattr(series, "execute", lambda *args, **kwargs: None)
    monkeypatch.setattr(hub, "reachable", lambda: False)
    signal.signal(signal.SIGALRM, lambda *args: pytest.fail("it hangs"))

    def run_it(*argv, keep=()):
        before = {path: fingerprint(path) for path in keep}
        capfd.readouterr()
        signal.alarm(SECONDS)
        try:
            code = __main__.main([str(word) for word in argv])
        except SystemExit as end:  # raised by --help and --version
            code = end.code
        finally:
            signal.alarm(0)
        printed = capfd.readouterr()
        errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        assert code in (0, 2), printed.err
        assert "Traceback" not in printed.out + printed.err
        assert len(errors) == (code == 2), printed.err
        assert code == 0 or printed.err.splitlines()[-1] == errors[0]
        assert {path: fingerprint(path) for path in keep} == before
        return code

    return run_it


def fingerprint(path):
    """Hash the content of a file, or of all files in a folder except locks."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    contents = [(str(file), file.read_bytes()) for file in files if file.is_file() and file.name != ".lock"]
    return hashlib.sha256(repr(contents).encode()).hexdigest()


def try_all(number, strategy, check):
    """Run `check` with `number` examples of the strategy."""
    suppressed = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    settings = hypothesis_settings(max_examples=number, suppress_health_check=suppressed)
    settings(given(strategy)(check))()


NUMBERS = ("", " ", "-1", "0", "1", "8", "1e3", "2e-4", "nan", "inf", "10" * 30, "None", "true")
NAMES = ("cpu", "t4", "gpu", "auto", "sample", "python-stdlib", "nobody/nothing", "model", "guanaco", "truncate")
PATHS = ("rows.jsonl", "missing.jsonl", "..", ".", "rows.jsonl/below", "x" * 300)
ODD = ("a\nb", "a\0b", "é🎉", "--", "-", "\x1b[31m")
OPTIONS = (
    "--samples", "--seed", "--seeds", "--out", "--profile", "--epochs", "--dataset", "--model", "--n-heldout",
    "--save-steps", "--max-tokens", "--over-length", "--template", "--near-duplicates", "--data-seed", "--sampels",
)  # fmt: skip
words = st.sampled_from([*NUMBERS, *NAMES, *PATHS, *ODD]) | st.text(st.characters(exclude_characters="/~"), max_size=8)
options = st.sampled_from(OPTIONS)
commands = st.sampled_from(["run", "batch", "data", "compare"]) | words
pairs = st.lists(st.tuples(options, st.lists(words, max_size=3)), max_size=4)


@pytest.mark.parametrize("number", FEW_AND_ALL)
def test_malformed_parameters(command, number, config, tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"question": f"{n * 7919}?", "answer": f"{n * 7907}"}) + "\n" for n in range(40))
    )
    shutil.copytree(config.model, tmp_path / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("must not be lost")
    monkeypatch.chdir(tmp_path)
    base = {"data": ["data", "rows.jsonl"], "compare": ["compare", "out"]}

    def check(drawn):
        name, given_ = drawn
        argv = [
            *base.get(name, [name]),
            "--out",
            "out",
            "--profile",
            "cpu",
            "--model",
            "model",
            "--dataset",
            "rows.jsonl",
        ]
        argv = argv[:4] + (["--model", "model"] if name == "data" else [] if name == "compare" else argv[3:])
        for option, values in given_:
            argv += [option, *values]
        command(*argv, keep=[rows, tmp_path / "model", tmp_path / "out" / "mine.txt"])

    try_all(number, st.tuples(commands, pairs), check)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("x" * 5000),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
columns = st.sampled_from(
    ["text", "messages", "instruction", "input", "output", "prompt", "completion", "question", "answer", "instances"]
) | st.text(max_size=5)
records = st.lists(st.dictionaries(columns, values, max_size=4) | values, max_size=6)


@st.composite
def data_files(draw):
    """A name, and bytes that begin well: good rows, strange rows, and damage."""
    kind = draw(st.sampled_from(["jsonl", "json", "csv", "parquet", "txt", "JSONL", ""]))
    good = [
        {"question": f"Number {n * 7919}?", "answer": f"It is {n * 7907}."} for n in range(draw(st.integers(0, 12)))
    ]
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(good or [{"question": None}]), buffer)
        content = buffer.getvalue()
    elif kind == "csv":
        cells = "\n".join(f'"{row["question"]}","{row["answer"]}"' for row in good)
        content = f"question,answer\n{cells}\n".encode()
    else:
        rows = [*good, *draw(records)]
        text = json.dumps(rows) if kind == "json" else "\n".join(json.dumps(row) for row in rows)
        content = text.encode()
    damage = draw(st.sampled_from(["none", "none", "cut", "replace", "append"]))
    place = draw(st.integers(0, max(len(content) - 1, 0)))
    extra = draw(st.binary(max_size=8))
    if damage == "cut":
        content = content[:place]
    elif damage == "replace":
        content = content[:place] + extra + content[place + len(extra) :]
    elif damage == "append":
        content += extra
    return f"rows.{kind}" if kind else "rows", content


@pytest.mark.parametrize("number", FEW_AND_ALL)
def test_malformed_data_files(command, number, config, tmp_path):
    def check(drawn):
        name, content = drawn
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        file = tmp_path / name
        file.write_bytes(content)
        command("data", file, "--out", tmp_path / "out", "--model", config.model, "--n-heldout", 2, keep=[file])
        file.unlink()

    try_all(number, data_files(), check)


@st.composite
def damages(draw):
    """Draw a file of a run folder, by number, and the damage to it."""
    how = draw(
        st.sampled_from(["missing", "empty", "cut", "replace", "a folder", "other json", "one value", "one value"])
    )
    return draw(st.integers(0, 99)), how, draw(st.integers(0, 10**6)), draw(st.binary(max_size=6)), draw(values)


def spoil(file, how, place, extra, value):
    """Damage the file."""
    content = file.read_bytes()
    place %= max(len(content), 1)
    if how in ("missing", "a folder"):
        file.unlink()
        if how == "a folder":
            file.mkdir()
    elif how == "one value" and file.suffix == ".json" and isinstance(json.loads(content), dict):
        whole = json.loads(content)
        key = sorted(whole)[place % len(whole)]
        whole[key] = value
        file.write_text(json.dumps(whole), "utf-8")
    else:
        changed = {"empty": b"", "cut": content[:place], "other json": json.dumps(value).encode()}
        file.write_bytes(changed.get(how, content[:place] + extra + content[place + len(extra) :]))


@pytest.mark.parametrize("number", [4, FEW_AND_ALL[1]])  # each compares and trains
def test_malformed_run_folders(command, number, trained, tmp_path):
    """Compare two runs of which one file is damaged, then run a batch in their folder."""
    names = sorted(
        str(path.relative_to(trained))
        for path in trained.rglob("*")
        if path.suffix in (".json", ".jsonl") and "adapter" not in path.parts
    )
    config = json.loads((trained / "exp1" / "config.json").read_text("utf-8"))["config"]

    def check(damage):
        which, *rest = damage
        folder = tmp_path / "runs"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(trained, folder)
        spoil(folder / names[which % len(names)], *rest)
        command("compare", folder / "exp1", folder / "exp2", "--out", tmp_path / "out", keep=[folder])
        (folder / "exp1").rename(folder / "n4-seed0")
        words = ["--profile", "cpu", "--model", config["model"], "--samples", 4, "--n-heldout", 4]
        command("batch", *words, "--out", folder, keep=[folder])

    try_all(number, damages(), check)


@pytest.mark.parametrize("damaged", [{}, {"train_rows": 4, "steps": "many"}, {"eval_loss": {}}])
def test_incomplete_or_invalid_metrics_are_an_error(command, trained, tmp_path, damaged):
    folder = shutil.copytree(trained, tmp_path / "runs")
    (folder / "exp2" / "metrics.json").write_text(json.dumps(damaged), "utf-8")
    assert command("compare", folder / "exp1", folder / "exp2", "--out", tmp_path / "out", keep=[folder]) == 2
    assert not (tmp_path / "out").exists()


def test_there_are_500_examples():
    assert 3 * FEW_AND_ALL[1].values[0] >= 500
