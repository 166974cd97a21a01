"""The command line, `python -m qlora_helpers COMMAND`: see COMMANDS at the end. Heavy imports wait."""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from qlora_helpers import __version__
from qlora_helpers.config import PROFILES
from qlora_helpers.errors import UserError, nearest


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line that name the nearest option or command."""

    commands: Mapping[str, "Parser"] = {}

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise UserError(message)


def build_parser() -> Parser:
    """All commands and options."""
    parser = Parser(prog="qlora_helpers", description="QLoRA notebooks, headless.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"qlora_helpers {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)

    run = commands.add_parser("run", help="execute notebooks 01-07 and write the comparison", allow_abbrev=False)
    run.add_argument("--samples", type=int, nargs=2, metavar=("N1", "N2"), help="rows of experiments 1 and 2")
    run.add_argument("--seed", type=int, help="seed of both experiments")
    batch = commands.add_parser("batch", help="one run per sample count, setting and seed", allow_abbrev=False)
    batch.add_argument("--samples", type=int, nargs="+", required=True, metavar="N", help="rows to train on")
    batch.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="S", help="seeds")
    for option, kind in (("learning-rates", float), ("ranks", int), ("epochs-list", int), ("effective-batches", int)):
        batch.add_argument(f"--{option}", type=kind, nargs="+", metavar="X", help="tried singly, at the largest N")
    for command in (run, batch):
        command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for everything written")
        command.add_argument("--profile", default="auto", help=f"{', '.join(PROFILES)}, or auto: look at this machine")
        command.add_argument("--epochs", type=int, help="passes over the training rows")
        command.add_argument("--dataset", help="file or hub id")
        command.add_argument("--model", help="folder or hub id")
        command.add_argument("--n-heldout", type=int, metavar="N", help="rows that are never trained on")
        command.add_argument("--save-steps", type=int, metavar="N", help="steps between checkpoints")
    _add_data(commands)
    _add_plan(commands)
    compare = commands.add_parser("compare", help="report on complete runs, whoever made them", allow_abbrev=False)
    compare.add_argument(
        "run_folders", type=Path, nargs="+", metavar="RUN", help="run folders; equal but for the seed: one"
    )
    compare.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the report")
    export = commands.add_parser("export", help="merge a run's adapter, and check what comes out", allow_abbrev=False)
    export.add_argument("run_folder", type=Path, metavar="RUN", help="folder of a complete run")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the merged model")
    export.add_argument("--gguf", metavar="KIND", help="also write a GGUF file and a Modelfile: f16, q8_0 or q4_k_m")
    serve = commands.add_parser("serve", help="an exported model over OpenAI's protocol", allow_abbrev=False)
    serve.add_argument("path", type=Path, metavar="DIR", help="exported folder, merged folder or .gguf file")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine)")
    serve.add_argument("--port", type=int, default=8000, metavar="N", help="port to listen on (default 8000)")
    push = commands.add_parser("push", help="show what a push to a model hub would send", allow_abbrev=False)
    push.add_argument("source", type=Path, metavar="FOLDER", help="a complete run, or what export made")
    push.add_argument("--to", required=True, metavar="NAME/MODEL", dest="repository", help="repository on the hub")
    push.add_argument("--public", action="store_true", help="for everyone to see; default: private")
    push.add_argument("--really", action="store_true", help="send it; without this, nothing is sent")
    commands.add_parser("fetch", help="fetch the embedded model into the cache", allow_abbrev=False)
    parser.commands = commands.choices
    return parser


def _add_data(commands: Any) -> None:
    data = commands.add_parser("data", help="clean and split a data set, and report on it", allow_abbrev=False)
    data.add_argument("dataset", metavar="SOURCE", help="file, folder, hub id, 'sample' or 'python-stdlib'")
    data.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for rows and report")
    data.add_argument("--model", help="folder or hub id whose tokenizer counts; default: the embedded model")
    data.add_argument("--max-tokens", type=int, default=512, metavar="N", help="tokens a row may have (default 512)")
    data.add_argument("--over-length", default="drop", choices=("drop", "truncate"), help="what becomes of longer rows")
    data.add_argument("--template", choices=("guanaco", "instruction", "auto"), help="default: the model's own, if any")
    data.add_argument(
        "--near-duplicates", type=float, metavar="T", help="similarity from which rows are the same (0.7)"
    )
    data.add_argument("--n-heldout", type=int, metavar="N", help="held-out rows (default: a tenth, at most 1,000)")
    data.add_argument("--data-seed", type=int, metavar="S", help="another seed, another split")


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser("plan", help="peak memory of a run, before anything is downloaded", allow_abbrev=False)
    what = plan.add_mutually_exclusive_group()
    what.add_argument("--preset", default="tinyllama-guanaco-100", help="a published experiment")
    what.add_argument("--model", help="hub id, folder or config.json; many are known offline")
    where = plan.add_mutually_exclusive_group()
    where.add_argument("--memory", type=float, metavar="GIB", help="the GPU's memory")
    where.add_argument("--device", help="a card by name, such as t4")
    plan.add_argument("--method", help="qlora, lora or full; default: as the preset says")
    plan.add_argument("--rank", type=int, help="rank of the adapter")
    plan.add_argument("--targets", help="layers with an adapter, such as q_proj,v_proj, or all")
    plan.add_argument("--bias", help="biases that are trained: none, lora_only or all")
    plan.add_argument("--max-length", type=int, metavar="N", help="tokens of a row")
    plan.add_argument("--batch", type=int, metavar="N", dest="batch_size", help="rows of a forward pass")
    plan.add_argument("--accumulation", type=int, metavar="N", dest="gradient_accumulation", help="passes of a step")
    plan.add_argument("--checkpointing", action="store_true", default=None, dest="gradient_checkpointing")
    plan.add_argument("--optimizer", help="adamw_torch, adamw_8bit, paged_adamw_8bit or paged_adamw_32bit")
    plan.add_argument("--rows", type=int, nargs="+", metavar="N", help="print the time for so many training rows")
    plan.add_argument("--epochs", type=int, help="passes over the training rows")
    plan.add_argument("--json", action="store_true", help="for programs")


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 on success, 2 with one line on stderr for what the user can mend, 3 if a plan does not fit."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        parser = build_parser()
        _check_names(argv, parser)
        args = vars(parser.parse_args(argv))
        command = args.pop("command")
        if command is None:
            parser.print_help()
            return 0
        return COMMANDS[command](**args) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def _check_names(argv: list[str], parser: Parser) -> None:
    """An unknown command or option comes with its nearest neighbour, before anything else that may be wrong."""
    if not argv or argv[0].startswith("-"):
        return
    if argv[0] not in parser.commands:
        raise UserError(f"command: there is no '{argv[0]}'.{nearest(argv[0], parser.commands)}")
    options = parser.commands[argv[0]]._option_string_actions
    for word in argv[1:]:
        name = word.split("=")[0]
        if name.startswith("--") and name not in options:
            raise UserError(f"option: there is no '{name}'.{nearest(name, options)}")


def _run(**args: Any) -> None:
    from qlora_helpers.experiments import series

    _print_comparison(series.run_series(**args))


def _compare(run_folders: list[Path], out: Path) -> None:
    from qlora_helpers import runs
    from qlora_helpers.evaluation import comparison, report
    from qlora_helpers.runs import RunFolder

    folders = [RunFolder(path) for path in run_folders]
    with runs.damage_is_one_line(folders):
        experiments = comparison.group(folders)
        result = comparison.compare(experiments)
        written = report.write(result, experiments, runs.workdir(str(out)))
    _print_comparison(written)


def _print_comparison(written: Path) -> None:
    from qlora_helpers.evaluation import report
    from qlora_helpers.runs import RunFolder

    result = RunFolder(written.parent).read("comparison.json")
    lines = [report.table_markdown(result), "", *report.verdicts(result), *report.forgetting(result)]
    print("", *lines, report.scope(result), "", f"Report: {written}", sep="\n")


def _batch(**args: Any) -> None:
    from qlora_helpers.experiments import series, sweep

    lists = {name: args.pop(name) for name in sweep.KNOBS}
    batch = series.run_batch(lists=lists, **args)
    print("\n| run | rows | seed | steps | base loss | held-out loss | seconds |\n|---|---|---|---|---|---|---|")
    for run in batch:
        m = run.read("metrics.json")
        print(
            f"| {run.name} | {m['train_rows']} | {m['seed']} | {m['steps']} | {m['base_eval_loss']:.4f} "
            f"| {m['eval_loss']:.4f} | {m['seconds']:.0f} |"
        )


def _data(out: Path, max_tokens: int, n_heldout: int | None, template: str | None, **params: Any) -> None:
    from qlora_helpers import runs
    from qlora_helpers.config import Config
    from qlora_helpers.data import cleaning, report
    from qlora_helpers.models import hub

    params |= {"profile": "cpu", "preset": "tinyllama-coding", "max_length": max_tokens, "n_heldout": n_heldout}
    config = Config.from_params(**params)
    tokenizer = hub.load_tokenizer(config)
    config = config.replace(template=template or ("auto" if tokenizer.chat_template else "instruction"))
    cleaned = cleaning.clean(config, tokenizer, None if n_heldout else lambda usable: min(1000, max(2, usable // 10)))
    cleaning.check_enough(cleaned, n_heldout or 2, 1)
    found = report.build(cleaned, config, tokenizer)
    report.write(found, cleaned, runs.workdir(str(out)))
    print(f"layout: {cleaned.loaded.layout}")
    for name, count in found.tables[0].rows:
        print(f"{count:>10,}  {name}")
    print(*filter(None, [found.advice]), f"Report: {out / 'report.md'}", sep="\n")


def _plan(
    model: str | None, memory: float | None, device: str | None, method: str | None, targets: str | None, json: bool,
    rows: list[int] | None, **params: Any,
) -> int:  # fmt: skip
    from json import dumps

    from qlora_helpers.planning import plan, tables

    if targets is not None:
        params["target_modules"] = "all-linear" if targets == "all" else targets
    config = plan.preset_on(params.pop("preset"), model, **params)
    where = device if memory is None else memory
    plans = plan.by_method(config, where)
    asked = plan.plan_memory(config, where, method)
    if any(number < 1 for number in rows or []):
        raise UserError(f"rows: {min(rows or [])} is too small. Fix: 1 or more.")
    times = tables.training_time(config, asked, where, rows or [config.n_samples or 1000])
    if json:
        totals = {name: round(other.total, 3) for name, other in plans.items()}
        print(dumps({**asked.to_dict(), "methods": totals, "time": times}, indent=1))
    else:
        shown = (tables.table(plans), "", tables.answer(asked), "", tables.time_table(times))
        print(*shown, sep="\n")
    return 0 if asked.fits else 3


def _export(run_folder: Path, out: Path, gguf: str | None) -> None:
    from qlora_helpers.export import parity, pipeline
    from qlora_helpers.runs import RunFolder

    compared = pipeline.ship(RunFolder(run_folder), out.expanduser().resolve(), gguf)
    print(parity.table(compared), f"\nExport: {out}", sep="\n")


def _serve(**args: Any) -> None:
    from qlora_helpers.export import serve

    server = serve.plan(**args)
    print(server.help())
    serve.start(server)


def _push(source: Path, repository: str, public: bool, really: bool) -> None:
    from qlora_helpers.export import push

    planned = push.prepare(source.expanduser(), repository, public)
    print(planned)
    print(f"Pushed: {push.upload(planned)}" if really else "Nothing was sent. To send it: the same with --really.")


def _fetch() -> None:
    from qlora_helpers.models import bundled

    print(bundled.fetch())


COMMANDS: dict[str, Callable[..., int | None]] = {
    "run": _run,
    "batch": _batch,
    "data": _data,
    "plan": _plan,
    "compare": _compare,
    "export": _export,
    "serve": _serve,
    "push": _push,
    "fetch": _fetch,
}

if __name__ == "__main__":
    sys.exit(main())
