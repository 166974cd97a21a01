"""Plant small faults in the core, one at a time, and see whether the unit tests notice (mutation testing).

usage: python tooling/mutants.py [--sample 100] [--seed 0] [--minutes M]     (make mutants)

cosmic-ray makes the faults, such as another operator, number or branch, in a copy of the checkout. Each is run against
the unit tests that cover its line, for at most 60 s: those of the module's own test file first, then the fast ones.
Results are kept in build/mutants: the same command goes on where it was stopped. It prints the faults that no test
noticed, and exits with 1 if these are more than one in ten.
"""

import argparse
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from cosmic_ray.commands.init import init
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkItem, WorkResult
from coverage import CoverageData

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "mutants"
TREE = FOLDER / "tree"
SECONDS = FOLDER / "seconds.xml"  # of each test
CORE = (
    "training/*.py", "models/safetensors_io.py", "evaluation/intervals.py", "data/labeling.py", "data/prompts.py",
    "data/cleaning.py", "export/merge.py", "runs.py",
)  # fmt: skip
LIMIT = 60.0  # seconds per fault
SURVIVE = 0.1  # largest share of faults that no test may notice
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]


def prepare(sample: int, seed: int) -> None:
    """Copy the tracked files, note which tests cover which lines, and draw the faults."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        (TREE / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, TREE / name)
    for words in (["init", "--quiet"], ["add", "--all", "--force"]):  # tests ask git for the tracked files
        subprocess.run(["git", *words], cwd=TREE, check=True)
    print("Running the unit tests once, to see which lines each covers …", flush=True)
    contexts = ["--cov=qlora_helpers", "--cov-context=test", "--cov-report=", f"--junitxml={SECONDS}"]
    subprocess.run([*PYTEST, *contexts, "tests/unit"], cwd=TREE, check=True)
    modules = [path.relative_to(TREE) for pattern in CORE for path in sorted((TREE / "qlora_helpers").glob(pattern))]
    os.chdir(TREE)
    with use_db(FOLDER / "new.sqlite", WorkDB.Mode.create) as faults:
        init(modules, faults, {})
        every = sorted(faults.work_items, key=_place)
        drawn = {fault.job_id for fault in random.Random(seed).sample(every, min(sample, len(every)))}
        for fault in every:
            if fault.job_id not in drawn:
                faults.set_result(fault.job_id, WorkResult(worker_outcome=WorkerOutcome.SKIPPED))
    (FOLDER / "new.sqlite").rename(FOLDER / "faults.sqlite")


def _place(fault: WorkItem) -> tuple[str, str, int]:
    (one,) = fault.mutations
    return str(one.module_path), one.operator_name, one.occurrence


def seconds_of_tests() -> dict[str, float]:
    """Return how long each test took in the first run."""
    cases = ElementTree.parse(SECONDS).iter("testcase")
    return {
        f"{case.attrib['classname'].replace('.', '/')}.py::{case.attrib['name']}": float(case.attrib["time"])
        for case in cases
    }


def covering(fault: WorkItem, covered: CoverageData, seconds: dict[str, float]) -> list[str]:
    """Return the tests that run the line of a fault; for a line that no test ran itself, those that run its module."""
    (one,) = fault.mutations
    own = f"test_{one.module_path.stem}.py"
    lines = covered.contexts_by_lineno(str(TREE / one.module_path))
    rows = range(one.start_pos[0], one.end_pos[0] + 1)
    found = {context for row in rows for context in lines.get(row, [])} - {""}
    found = found or {context for contexts in lines.values() for context in contexts} - {""}
    tests = {context.rpartition("|")[0] for context in found}  # the name of a test may contain the mark
    return sorted(tests, key=lambda test: (own not in test, seconds.get(test, LIMIT), test))


def run(faults: WorkDB, minutes: float) -> None:
    """Test the faults that have no result yet."""
    covered = CoverageData(str(TREE / ".coverage"))
    covered.read()
    seconds = seconds_of_tests()
    ends = time.monotonic() + 60 * minutes
    command = shlex.join([*PYTEST, "-x", f"@{FOLDER / 'tests.txt'}"])
    for number, fault in enumerate(sorted(faults.pending_work_items, key=_place)):
        if time.monotonic() > ends:
            return
        tests = covering(fault, covered, seconds)
        (FOLDER / "tests.txt").write_text("\n".join(tests), "utf-8")
        if number == 0:  # a command that fails without a fault would make every fault look noticed
            subprocess.run(shlex.split(command), check=True)
        result = mutate_and_test(fault.mutations, command, LIMIT)
        if not tests:
            result.test_outcome = TestOutcome.SURVIVED
        faults.set_result(fault.job_id, result)
        print(*_place(fault), result.test_outcome, len(tests), "tests", flush=True)


def report(faults: WorkDB) -> int:
    """Print the faults that survived and the counts, and return the exit code."""
    counts: Counter[str] = Counter()
    for _, result in faults.completed_work_items:
        if result.worker_outcome == WorkerOutcome.SKIPPED:
            continue
        timed_out = result.output == "timeout"
        counts["time ran out" if timed_out else str(result.test_outcome).rpartition(".")[2].lower()] += 1
        if result.test_outcome == TestOutcome.SURVIVED:
            print(result.diff)
    print(dict(counts), f"{len(faults.pending_work_items)} to do")
    return int(counts["survived"] > SURVIVE * counts.total())


def main() -> int:
    """Prepare, unless that was done, test, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sample", type=int, default=100, help="number of faults")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many minutes")
    args = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    os.environ |= {"PYTHONPATH": str(TREE), "OMP_NUM_THREADS": "1"}
    if not (FOLDER / "faults.sqlite").exists():
        prepare(args.sample, args.seed)
    os.chdir(TREE)
    with use_db(FOLDER / "faults.sqlite", WorkDB.Mode.open) as faults:
        run(faults, args.minutes)
        return report(faults)


if __name__ == "__main__":
    sys.exit(main())
