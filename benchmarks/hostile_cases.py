"""Cases of `hostile.py`: each function writes files of one kind to the current folder and returns a command for them.

The kinds differ in how they go wrong: grammar, bytes, sizes, values, names, and the machine itself.
"""

import builtins
import bz2
import contextlib
import errno
import fcntl
import gzip
import io
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEEP = 100_000
GOOD = [{"question": f"What is {n * 7919}?", "answer": f"It is number {n * 7907}."} for n in range(12)]
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
LINES = "".join(json.dumps(row) + "\n" for row in GOOD)
CELLS = "question,answer\n" + "".join(f'"{row["question"]}","{row["answer"]}"\n' for row in GOOD)
NUMBERS = ("", "-1", "0", "1e999", "nan", "-inf", "9" * 400, "1" * 5000, "2e-4", "0x10", "١٢", "true", "None")
NAMES = (
    "..",
    ".",
    "~no-such-user/x",
    "x" * 300,
    "a/" * 3000,
    "a\0b",
    "loop",
    "pipe",
    "\udcff",
    "",
    "-",
    "a\nb",
    "/dev/zero",
)
NESTED: Any = ([], {}, [[]], [None], {"a": {"b": []}}, [1, "a", {}])
TEXTS = ("", " ", "x" * 10**5, "\ud800", "a\0b", "\x1b[31m", "1e999", "<|im_start|>", "{{ x }}", "é🎉")
VALUES = (None, True, -1, 0, 10**30, 10**400, float("inf"), float("nan"), 1e308, -(2**63), 2**63, *TEXTS, *NESTED)
SIZES = (10**6, 10**9, 2**31, 10**30, 10**400, 0, -1, 1e308, 3.5)
TEMPLATES = ("{{", "{% for a in b %}", "{{ messages[9].x.y }}", "{{ 1 // 0 }}", "{{ raise_exception('a') }}", "\0")
TEMPLATES += (
    "{{ ''.__class__ }}",
    "{{ 'x' * 10**7 }}",
    "{% include 'a' %}",
    "{{ messages }}",
    "{{ messages | tojson }}",
)
LICENSES = ("mit", "[a, b]", "&a [x, *a]", "2024-02-30", "!!python/name:os.system", "{", "\0", "9" * 5000, "1e999")
FAULTS = ("replace", "mkdir", "flock", "write", "latin-1", "ascii", "closed", "full", "pipe")
CODES = ("ENOSPC", "EROFS", "EIO", "EACCES", "EDQUOT", "EMFILE")
WITHOUT_LOCKS = ("ENOLCK", "ENOTSUP", "EIO", "ENOSYS")
Argv = list[str]


@dataclass
class World:
    """Good inputs to start from: the folder of a tiny model, and one with two finished runs of it, exp1 and exp2."""

    model: Path
    runs: Path


def odd_text(rng: random.Random) -> str:
    """Return a few characters, odd ones among them."""
    return "".join(rng.choice("ab \n\t\0\"'\\{}[],:é🎉\u2028\x1b") for _ in range(rng.randrange(12)))


def changed(rng: random.Random, value: Any) -> Any:
    """Replace, remove, rename or repeat something at a random place of a JSON value."""
    if rng.random() < 0.2 or not value or not isinstance(value, dict | list):
        return rng.choice(VALUES)
    if isinstance(value, list):
        place = rng.randrange(len(value))
        return [*value[:place], changed(rng, value[place]), *value[place + rng.randrange(2) :]]
    key, how = rng.choice(list(value)), rng.randrange(4)
    rest = {name: other for name, other in value.items() if name != key}
    if how == 0:
        return rest
    if how == 1:
        return {**rest, odd_text(rng): value[key]}
    return {**value, key: rng.choice(VALUES) if how == 2 else changed(rng, value[key])}


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Cut, overwrite, insert, repeat or replace bytes."""
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    noise = rng.randbytes(rng.randrange(1, 9))
    inside = content[:a] + noise + content[a + len(noise) :], content[:a] + noise + content[a:]
    moved = content[:a] + content[a:b] * 3 + content[b:], content[:a] + content[b:]
    other = b"", b"\0" * 4096, noise * 50, b"\x7fELF\x02\x01", content.decode("latin-1").encode("utf-16")
    return rng.choice([content[:a], *inside, *moved, rng.choice(other)])


def no_file(rng: random.Random, path: Path) -> None:
    """Make a folder, a pipe or a link that leads nowhere, in a circle or to a device; or leave the path empty."""
    how = rng.randrange(6)
    if how == 0:
        path.mkdir()
    elif how == 1:
        os.mkfifo(path)
    elif how < 5:
        path.symlink_to((path.name, "/dev/zero", "/nonexistent")[how - 2])


def spoil(rng: random.Random, file: Path) -> None:
    """Damage a file as a file, as JSON, or as bytes."""
    content, how = file.read_bytes(), rng.random()
    if how < 0.15:
        file.unlink()
        no_file(rng, file)
    elif how < 0.2 and file.suffix == ".json":
        file.write_text('{"a":' * DEEP)
    elif how < 0.7 and file.suffix == ".json":
        value = json.loads(content)
        for _ in range(rng.randrange(1, 4)):
            value = changed(rng, value)
        file.write_text(json.dumps(value))
    elif how < 0.8 and file.suffix == ".jsonl":
        rows = [changed(rng, json.loads(line)) for line in content.splitlines()]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        file.write_bytes(damaged(rng, content))


def clean(path: str | Path, world: World, *options: str) -> Argv:
    """Return the command that reads a data set."""
    return ["data", str(path), "--out", "out", "--model", str(world.model), "--n-heldout", "2", *options]


def arguments(rng: random.Random, world: World) -> Argv:
    """Options that exist, with words that they do not expect."""
    from qlora_helpers.__main__ import build_parsers

    Path("loop").symlink_to("loop")
    os.mkfifo("pipe")
    Path("rows.jsonl").write_text(LINES)
    argv = rng.choice([clean("rows.jsonl", world), ["plan"], ["compare", "loop", "--out", "out"],
                       ["export", ".", "--out", "out"], ["push", ".", "--to", "a/b"]])  # fmt: skip
    known = [name for name in build_parsers()[1][argv[0]].options if name not in ("-h", "--yes", "--really")]
    if rng.random() < 0.4 and argv[1:]:
        argv[1] = rng.choice(NAMES)
    for _ in range(rng.randrange(1, 4)):
        words = [rng.choice((*NUMBERS, *NAMES, odd_text(rng))) for _ in range(rng.randrange(3))]
        argv += [rng.choice(known), *words]
    return argv


def row_values(rng: random.Random, world: World) -> Argv:
    """Good rows of which some values are odd, as JSON, JSON lines and CSV."""
    rows: list[Any] = [changed(rng, row) if rng.random() < 0.5 else row for row in [*GOOD, CHAT, CHAT]]
    big = rng.choice(["9" * 5000, "1e999", "-1E+99999", "Infinity", "[" * DEEP, '"\\ud800"'])
    texts = {
        "rows.jsonl": "".join(f"{json.dumps(row)}\n" for row in rows) + f'{{"question": {big}, "answer": "a"}}\n',
        "rows.json": json.dumps(changed(rng, {"train": rows, "test": rows[:3]}) if rng.random() < 0.5 else rows),
        "rows.csv": "question,answer\n" + "".join(f'"{odd_text(rng)}","{row}"\n' for row in rows),
    }
    name = rng.choice(list(texts))
    Path(name).write_text(texts[name], "utf-8", "surrogatepass")
    options = [(), ("--template", "auto"), ("--columns", "question=answer,answer=question"), ("--group-by", "answer")]
    return clean(name, world, *rng.choice(options))


def row_bytes(rng: random.Random, world: World) -> Argv:
    """Good files of every format with damaged bytes."""
    import pyarrow
    from pyarrow import parquet

    table = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(GOOD), table)
    text, cells = LINES.encode(), CELLS.encode()
    good = {".jsonl": text, ".json": json.dumps(GOOD).encode(), ".csv": cells, ".tsv": cells}
    good |= {".jsonl.gz": gzip.compress(text), ".csv.bz2": bz2.compress(cells), ".parquet": table.getvalue()}
    kind = rng.choice([*good, ".parquet"])
    Path(f"rows{kind}").write_bytes(damaged(rng, good[kind]))
    return clean(f"rows{kind}", world)


def bombs(rng: random.Random, world: World) -> Argv:
    """Small files that unpack to a gigabyte or more."""
    import pyarrow
    from pyarrow import parquet

    if rng.random() < 0.5:
        part = rng.choice([b" ", b"[", b'{"a": 1}\n', b"a,b\n"])
        pack, kind = rng.choice([(gzip.compress, "gz"), (bz2.compress, "bz2")])
        name = f"rows.{rng.choice(['jsonl', 'json', 'csv'])}.{kind}"
        Path(name).write_bytes(pack(part * (2**24 // len(part))) * 80)  # a series of packed parts is one file
        return clean(name, world)
    text = "x" * rng.choice([10**5, 10**6, 10**7])
    ids = pyarrow.array([0] * (6 * 10**9 // len(text)), pyarrow.int32())
    column = rng.choice([pyarrow.DictionaryArray.from_arrays(ids, [text]), pyarrow.nulls(3 * 10**7)])
    parquet.write_table(pyarrow.table({"text": column}), "rows.parquet", compression="zstd")
    return clean("rows.parquet", world)


def parquet_values(rng: random.Random, world: World) -> Argv:
    """Values that Parquet can hold and Python cannot, and types that no row has."""
    import pyarrow as pa
    from pyarrow import parquet

    far = [rng.choice([2**62, -(2**62), 10**15, -1])] * 4
    ends, raw = (pa.py_buffer(content) for content in (bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0]), b"\xff\xfe"))
    columns = [pa.array(far, pa.timestamp(unit, zone)) for unit in ("s", "ms", "us", "ns") for zone in (None, "Mars/X")]
    columns += [pa.array(far, kind) for kind in (pa.duration("s"), pa.time64("ns"), pa.date64(), pa.int64())]
    columns += [
        pa.array([10**9, -(10**9)] * 2, pa.date32()),
        pa.array([b"\xff"] * 4),
        pa.array([1.5, float("nan")] * 2),
    ]
    columns += [pa.concat_arrays([pa.Array.from_buffers(pa.string(), 2, [None, ends, raw])] * 2), pa.nulls(4)]
    columns += [pa.array([[("a", 1)]] * 4, pa.map_(pa.string(), pa.int64())), pa.array([{"a": None}] * 4)]
    names = rng.sample(["question", "answer", "input", "messages", "text", "system", "tools", "", "a\nb"], 4)
    table = pa.table([rng.choice([*columns, *[pa.array(["a", "b", "c", "d"])] * 5]) for _ in names], names=names)
    with contextlib.suppress(pa.ArrowException):
        parquet.write_table(table, "rows.parquet")
    return clean("rows.parquet", world, *rng.choice([(), ("--group-by", names[0])]))


def folders(rng: random.Random, world: World) -> Argv:
    """Folders with links in circles, pipes, odd names, and halves of saved data sets."""
    where = Path("rows") / rng.choice(["", "train", "x" * 200, "a\nb", "é🎉", "..test", "\udcff"])
    where.mkdir(parents=True)
    (where / rng.choice(["train.jsonl", "test.jsonl", "a\x1b.jsonl", "validation.json"])).write_text(LINES)
    names = ["b.jsonl", "c.parquet", "d.json.gz", "state.json", "dataset_dict.json", "dataset_info.json"]
    for name in rng.sample(names, rng.randrange(1, 4)):
        if rng.random() < 0.4:
            contents = b"{}", b'{"splits": ["train", 1]}', damaged(rng, LINES.encode())
            (where / name).write_bytes(rng.choice(contents))
        else:
            no_file(rng, where / name)
    options = [(), ("--split", "test"), ("--subset", rng.choice(NAMES[:6]))]
    return clean(rng.choice([Path("rows"), where]), world, *rng.choice(options))


def configs(rng: random.Random, world: World) -> Argv:
    """Configs of models with odd values, and with sizes that no model has."""
    from qlora_helpers.planning import architectures

    known = [architectures.known(name) for name in architectures.known_models()]
    config = rng.choice([json.loads((world.model / "config.json").read_text()), rng.choice(known)])
    for _ in range(rng.randrange(1, 3)):
        if rng.random() < 0.5:
            config |= {rng.choice([key for key, value in config.items() if isinstance(value, int)]): rng.choice(SIZES)}
        else:
            config = changed(rng, config)
            if not isinstance(config, dict):
                break
    Path("config.json").write_text(json.dumps(config))
    if rng.random() < 0.2:
        spoil(rng, Path("config.json"))
    return ["plan", "--model", rng.choice(["config.json", "."]), *rng.choice([[], ["--memory", "16"], ["--json"]])]


def tokenizers(rng: random.Random, world: World) -> Argv:
    """Model folders with a damaged tokenizer, chat template or config."""
    model = shutil.copytree(world.model, Path("model"))
    Path("rows.jsonl").write_text(LINES)
    file = rng.choice([path for path in sorted(model.iterdir()) if path.suffix in (".json", ".jinja")])
    if file.suffix == ".jinja" and rng.random() < 0.7:
        file.write_text(rng.choice(TEMPLATES))
    else:
        spoil(rng, file)
    return clean("rows.jsonl", World(model, world.runs), "--template", rng.choice(["auto", "guanaco"]))


def run_files(rng: random.Random, world: World) -> Argv:
    """Damaged files of finished runs and of what was measured on their base model."""
    runs = shutil.copytree(world.runs, Path("runs"))
    files = [p for p in sorted(runs.rglob("*")) if p.suffix in (".json", ".jsonl") and "adapter" not in p.parts]
    for file in rng.sample(files, rng.randrange(1, 3)):
        spoil(rng, file)
    if rng.random() < 0.2:
        return ["plan", "--detect", "0.1", "--pilot", "runs/exp1", "runs/exp2"]
    return ["compare", "runs/exp1", "runs/exp2", "--out", "out"]


def exports(rng: random.Random, world: World) -> Argv:
    """A run to merge or to push, with damage in its files, its adapter or its base model."""
    run = shutil.copytree(world.runs / "exp1", Path("run"))
    base = shutil.copytree(world.model, Path("base"))
    config = json.loads((run / "config.json").read_text())
    config["config"]["model"] = "base"
    (run / "config.json").write_text(json.dumps(config))
    (base / "README.md").write_text(f"---\nlicense: {rng.choice(LICENSES)}\n---\n")
    if rng.random() < 0.2:  # each line holds the one before nine times
        lines = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)]
        (base / "README.md").write_text(f"---\na0: &a0 x\n{''.join(lines)}license: *a11\n---\n")
    if rng.random() < 0.9:
        spoil(rng, rng.choice([path for path in sorted([*run.rglob("*"), *base.iterdir()]) if path.is_file()]))
    return rng.choice([["push", "run", "--to", "a/b"], ["export", "run", "--out", "shipped"]])


def machine(rng: random.Random, world: World) -> Argv:
    """Good files on a bad machine: a system call fails, or output is closed, full or in an encoding that lacks much."""
    Path("rows.jsonl").write_text(LINES.replace("What", "Wés🎉"))
    shutil.copytree(world.runs, "runs")
    fault = rng.choice(FAULTS)
    if fault in ("latin-1", "ascii"):
        sys.stdout = open(1, "w", encoding=fault, closefd=False)  # noqa: SIM115
    elif fault == "closed":
        os.close(1)
        sys.stdout = None  # type: ignore[assignment]
    elif fault == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    elif fault == "pipe":
        read, write = os.pipe()
        os.dup2(write, 1)
        os.close(read)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    else:
        fail_later(rng, fault)
    shipped = ["export", "runs/exp1", "--out", "shipped"], ["push", "runs/exp1", "--to", "a/b"]
    compared = ["compare", "runs/exp1", "runs/exp2", "--out", "out"]
    return rng.choice([clean("rows.jsonl", world), compared, ["plan", "--json"], *shipped])


def fail_later(rng: random.Random, name: str) -> None:
    """Let a system function fail from its n-th call on. `write` stands for opening files to write."""
    code = getattr(errno, rng.choice(WITHOUT_LOCKS if name == "flock" else CODES))
    calls = iter(range(rng.choice([0, 0, 1, 2, 5, 10])))
    module: Any = fcntl if name == "flock" else os
    real: Any = io.open if name == "write" else getattr(module, name)

    def fail(*args: Any, **kwargs: Any) -> Any:
        reads = name == "write" and not set("wax+") & set(str(kwargs.get("mode", (*args, "r", "r")[1])))
        if not reads and next(calls, None) is None:
            raise OSError(code, os.strerror(code), str(args[0]))
        return real(*args, **kwargs)

    if name == "write":
        builtins.open = io.open = fail
    else:
        setattr(module, name, fail)


SHARES: dict[Callable[[random.Random, World], Argv], int] = {  # of the cases of each kind
    arguments: 4, row_values: 4, row_bytes: 4, bombs: 1, parquet_values: 2, folders: 3, configs: 4, tokenizers: 4,
    run_files: 4, exports: 4, machine: 3,
}  # fmt: skip
EVERY = [kind for kind, share in SHARES.items() for _ in range(share)]


def kind_of(seed: int) -> Callable[[random.Random, World], Argv]:
    """Return the function that makes the case of a seed."""
    return EVERY[seed % len(EVERY)]
