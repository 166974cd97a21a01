"""Time and memory under load: many runs, rows, answers and steps, each case in a process of its own.

usage: python benchmarks/load.py [CASE ...] [--json]

Cases: compare (200 runs), interval (10,000 rows), answers (10,000 answers), live (100,000 steps), start (1 and 2,000
runs beside), data (25,000 and 100,000 rows), stream (20 steps on 10,000 and on 1,000,000 rows). Run folders and rows
are synthetic, written before the clock starts. A process is measured from outside: its wall time, its CPU time and its
peak resident memory, without that of processes that it starts.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qlora_helpers import files

RUNS, BESIDE = 200, (1, 2_000)
ROWS, HELD_OUT, GENERAL, ANSWERS = (25_000, 100_000), 100, 48, 20
STREAMED, READ, TRAINED = (10_000, 1_000_000), (10_000, 100_000), 80  # rows of a file, read in a loop, trained on
STEPS, SECONDS_PER_STEP, WATCHED = 100_000, 0.1, 5_000  # the live figure is watched over the last steps
MANY = 10_000  # rows of one interval, and answers
GOALS = {
    "compare": "20 s, 300 MB",
    "interval": "200 MB",
    "answers": "200 MB",
    "live": "2% of the time",
    "start": "no difference",
    "data": "60 s for 100,000",
    "stream": "200 MB more than with 10,000",
}
Result = tuple[str, float, float, float, str]  # case, seconds, CPU seconds, peak MB, and what else was measured


class Writer:
    """Synthetic prose: words of a vocabulary with Zipf's frequencies, in sentences."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        letters = random.Random(0)
        ends = ("a", "e", "i", "o", "u", "an", "er", "in", "ost", "all", "eck", "und", "ish", "ow", "ea", "ight")
        syllables = [a + b for a in ("", *"bcdfghklmnprstvw", "st", "ch", "br", "pl") for b in ends]
        self.words = ["".join(letters.choices(syllables, k=letters.choice((1, 2, 2, 3, 3, 4)))) for _ in range(30000)]
        self.weights = [1 / (rank + 3) for rank in range(len(self.words))]

    def text(self, least: int, most: int) -> str:
        """Return `least` to `most` words as sentences."""
        words = self.rng.choices(self.words, self.weights, k=self.rng.randint(least, most))
        sentences = []
        while words:
            size = self.rng.randint(6, 18)
            sentences.append(" ".join(words[:size]).capitalize() + self.rng.choice((".", ".", ".", "!", "?")))
            words = words[size:]
        return " ".join(sentences)


def write_rows(path: Path, number: int) -> None:
    """Write instruction rows: most of their own, one in ten an edited copy, one in five in a common frame."""
    writer, rows = Writer(1), []
    frame = writer.text(30, 30)
    for i in range(number):
        if i % 10 == 9:
            row = dict(writer.rng.choice(rows))
            row["output"] = row["output"].replace(".", "!", 1)
        else:
            question = writer.text(8, 40)
            row = {"instruction": f"{frame} {question}" if i % 5 == 4 else question, "output": writer.text(30, 160)}
        rows.append(row)
    files.write_jsonl(path, rows)


def write_stream(path: Path, number: int) -> None:
    """Write rows of five sentences, 320 MB for 1,000,000 rows, and beside them a tiny model that trains on them."""
    writer = Writer(1)
    pool = [writer.text(6, 6) for _ in range(5000)]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(number):
            a, b, *answer = writer.rng.choices(pool, k=5)
            file.write(json.dumps({"instruction": f"{a} {b}", "output": " ".join(answer)}) + "\n")
    from transformers import LlamaConfig, LlamaForCausalLM

    from qlora_helpers.config import Config
    from qlora_helpers.models import hub

    tokenizer = hub.load_tokenizer(Config.from_params(profile="cpu"))
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(shape).save_pretrained(path.parent / "tiny")
    tokenizer.save_pretrained(path.parent / "tiny")


def _losses(rng: random.Random, number: int, level: float) -> list[dict[str, Any]]:
    sizes = random.Random(number)  # the same rows for every model
    rows = [(sizes.randint(20, 250), sizes.gauss(0, 0.3)) for _ in range(number)]
    return [
        {
            "id": f"row{i}",
            "loss_sum": n * (2 + own + level + rng.gauss(0, 0.1)),
            "tokens": n,
            "bytes": 4 * n,
            "group": "",
        }
        for i, (n, own) in enumerate(rows)
    ]


def _answers(seed: int, number: int, least: int = 30, most: int = 120) -> list[dict[str, Any]]:
    asked, answered = Writer(0), Writer(seed)
    return [
        {"prompt": f"{i} {asked.text(10, 20)}", "reference": asked.text(least, most), "thought": "",
         "answer": answered.text(least, most), "stopped": True, "invented": False, "tokens": 100}
        for i in range(number)
    ]  # fmt: skip


def write_runs(folder: Path, number: int) -> None:
    """Write finished runs of as many recipes, and the five forms of their base model."""
    from qlora_helpers.config import Config

    rivals = {"base": "b0", "base, own template": "b1", "base, 16 bits": "b2", "base, 16 bits, own template": "b3"}
    for i, name in enumerate([*rivals.values(), "b0/few_shot"]):
        files.write_jsonl(folder / name / "heldout_losses.jsonl", _losses(random.Random(i), HELD_OUT, 0.2))
    files.write_jsonl(folder / "b0" / "general_losses.jsonl", _losses(random.Random(9), GENERAL, 0.0))
    files.write_jsonl(folder / "b0" / "answers.jsonl", _answers(9, ANSWERS))
    for i in range(number):
        run, rng = folder / f"run{i}", random.Random(100 + i)
        config = Config.from_params(learning_rate=1e-4 + 1e-6 * i)
        data = {"source": "rows", "source_fingerprint": "s", "heldout_fingerprint": "h", "counts": {"train": 100}}
        manifest = {"versions": {"torch": "2"}, "device": {"name": "a CPU", "dtype": "float32", "reason": "none"}}
        manifest |= {"data": data | {"train_ids": [str(n) for n in range(100)]}, "baseline": "b0", "rivals": rivals}
        manifest |= {"model": {"name": "tiny", "revision": None}, "absent_rivals": {}}
        metrics = dict.fromkeys(("train_rows", "steps", "epochs", "train_loss", "seconds", "tokens_per_second"), 1.0)
        lines = [{"step": step, "loss": 2 + rng.random()} for step in range(1, 101)]
        files.write_json(run / "config.json", {"identity": {"config": str(i), "data": "s"}, "config": config.to_dict()})
        files.write_json(run / "manifest.json", manifest)
        files.write_jsonl(run / "heldout_losses.jsonl", _losses(rng, HELD_OUT, -0.001 * i))
        files.write_jsonl(run / "general_losses.jsonl", _losses(rng, GENERAL, 0.0))
        files.write_jsonl(run / "answers.jsonl", _answers(i + 10, ANSWERS))
        files.write_jsonl(run / "log.jsonl", [{"step": 0, "eval_loss": 3.0}, *lines, {"step": 100, "eval_loss": 2.0}])
        files.write_json(run / "metrics.json", metrics | {"peak_memory_gib": 1.0, "seed": 0})


def _apart(what: str, path: Path, number: int) -> None:
    """Write in a process of its own: the memory of this one would count in those that it starts."""
    subprocess.run(
        [sys.executable, str(Path(__file__)), "--child", f"write-{what}", str(path), str(number)], check=True
    )


def measure(case: str, words: list[str], note: Callable[[str], str] = str.strip) -> Result:
    """Run a process and return its time and memory. `note` makes a remark of what it printed."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{case} failed with status {status}")
    seconds = time.perf_counter() - started
    return case, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, note(printed)


def interval() -> None:
    """One interval over many rows."""
    import numpy as np

    from qlora_helpers.evaluation import intervals

    rng = np.random.default_rng(0)
    print(intervals.ratio(rng.normal(size=MANY), rng.integers(1, 200, MANY)).to_dict())


def answers() -> None:
    """All text metrics of many short answers, with their intervals."""
    from qlora_helpers.evaluation import text_metrics

    print(len(text_metrics.text_metrics(_answers(1, MANY, 4, 8))), "metrics")


def live() -> None:
    """Print the share of the time that the live figure takes in the last steps of a long run, after its first draw."""
    from qlora_helpers.runs import RunFolder
    from qlora_helpers.training import callbacks

    spent, virtual = 0.0, 0.0  # seconds of drawing, and of the steps, which are not waited for
    shown = SimpleNamespace(update=lambda figure: figure._repr_png_())
    sys.modules["IPython.display"] = SimpleNamespace(display=lambda figure, **_: shown)  # type: ignore[assignment]
    callbacks.in_notebook = lambda: True
    callbacks.time = SimpleNamespace(monotonic=lambda: virtual + time.perf_counter())  # type: ignore[assignment]
    rng = random.Random(0)
    history: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        history.append({"step": step, "epoch": step / STEPS, "loss": 2 + rng.random(), "grad_norm": 1.0})
        if step % 1000 == 0:
            history.append({"step": step, "epoch": step / STEPS, "eval_loss": 2 + rng.random()})
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))
        files.write_jsonl(run / "log.jsonl", [{"step": 0, "eval_loss": 3.0}, *history])
        callback = callbacks.LiveLoss(run)
        for step in range(STEPS - WATCHED, STEPS + 1):
            state = SimpleNamespace(log_history=history, global_step=step, max_steps=STEPS + 1)
            began = time.perf_counter()
            callback.on_log(None, state, None)
            if step > STEPS - WATCHED:
                spent += time.perf_counter() - began
            virtual += SECONDS_PER_STEP
    print(f"{spent / (spent + WATCHED * SECONDS_PER_STEP):.1%} of the time")


def start(folder: str) -> None:
    """Choose the folder of a new run whose name is taken, as a notebook does when it starts."""
    from qlora_helpers import runs

    began = time.perf_counter()
    chosen = runs.choose(Path(folder), "run0", {"config": "new", "data": "s"})
    print(f"{1000 * (time.perf_counter() - began):.1f} ms to choose {chosen.name}")


def stream(path: str) -> None:
    """Read rows of a long file as training does, and print how the memory of this process grows."""
    import psutil

    from qlora_helpers.config import Config
    from qlora_helpers.data import cleaning, streaming
    from qlora_helpers.models import hub

    config = Config.from_params(profile="cpu", dataset=path, streaming=True, n_samples=1, epochs=1)
    data: Any = cleaning.prepare(config, hub.load_tokenizer(config))
    rows, mb = data.stream.usable(streaming.Seen()), {}
    for number in range(1, READ[-1] + 1):
        next(rows)
        if number in READ:
            mb[number] = psutil.Process().memory_info().rss / 1e6
    print(f"\n{mb[READ[1]] - mb[READ[0]]:+.0f} MB from row {READ[0]:,} to row {READ[1]:,}")


def results(cases: list[str]) -> Iterator[Result]:
    """Measure the cases, one after another."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "compare" in cases:
            _apart("runs", folder / "runs", RUNS)
            words = ["-m", "qlora_helpers", "compare", *(str(folder / "runs" / f"run{i}") for i in range(RUNS))]
            page = folder / "out" / "report.html"
            words += ["--out", str(page.parent)]
            yield measure("compare", words, lambda _: f"page of {page.stat().st_size / 1e6:.1f} MB")
        own = [str(Path(__file__)), "--child"]
        yield from (measure(case, [*own, case]) for case in ("interval", "answers", "live") if case in cases)
        for number in BESIDE if "start" in cases else ():
            beside = folder / f"beside{number}"
            for i in range(number):
                content = {"identity": {"config": str(i), "data": "s"}, "config": {"setting": "x" * 1000}}
                files.write_json(beside / f"run{i}" / "config.json", content)
                files.write_json(beside / f"run{i}" / "metrics.json", {})
            for when in ("first", "later"):
                yield measure(f"start, {number:,} beside, {when}", [*own, "start", str(beside)])
        for number in ROWS if "data" in cases else ():
            rows = folder / f"rows{number}.jsonl"
            _apart("rows", rows, number)
            words = ["-m", "qlora_helpers", "data", str(rows), "--out", str(folder / f"data{number}")]
            yield measure(f"data, {number:,} rows", [*words, "--max-tokens", "1024"], lambda _: "")
        for number in STREAMED if "stream" in cases else ():
            rows = folder / f"stream{number}.jsonl"
            _apart("stream", rows, number)
            run = folder / f"streamed{number}"
            words = ["-m", "qlora_helpers", "train", "--profile", "cpu", "--dataset", str(rows), "--streaming"]
            words += ["--model", str(folder / "tiny"), "--n-samples", str(TRAINED), "--out", str(run), "--fast", "off"]
            yield measure(f"stream, {number:,} rows", words, lambda _: _of_run(run, rows))  # noqa: B023
        if "stream" in cases:
            yield measure("stream, in a loop", [*own, "stream", str(rows)], lambda printed: printed.splitlines()[-1])


def _of_run(run: Path, rows: Path) -> str:
    steps = json.loads((run / "metrics.json").read_text())["steps"]
    return f"{steps} steps; the file has {rows.stat().st_size / 1e6:.0f} MB"


def main() -> None:
    """Print a table of the cases, or run one of them in this process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", default=list(GOALS), metavar="CASE", help=", ".join(GOALS))
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        case, *given = args.child
        if case.startswith("write-"):
            {"write-runs": write_runs, "write-rows": write_rows, "write-stream": write_stream}[case](
                Path(given[0]), int(given[1])
            )
        else:
            {"interval": interval, "answers": answers, "live": live, "start": start, "stream": stream}[case](*given)
        return
    if args.json:
        keys = ("case", "seconds", "cpu_seconds", "peak_mb", "note")
        print(json.dumps([dict(zip(keys, one, strict=True)) for one in results(args.cases)], indent=1))
        return
    print("| case | seconds | CPU seconds | peak MB | measured | goal |\n|---|---|---|---|---|---|", flush=True)
    for case, seconds, cpu, peak, note in results(args.cases):
        goal = GOALS[case.split(",")[0]]
        print(f"| {case} | {seconds:.1f} | {cpu:.1f} | {peak:.0f} | {note[:60]} | {goal} |", flush=True)


if __name__ == "__main__":
    main()
