"""Whatever file is given, the answer is success or one line; errors of our own stay errors of our own."""

import errno
import fcntl
import gzip
import json
import os
import shutil
import sys

import pytest
from filelock import Timeout
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qlora_helpers import __main__, errors, files, locks, parse
from qlora_helpers.errors import UserError, blame
from qlora_helpers.evaluation import model_card
from qlora_helpers.files import ROOT
from qlora_helpers.models import bundled, hub, qlora
from qlora_helpers.planning import architectures
from qlora_helpers.runs import RunFolder

sys.path.insert(0, str(ROOT / "benchmarks"))
import hostile


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return hostile.make_world(tmp_path_factory.mktemp("world"))


FEW = (0, 4, 8, 12, 13, 14, 15, 18, 22, 26, 30, 34, 35, 50, 61)  # each kind, and cases that failed once


@pytest.mark.parametrize("seeds", [FEW, pytest.param(range(62, 500), marks=pytest.mark.slow)])
def test_hostile_input_ends_in_success_or_one_line(world, seeds):
    """`benchmarks/hostile.py` runs 2,000 of these cases."""
    problems = [(outcome.seed, outcome.problem) for outcome in hostile.run(seeds, world) if outcome.problem]
    assert problems == []


@pytest.fixture
def message(tmp_path):
    """Run a function that must raise `UserError`, and return its one line."""

    def of(function, *args):
        with pytest.raises(UserError) as caught:
            function(*args)
        assert "Fix: " in str(caught.value)
        return str(caught.value)

    return of


def logged(line):
    """The content of the log that a line names."""
    return open(line.rstrip().rpartition("Details: ")[2]).read()


# The boundary


def test_an_error_of_our_own_is_no_error_of_a_file(monkeypatch, capsys, tmp_path):
    """Even while a file is given; the traceback is in the log."""
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    monkeypatch.setattr(hub, "load_tokenizer", lambda config: hub.is_local(config) + {}["our mistake"])
    assert __main__.main(["data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("internal error: KeyError: 'our mistake'. This is a bug. Fix: ")
    assert "in _data\n" in logged(line)


def test_a_library_that_fails_on_a_given_file_names_it(monkeypatch, capsys, tmp_path):
    folder = tmp_path / "a run"
    folder.mkdir()
    monkeypatch.setattr(__main__, "_of_runs", lambda *folders: __main__.errors.contextlib.nullcontext())
    monkeypatch.setattr("qlora_helpers.export.push.prepare", lambda *args: json.loads("{"))
    assert __main__.main(["push", str(folder), "--to", "a/b"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: input: {folder} cannot be used (JSONDecodeError: ")
    assert "json/decoder.py" in logged(line)
    errors.given.clear()
    assert errors.explain(json.JSONDecodeError("x", "", 0)) is None


@pytest.mark.parametrize("bug", errors.BUGS)
def test_a_mistake_in_our_program_is_not_blamed_on_a_file(bug):
    ours = {"bug": bug}
    exec(compile("def fail():\n raise bug", errors.__file__, "exec"), ours)
    with pytest.raises(bug), blame("model", "folder"):
        ours["fail"]()
    with pytest.raises(UserError), blame("model", "folder"):
        raise bug("of a library")


@pytest.mark.parametrize("passes", [KeyboardInterrupt(), SystemExit(3), OSError(errno.ENOSPC, "full"), MemoryError()])
def test_interrupts_and_errors_of_the_machine_are_not_blamed_on_a_file(passes):
    with pytest.raises(type(passes)), blame("model", "folder"):
        raise passes


def test_a_panic_of_a_library_in_rust_is_blamed_on_its_file():
    panic = type("PanicException", (BaseException,), {})
    says = r"folder cannot be used \(PanicException: index out of bounds\)"
    with pytest.raises(UserError, match=says), blame("model", "folder"):
        raise panic("index out of bounds")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "disk: /x/y is full. Fix: free some space"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "disk: it is full"),
        (MemoryError(), "memory: there is not enough (MemoryError)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "memory: there is not enough"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "file: /x cannot be used (Permission denied)"),
        (OverflowError("int too large to convert to float"), "settings: a number is too large"),
    ],
)
def test_errors_of_the_machine_are_one_line(error, line):
    errors.given.clear()
    assert str(errors.explain(error)).startswith(line)


def test_a_reason_is_short_and_one_line():
    assert len(errors.reason(ValueError("word\n" * 10_000))) < 330
    assert "\n" not in errors.reason(ValueError("word\n" * 10_000))


def test_a_log_that_cannot_be_written_is_not_named(monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/nonexistent")
    assert errors.internal(KeyError("x")).endswith("Fix: report it with its log.")


def test_a_notebook_shows_one_line_for_a_file_and_the_traceback_for_its_own_cell(kernel, tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    kernel("from qlora_helpers.data import readers\nfrom pathlib import Path")
    shown = [m["content"] for m in kernel(f"list(readers.read(Path({str(tmp_path / 'rows.parquet')!r}))[''])")]
    (error,) = [content for content in shown if "traceback" in content and "status" not in content]
    assert error["ename"] == "UserError"
    assert error["traceback"] == [f"UserError: {error['evalue']}"]
    assert error["evalue"].startswith(f"dataset: {tmp_path / 'rows.parquet'} cannot be used (ArrowInvalid: ")
    assert "pyarrow" in logged(error["evalue"])
    (own,) = [m["content"] for m in kernel("1 / 0") if "traceback" in m["content"] and "status" not in m["content"]]
    assert own["ename"] == "ZeroDivisionError"
    assert len(own["traceback"]) > 1


# Paths and files


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "a/" * 3000, "~no-such-user/x", "loop"])
def test_a_path_where_no_file_can_be_is_one_line(message, tmp_path, monkeypatch, name):
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    assert message(parse.path, name, "dataset").startswith("dataset: '")
    assert message(architectures.load, name).startswith("model: '")
    for words in (["data", name, "--out", "out"], ["export", name, "--out", "out"], ["plan", "--model", name]):
        assert __main__.main(words) == 2


@pytest.mark.parametrize("kind", ["pipe", "zero", "folder", "nothing"])
def test_what_is_no_file_is_not_read(message, tmp_path, kind):
    """Reading a pipe would wait for ever, and reading a device would never end."""
    file = tmp_path / "config.json"
    {"pipe": lambda: os.mkfifo(file), "zero": lambda: file.symlink_to("/dev/zero"), "folder": file.mkdir}.get(
        kind, lambda: None
    )()
    said = "does not exist" if kind == "nothing" else "is not a file"
    assert said in message(parse.json_object, file, "config")
    if kind in ("pipe", "zero"):
        assert "is not a file" in message(parse.model_folder, tmp_path, False)


@given(st.binary(max_size=200) | st.text(max_size=50).map(str.encode))
@settings(max_examples=30)
def test_any_bytes_are_an_object_or_one_line(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_bytes(content)
    for read in (
        lambda: parse.json_object(file, "file"),
        lambda: parse.header(file, "a"),
        lambda: parse.weights_header(file),
    ):
        answer = ""
        try:
            assert isinstance(read(), dict)
        except UserError as error:
            answer = str(error)
        assert not answer or str(file) in answer


@pytest.mark.parametrize("text", ["[1]", "{", '{"a":' * 100_000, '{"a": ' + "9" * 5000 + "}", "\ufeff{}"])
def test_json_that_cannot_be_used_is_one_line(message, tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    assert message(parse.json_object, tmp_path / "a.json", "config").startswith(f"config: {tmp_path / 'a.json'} cannot")


def test_a_file_beyond_the_limit_is_not_read(message, tmp_path):
    (tmp_path / "a.json").write_bytes(b" " * (2**20 + 1))
    assert "has more than 1 MiB" in message(parse.text, tmp_path / "a.json", "config", 2**20)


# Data sets


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz", "rows.csv.gz"])
def test_a_small_file_that_unpacks_to_gigabytes_is_refused_on_the_way(message, tmp_path, monkeypatch, name):
    monkeypatch.setattr(parse, "SMALL", 2**20)
    (tmp_path / name).write_bytes(gzip.compress(b" " * 2**22))
    from qlora_helpers.data import readers

    line = message(lambda: [list(rows) for rows in readers.read(tmp_path / name).values()])
    assert "unpacks to more than 1 MiB" in line


@pytest.mark.parametrize("repeated", [True, False])
def test_a_parquet_file_that_unpacks_to_gigabytes_is_refused(message, tmp_path, monkeypatch, repeated):
    """What one value takes is declared once, however often it is repeated."""
    import pyarrow as pa
    from pyarrow import parquet

    monkeypatch.setattr(parse, "SMALL", 2**22)
    file, text = tmp_path / "rows.parquet", "x" * 10**4
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), [text]) if repeated else [text] * 500
    parquet.write_table(pa.table({"text": column}), file, compression="zstd", use_dictionary=repeated)
    assert file.stat().st_size < 2**12
    taken = []
    line = message(lambda: taken.extend(parse.parquet_rows(file, "dataset")))
    assert "unpacks to more than 4 MiB" in line
    assert len(taken) <= (500 if repeated else 0)


def test_rows_of_no_columns_are_counted_too(message, tmp_path, monkeypatch):
    import pyarrow as pa
    from pyarrow import parquet

    monkeypatch.setattr(parse, "SMALL", 2**20)
    parquet.write_table(pa.table({"a": pa.nulls(10**6)}), tmp_path / "rows.parquet")
    assert "unpacks to more" in message(lambda: list(parse.parquet_rows(tmp_path / "rows.parquet", "dataset")))


# Models


@pytest.fixture
def model(config, tmp_path):
    """A copy of the tiny model, to be broken, and its config."""
    return config.replace(model=str(shutil.copytree(config.model, tmp_path / "model"))), tmp_path / "model"


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_labels", "num_local_experts"])
def test_a_config_of_a_million_parts_is_refused_before_a_library_makes_them(message, model, key):
    config, folder = model
    change(folder / "config.json", **{key: 10**6})
    for read in (hub.load_tokenizer, lambda config: architectures.load(config.model)):
        assert f"has {key} = 1000000, more than 4,096" in message(read, config)


def test_layers_without_weights_are_refused(message, model, device):
    config, folder = model
    change(folder / "config.json", num_hidden_layers=1000)
    assert "has 1000 layers in its config.json, but 21 tensors" in message(qlora.load_base, config, device)


def cut_off(file):
    file.write_bytes(file.read_bytes()[:-10])


def without_a_tensor(file):
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})


def of_zeros(file):
    file.write_bytes(bytes(file.stat().st_size))


def with_a_wrong_shape(file):
    content = file.read_bytes()
    assert b'"shape":[128,64]' in content
    file.write_bytes(content.replace(b'"shape":[128,64]', b'"shape":[128,65]', 1))


@pytest.mark.parametrize("damage", [cut_off, without_a_tensor, of_zeros, with_a_wrong_shape])
def test_weights_that_are_not_whole_are_one_line(message, model, device, damage):
    """The library would fill a missing tensor with random numbers."""
    config, folder = model
    damage(folder / "model.safetensors")
    line = message(qlora.load_base, config, device)
    assert line.startswith("model: ")
    assert str(folder) in line
    if damage is without_a_tensor:
        assert "lack model.layers.1.mlp.up_proj.weight (1 missing)" in line


@pytest.mark.parametrize("damage", [cut_off, of_zeros, with_a_wrong_shape])
def test_a_damaged_header_of_weights_is_refused_before_a_tensor_is_read(message, model, damage):
    file = model[1] / "model.safetensors"
    damage(file)
    assert message(parse.weights_header, file).startswith(f"model: {file} cannot be used (SafetensorError")


def test_ids_and_positions_without_an_embedding_are_one_line(message, config, device, tmp_path, tokenizer):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=64, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    base = qlora.load_base(config.replace(model=str(tmp_path), quantization="none"), device)
    base(torch.zeros(1, 16, dtype=torch.long))
    assert f"{tmp_path} has 50 embeddings, but its tokenizer writes token 50" in message(base, torch.tensor([[0, 50]]))
    assert "has 16 positions, fewer than a row" in message(base, torch.zeros(1, 17, dtype=torch.long))


def test_a_whole_model_passes_and_its_header_is_read(config, device):
    from pathlib import Path

    parse.model_folder(Path(config.model), weights=True)
    entries = parse.weights_header(Path(config.model) / "model.safetensors")
    assert len(entries) == 21
    assert entries["model.embed_tokens.weight"]["shape"] == [1000, 64]


# What decorates a result


def bomb():
    lines = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)]
    return f"---\na0: &a0 x\n{''.join(lines)}license: *a11\n---\n"


HEADERS = [
    "license: [a, b]",
    "license: 2024-02-30",
    "license: {",
    "\0",
    "[]",
    "license: &a [*a]",
    "license: " + "[" * 10**4,
]


@pytest.mark.parametrize("header", [bomb(), *(f"---\n{line}\n---\n" for line in HEADERS), "---\n" + "\n" * 10**5])
def test_an_odd_model_card_of_the_base_costs_its_license_alone(make_run, model_folder, tmp_path, header):
    base = shutil.copytree(model_folder, tmp_path / "base")
    (base / "README.md").write_text(header)
    run = make_run(base)
    card = model_card.render(run, run.config(), run.read("metrics.json"))
    assert "which could not be read where this card was written" in card
    assert "## Results" in card


def test_a_card_that_cannot_be_written_does_not_lose_the_run(make_run, capsys):
    run = make_run()
    files.write_json(run / "manifest.json", {})
    card = model_card.render(run, run.config(), run.read("metrics.json"))
    assert "This card is a short one" in card
    assert card.startswith("---\nlibrary_name: peft\n---\n")
    assert "The model card is a short one: KeyError: 'data'" in capsys.readouterr().out


# The machine


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.EIO, errno.ENOSYS])
def test_a_file_system_without_locks_is_a_line_and_no_end(monkeypatch, tmp_path, capsys, code):
    def flock(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locks.hold(tmp_path / "a.lock", timeout=0):
        pass
    assert f"{tmp_path} is on a file system without locks" in capsys.readouterr().out or code == errno.ENOSYS


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.EIO])
def test_a_folder_is_built_on_a_file_system_without_locks_and_no_other_is_cleared(monkeypatch, tmp_path, code):
    def flock(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    other = tmp_path / f".out-0{files.PART}"
    other.mkdir()
    (other / files.LOCK).touch()
    with files.building(tmp_path / "out") as built:
        (built / "a").write_text("a")
    assert (tmp_path / "out" / "a").read_text() == "a"
    assert other.exists()


def test_a_lock_that_another_process_holds_is_waited_for_no_longer_than_asked(tmp_path):
    with locks.hold(tmp_path / "a.lock"), pytest.raises(Timeout), locks.hold(tmp_path / "a.lock", timeout=0):
        pass


def test_a_model_in_a_cache_that_cannot_be_written_is_used(monkeypatch, tmp_path):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    folder = files.cache_folder() / "smollm2-135m-instruct"
    folder.mkdir(parents=True)
    (folder / bundled.CHECKSUMS).write_text("{}")

    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("os.mkdir", read_only)
    monkeypatch.setattr("os.open", read_only)
    assert bundled.fetch() == folder


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_output_in_another_encoding_escapes_what_it_lacks(monkeypatch, tmp_path, encoding):
    with (tmp_path / "out").open("w", encoding=encoding) as out:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setitem(__main__.COMMANDS, "fetch", __main__.COMMANDS["fetch"]._replace(run=lambda: print("… 🎉")))
        assert __main__.main(["fetch"]) == 0
    assert (tmp_path / "out").read_text() == "\\u2026 \\U0001f389\n"


def test_a_reader_that_ends_early_is_no_error(monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setitem(__main__.COMMANDS, "fetch", __main__.COMMANDS["fetch"]._replace(run=lambda: print("a")))
    with os.fdopen(write, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert __main__.main(["fetch"]) == 141
    assert capsys.readouterr().err == ""


def test_a_run_without_its_folder_is_one_line(message, tmp_path):
    assert "has no config.json" in message(RunFolder(tmp_path).config)


def test_a_killed_kernel_is_a_run_that_failed_and_no_end_of_the_batch(monkeypatch, tmp_path, capsys):
    from nbclient.exceptions import DeadKernelError

    from qlora_helpers.experiments import series

    def killed(*args, **kwargs):
        raise DeadKernelError("Kernel died")

    monkeypatch.setattr("papermill.execute_notebook", killed)
    with pytest.raises(UserError, match="its process was killed, most likely because the machine ran out of memory"):
        series.execute("05_train_exp1", tmp_path / "a.ipynb", {}, "one")
