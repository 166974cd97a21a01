"""Hostile input: whatever a command is given, it ends in success or in one line.

usage: python benchmarks/hostile.py [--seeds FIRST LAST] [--workers N] [--out FILE] [--show SEED]

Each seed makes one case of `hostile_cases.py`: files of some kind, and a command that reads them. The command runs in a
process of its own. It passes if it ends with exit code 0, 2 or 3 within the limits of time and memory, prints no
traceback, and with code 2 exactly one line that starts with `error: `. `--show` runs one seed and prints its output.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hostile_cases import GOOD, LINES, Argv, World, clean, kind_of

SECONDS, GIB = 60, 2**30
ROOM, MOST = 8 * GIB, 1.5  # address space that a command may add, and GiB of memory that it may use
CLOSED = 128 + signal.SIGPIPE  # exit code if nobody reads the output


@dataclass
class Outcome:
    """What a command did: its exit code or the signal that ended it, its output, seconds, and GiB of memory."""

    seed: int
    argv: Argv
    code: int
    out: str = field(repr=False)
    err: str = field(repr=False)
    seconds: float
    gib: float

    @property
    def problem(self) -> str | None:
        """Why the case fails, or None."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        if self.code == -signal.SIGKILL:
            return f"no end after {SECONDS} s"
        if self.code not in (0, 2, 3, CLOSED):
            return f"exit code {self.code}: {(self.err.strip().splitlines() or ['silent'])[-1][:300]}"
        if "Traceback" in self.out + self.err:
            return "a traceback"
        if self.gib > MOST or any(line.startswith("error: memory") for line in lines):
            return f"{self.gib:.1f} GiB of memory"
        return None if len(lines) == (self.code == 2) else f"{len(lines)} lines of errors, exit code {self.code}"


class Case:
    """The case of a seed, running in a process of its own."""

    def __init__(self, seed: int, world: World) -> None:
        self.seed, self.folder = seed, Path(tempfile.mkdtemp(prefix="hostile-"))
        self.began, self.process = time.monotonic(), os.fork()
        if not self.process:
            self._run(world)

    def _run(self, world: World) -> None:
        code = 99
        try:
            os.chdir(self.folder)
            for name in ("case", "tmp"):
                os.mkdir(name)
            for number, name in enumerate(("out", "err"), 1):
                os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY), number)
            sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
            tempfile.tempdir = str(self.folder / "tmp")
            os.environ |= {"HOME": tempfile.tempdir, "QLORA_CACHE": tempfile.tempdir}
            os.chdir("case")
            begun = open(self.folder / "begun", "w")  # noqa: SIM115  (a case may let opening files fail)
            argv = kind_of(self.seed)(random.Random(self.seed), world)
            pages = [int(number) for number in Path("/proc/self/statm").read_text().split()]
            used, resident = (number * resource.getpagesize() for number in pages[:2])
            with begun:
                begun.write(json.dumps([argv, resident]))
            resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
            from qlora_helpers.__main__ import main

            code = main(argv)
            sys.stdout.flush()
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> Outcome | None:
        """Return the outcome, or None while it runs. After `SECONDS` it is killed."""
        spent = time.monotonic() - self.began
        if spent > SECONDS:
            os.kill(self.process, signal.SIGKILL)
        done, status, usage = os.wait4(self.process, 0 if spent > SECONDS else os.WNOHANG)
        if not done:
            return None
        texts = {name: (self.folder / name).read_text("utf-8", "replace") for name in ("out", "err")}
        begun = self.folder / "begun"
        argv, resident = json.loads(begun.read_text()) if begun.exists() else ([], 0)
        shutil.rmtree(self.folder, ignore_errors=True)
        gib = (usage.ru_maxrss * 1024 - resident) / GIB
        return Outcome(self.seed, argv, os.waitstatus_to_exitcode(status), **texts, seconds=spent, gib=max(gib, 0.0))


def run(seeds: Iterable[int], world: World, workers: int = 1) -> Iterator[Outcome]:
    """Run the cases of all seeds, and yield what came of each."""
    for name in json.loads((world.model.parent / "modules.json").read_text()):  # each process is a copy of this one
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    left, live = iter(seeds), list[Case]()
    while True:
        while len(live) < workers and (seed := next(left, None)) is not None:
            live.append(Case(seed, world))
        if not live:
            return
        for case in live[:]:
            if outcome := case.poll():
                live.remove(case)
                yield outcome
        time.sleep(0.01)


def make_world(folder: Path) -> World:
    """Make a random Llama with two layers, and train it twice. In another process, because a fork copies no threads."""
    world, process = World(folder / "model", folder / "runs"), os.fork()
    if process:
        if os.waitpid(process, 0)[1]:
            raise SystemExit("the tiny model could not be trained")
        return world
    try:
        _train(world)
        os._exit(0)
    finally:
        os._exit(1)


def _train(world: World) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from qlora_helpers import __main__
    from qlora_helpers.config import Config
    from qlora_helpers.experiments import matrix

    torch.set_num_threads(1)
    torch.manual_seed(0)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["</s>"], initial_alphabet=letters, show_progress=False
    )
    bpe.train_from_iterator((row["answer"] for row in GOOD), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}<assistant>"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=512, eos_token_id=0, bos_token_id=None, **sizes
    )
    LlamaForCausalLM(shape).save_pretrained(world.model)
    tokenizer.save_pretrained(world.model)
    settings = {"n_heldout": 4, "n_answers": 2, "max_length": 64, "max_new_tokens": 8, "rank": 4, "few_shot": False}
    config = Config.from_params(profile="cpu", model=str(world.model), compute_dtype="float32", n_samples=4, **settings)
    matrix.train_missing(matrix.plan_runs({"exp1": config, "exp2": config.replace(n_samples=8)}, world.runs))
    for checkpoints in world.runs.glob("*/checkpoints"):
        shutil.rmtree(checkpoints)
    (world.model.parent / "rows.jsonl").write_text(LINES)
    os.chdir(world.model.parent)
    with contextlib.redirect_stdout(io.StringIO()):
        compared, pushed = ["compare", "runs/exp1", "runs/exp2", "--out", "c"], ["push", "runs/exp1", "--to", "a/b"]
        cleaned, shipped = clean("rows.jsonl", world, "--out", "b"), ["export", "runs/exp1", "--out", "a"]
        codes = [__main__.main(argv) for argv in (compared, pushed, cleaned, shipped, ["plan"])]
    assert not any(codes), codes
    Path("modules.json").write_text(json.dumps(sorted(sys.modules)))


def main() -> int:
    """Run the cases, print those that fail with their seeds, and write the counts by kind."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 2000), metavar=("FIRST", "LAST"))
    parser.add_argument("--workers", type=int, default=2, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the counts as JSON")
    parser.add_argument("--show", type=int, metavar="SEED", help="run one seed and print its output")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hostile-world-") as scratch:
        world = make_world(Path(scratch))
        if args.show is not None:
            (one,) = run([args.show], world)
            print(kind_of(args.show).__name__, one, one.out, one.err, one.problem or "passes", sep="\n")
            return 0
        outcomes = []
        for outcome in run(range(*args.seeds), world, args.workers):
            outcomes.append(outcome)
            if outcome.problem:
                print(f"seed {outcome.seed}, {kind_of(outcome.seed).__name__}: {outcome.problem}", flush=True)
    result = summary(outcomes)
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"seeds": list(args.seeds), **result}, indent=1) + "\n")
    return 0 if result["passed"] == result["cases"] else 1


def summary(outcomes: list[Outcome]) -> dict[str, object]:
    """Counts of all cases and of those that pass, by kind, and of exit codes; the most seconds and GiB of one case."""
    cases = Counter(kind_of(outcome.seed).__name__ for outcome in outcomes)
    passed = Counter(kind_of(outcome.seed).__name__ for outcome in outcomes if not outcome.problem)
    return {
        "cases": cases.total(),
        "passed": passed.total(),
        "kinds": {kind: {"cases": cases[kind], "passed": passed[kind]} for kind in sorted(cases)},
        "exit_codes": dict(sorted(Counter(outcome.code for outcome in outcomes).items())),
        "most_seconds": round(max(outcome.seconds for outcome in outcomes), 1),
        "most_gib": round(max(outcome.gib for outcome in outcomes), 2),
    }


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    sys.exit(main())
