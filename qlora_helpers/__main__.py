"""The command line: `qlora COMMAND`, or `python -m qlora_helpers COMMAND`. Each command imports what it needs."""

import io
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from itertools import chain
from json import dumps
from pathlib import Path
from typing import Any, NamedTuple

from qlora_helpers import __version__, distributed, errors, options, parse, quoting
from qlora_helpers.config import our_name
from qlora_helpers.errors import UserError, blame, nearest
from qlora_helpers.options import Parser


def build_parsers() -> tuple[Parser, dict[str, Parser]]:
    """Return the main parser, and the parser of each command by name."""
    parser = Parser(prog="qlora", description="QLoRA fine-tuning from the command line.")
    parser.add_argument("--version", action="version", version=f"qlora_helpers {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    parsers = {}
    for name, command in COMMANDS.items():
        parsers[name] = commands.add_parser(name, help=command.help, description=command.help)
        command.options(parsers[name])
    return parser, parsers


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code.

    0 on success, 1 after an error of this package, 2 after one that the user can fix, such as a bad file, 3 if a plan
    does not fit, 130 if interrupted, and 141 if the program that reads the output has ended. Errors are one line on
    stderr; it names a log file with the traceback, unless the traceback would say no more.
    """
    _guard_output()
    errors.given.clear()
    try:
        code = _run_command(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except SystemExit:  # --help and --version
        raise
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        return 130
    except BaseException as error:  # libraries in Rust panic with a class outside of Exception
        return _report(error)


def _run_command(argv: list[str]) -> int:
    parser, parsers = build_parsers()
    _check_names(argv, parsers)
    args = vars(parser.parse_args(argv))
    command = args.pop("command")
    if command is None:
        parser.print_help()
        return 0
    return COMMANDS[command].run(**args) or 0


def _guard_output() -> None:
    """Let output be closed, or in an encoding that lacks some characters: these are escaped."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _report(error: BaseException) -> int:
    """Print an error as one line and return the exit code. Output that cannot be written is dropped."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        if isinstance(error, BrokenPipeError):
            return 141
    distributed.begin_report(error)
    line = errors.explain(error)
    print(f"error: {line}" if line else errors.internal(error), file=sys.stderr)
    return 2 if line else 1


def _of_runs(*folders: Path) -> AbstractContextManager[None]:
    """Blame any exception in the body of a `with` statement, whose only input are runs, on their folders."""
    for folder in folders:
        parse.no_devices(chain(folder.glob("*"), folder.glob("*/*")), "run folder")
    names = ", ".join(map(str, folders[:3])) + (", …" if folders[3:] else "")
    fix = (
        "Fix: restore them, or run the notebook again with another output folder; if they are as they should be, "
        "report the log as a bug."
    )
    return blame("run folder", f"{names} or the folder of the base model", fix)


def _check_names(argv: list[str], parsers: Mapping[str, Parser]) -> None:
    """Raise `UserError` for an unknown command or option, naming the closest known one, before parsing."""
    if not argv or argv[0].startswith("-"):
        return
    if argv[0] not in parsers:
        raise UserError(f"unknown command '{argv[0]}'.{nearest(argv[0], parsers)}")
    known = [*parsers[argv[0]].options, "--help"]
    for word in argv[1:]:
        name = word.split("=")[0]
        if name.startswith("--") and name not in known:
            ours = our_name(name[2:].replace("-", "_"))
            fix = f" Fix: use --{ours.replace('_', '-')}." if ours else nearest(name, known)
            raise UserError(f"unknown option '{name}'.{fix}")


def _run(**args: Any) -> None:
    from qlora_helpers.experiments import series

    _print_comparison(series.run_series(**_given(args)))


def _given(args: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given, because papermill writes every parameter it gets into the notebook."""
    return {name: value for name, value in args.items() if value is not None}


def _train(out: Path, **args: Any) -> None:
    from qlora_helpers.training import launched

    run = launched.train(str(out), _given(args))  # before libraries with threads are imported, see distributed.begin
    if distributed.is_main():
        from qlora_helpers.evaluation import comparison, report

        result = comparison.compare(comparison.group([run]))
        print("", report.table_markdown(result), "", *report.verdicts(result), "", f"Run: {run.path}", sep="\n")


def _compare(run_folders: list[Path], out: Path, margin: float | None) -> None:
    from qlora_helpers import runs
    from qlora_helpers.evaluation import comparison, report
    from qlora_helpers.runs import RunFolder

    folders = [RunFolder(path) for path in run_folders]
    with _of_runs(*run_folders):
        experiments = comparison.group(folders)
        result = comparison.compare(experiments, margin)
        written = report.write(result, experiments, runs.workdir(str(out)))
    _print_comparison(written)


def _print_comparison(written: Path) -> None:
    from qlora_helpers.evaluation import comparison, report

    result = comparison.read(written.parent)
    lines = [report.table_markdown(result), "", *report.verdicts(result), *report.forgetting(result)]
    print("", *lines, report.basis(result), report.scope(result), "", f"Report: {written}", sep="\n")


def _batch(**args: Any) -> None:
    from qlora_helpers.evaluation import report
    from qlora_helpers.experiments import matrix, series

    lists = {name: args.pop(name) for name in matrix.SETTINGS}
    batch = series.run_batch(lists=lists, **_given(args))
    columns = {"train_rows": "", "seed": "", "steps": "", "base_eval_loss": ".4f", "eval_loss": ".4f", "seconds": ".0f"}
    metrics = {run.name: run.read("metrics.json") for run in batch}
    rows = [
        [quoting.markdown(name), *(format(m[key], form) for key, form in columns.items())]
        for name, m in metrics.items()
    ]
    heads = ["run", "rows", "seed", "steps", "base loss", "held-out loss", "seconds"]
    print("", report.markdown_table(heads, rows), sep="\n")


def _data(out: Path, max_tokens: int, n_heldout: int | None, template: str | None, **params: Any) -> None:
    from qlora_helpers.config import Config
    from qlora_helpers.data import cleaning, report, workers
    from qlora_helpers.models import hub

    folder = report.check_output(out, params["dataset"])
    params |= {"profile": "cpu", "preset": "tinyllama-coding", "max_length": max_tokens, "n_heldout": n_heldout}
    config = Config.from_params(**params)
    tokenizer = hub.load_tokenizer(config)
    config = config.replace(template=template or ("auto" if tokenizer.chat_template else "instruction"))
    cleaned = cleaning.clean(config, tokenizer, None if n_heldout else lambda usable: min(1000, max(2, usable // 10)))
    try:
        cleaning.check_enough(cleaned, n_heldout or 2, 1)
    except UserError:
        report.write(None, cleaned, folder)  # says why
        raise
    with workers.without_garbage_collection():
        built = report.build(cleaned, config, tokenizer)
        report.write(built, cleaned, folder)
    print(f"layout: {cleaned.loaded.layout}", *(f"columns: {line}" for line in cleaned.loaded.columns), sep="\n")
    altered = [(f"altered: {kind}", count) for kind, count in cleaned.loaded.altered.items()]
    groups = [(f"groups, {built.facts['heldout_groups']:,} of them held out", built.facts["groups"])]
    for name, count in [*built.tables[0].rows, *(groups if built.facts["groups"] else []), *altered]:
        print(f"{count:>10,}  {name}")
    print(*filter(None, [built.advice]), f"Report: {out / 'report.md'}", sep="\n")


def _plan(
    model: str | None, memory: float | None, device: str | None, method: str | None, targets: str | None, json: bool,
    rows: list[int] | None, detect: float | None, pilot: list[Path] | None, gpus: int, strategy: str, **params: Any,
) -> int:  # fmt: skip
    if detect is not None:
        return _plan_comparison(detect, pilot or [], json)
    if pilot:
        raise UserError("pilot: it belongs to --detect. Fix: add --detect X, in nats per token.")
    from qlora_helpers.planning import plan, tables
    from qlora_helpers.planning.workload import Parallel

    if targets is not None:
        params["target_modules"] = "all-linear" if targets == "all" else targets
    config = plan.preset_on(params.pop("preset"), model, **params)
    where, parallel = device if memory is None else memory, Parallel(gpus, strategy)
    plans = plan.by_method(config, where, parallel)
    asked = plan.plan_memory(config, where, method, parallel)
    if any(number < 1 for number in rows or []):
        raise UserError(f"rows: {min(rows or [])} is too small. Fix: use 1 or more.")
    times = tables.training_time(config, asked, where, rows or [config.n_samples or 1000])
    if json:
        totals = {name: round(other.total, 3) for name, other in plans.items()}
        print(dumps({**asked.to_dict(), "methods": totals, "time": times}, indent=1))
    else:
        shown = (tables.table(plans), "", tables.answer(asked), "", tables.time_table(times))
        print(*shown, sep="\n")
    return 0 if asked.fits else 3


def _plan_comparison(effect: float, pilot: list[Path], json: bool) -> int:
    from qlora_helpers.evaluation import power
    from qlora_helpers.runs import RunFolder

    with _of_runs(*pilot):
        design = power.design(effect, [RunFolder(path) for path in pilot])
    print(dumps(design.to_dict(), indent=1) if json else design)
    return 0


def _export(run_folder: Path, out: Path, gguf: str | None) -> None:
    from qlora_helpers.export import parity, pipeline
    from qlora_helpers.runs import RunFolder

    with _of_runs(run_folder):
        compared = pipeline.ship(RunFolder(run_folder), out.resolve(), gguf)
    print(parity.table(compared), f"\nExport: {out}", sep="\n")


def _harness(run_folder: Path, **args: Any) -> None:
    from qlora_helpers.evaluation import harness
    from qlora_helpers.runs import RunFolder

    with _of_runs(run_folder):
        results = harness.evaluate(RunFolder(run_folder), **args)
    print("Each line: base model and adapter, on the same samples.", *results, sep="\n")


def _serve(**args: Any) -> None:
    from qlora_helpers.export import serve

    server = serve.plan(**args)
    print(server.help())
    serve.start(server)


def _push(source: Path, repository: str, public: bool, yes: bool) -> None:
    from qlora_helpers.export import push

    with _of_runs(source):
        planned = push.prepare(source, repository, public)
    print(planned)
    print(f"Pushed: {push.upload(planned)}" if yes else "Nothing was sent. To send it, add --yes.")


def _fetch() -> None:
    from qlora_helpers.models import bundled

    print(bundled.fetch())


class Command(NamedTuple):
    """A command: its help, the function that adds its options, and the function that runs it."""

    help: str
    options: Callable[[Parser], None]
    run: Callable[..., int | None]


COMMANDS = {
    "run": Command("execute notebooks 01-07 and write the comparison", options.run, _run),
    "batch": Command("train one run per sample count, setting and seed", options.batch, _batch),
    "train": Command("train one run, with one or several GPUs", options.train, _train),
    "data": Command("clean and split a data set, and report on it", options.data, _data),
    "plan": Command("plan peak memory and time of a run before downloading anything", options.plan, _plan),
    "compare": Command("compare finished runs and write a report", options.compare, _compare),
    "harness": Command("evaluate a run and its base model on lm-evaluation-harness", options.harness, _harness),
    "export": Command("merge a run's adapter into its base model and verify the result", options.export, _export),
    "serve": Command("serve an exported model over OpenAI's protocol", options.serve, _serve),
    "push": Command("show what a push to a model hub would send, or send it", options.push, _push),
    "fetch": Command("download the bundled model into the cache", lambda parser: None, _fetch),
}

if __name__ == "__main__":
    sys.exit(main())
