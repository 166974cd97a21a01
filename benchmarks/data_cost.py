"""Time and memory of cleaning rows, from 10,000 to 1,000,000: is the cost per row constant?

usage: python benchmarks/data_cost.py [FILE] [--sizes 10000 100000 1000000]

The rows of FILE (JSON lines; default: Python documentation) are multiplied by light edits, so that most are near
duplicates, and then cleaned by `python -m qlora_helpers data`, each size in a separate process. The start-up time is
measured with 30 rows and subtracted.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qlora_helpers.data import python_docs
from qlora_helpers.files import write_jsonl


def grow(rows: list[dict[str, str]], size: int) -> list[dict[str, str]]:
    """Return `size` rows: the given ones, then copies with one changed word, capitals or other punctuation."""
    rng = random.Random(0)
    grown = rows[:size]
    while len(grown) < size:
        row = rng.choice(rows)
        words = row["instruction"].split()
        words[rng.randrange(len(words))] = rng.choice(("harbour", "violin", "copper", "lantern"))
        edits = (" ".join(words), row["instruction"].upper(), row["instruction"].rstrip("?.") + " !")
        grown.append({**row, "instruction": rng.choice(edits)})
    return grown


def measure(rows: list[dict[str, str]], folder: Path) -> tuple[float, float]:
    """Run the command once and return its seconds and its peak resident memory in GiB."""
    write_jsonl(folder / "rows.jsonl", rows)
    words = ["data", str(folder / "rows.jsonl"), "--out", str(folder / "out"), "--max-tokens", "4000"]
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "qlora_helpers", *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"the command failed with status {status}")
    return time.perf_counter() - started, usage.ru_maxrss / 2**20


def main() -> None:
    """Print a table: seconds, microseconds per row, that cost relative to the first size, and memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    args = parser.parse_args()
    if args.file:
        rows = [json.loads(line) for line in args.file.read_text("utf-8").splitlines()]
    else:
        rows = [record for _, record in python_docs.records()]
    print("| rows | seconds | µs per row | relative to the first | peak GiB |\n|---|---|---|---|---|")
    first = None
    with tempfile.TemporaryDirectory() as folder:
        start, _ = measure(grow(rows, 30), Path(folder))
        for size in args.sizes:
            seconds, memory = measure(grow(rows, size), Path(folder))
            cost = (seconds - start) / size * 1e6
            first = first or cost
            print(f"| {size:,} | {seconds:.1f} | {cost:.0f} | {cost / first:.2f} | {memory:.2f} |", flush=True)


if __name__ == "__main__":
    main()
