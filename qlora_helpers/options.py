"""Command-line options. Those for the settings of a run are generated from the fields of `Config`."""

import argparse
import dataclasses
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, NoReturn

from qlora_helpers import distributed, parse
from qlora_helpers.config import PROFILES, Config, value_type
from qlora_helpers.errors import UserError

OUT = partial(parse.path, what="--out", is_input=False)
RUN, MODEL = partial(parse.path, what="run folder"), partial(parse.path, what="model")


class Parser(argparse.ArgumentParser):
    """An argparse parser with errors of one line and a list of the options added to it."""

    def __init__(self, **kwargs: Any) -> None:
        self.options: list[str] = []
        super().__init__(**kwargs, allow_abbrev=False)

    def option(self, *names: str, group: Any = None, **kwargs: Any) -> None:
        """Add an option, to `group` if one is given."""
        self.options += (group or self).add_argument(*names, **kwargs).option_strings

    def settings(self, *leave_out: str, only: Collection[str] = (), aliases: Mapping[str, str] | None = None) -> None:
        """Add an option for every setting of `Config`, or those in `only`, except those in `leave_out`."""
        for field in dataclasses.fields(Config):
            if field.name in {"preset_name", *leave_out} or (only and field.name not in only):
                continue
            names = [f"--{field.name.replace('_', '-')}", *filter(None, [(aliases or {}).get(field.name)])]
            kind = value_type(field)
            kwargs: dict[str, Any] = {"dest": field.name, "help": _help(field)}
            if kind is bool:  # without `--name` or `--no-name` it is None, and the preset decides
                kwargs["action"] = argparse.BooleanOptionalAction
            elif kind in (int, float):
                kwargs |= {"type": kind, "metavar": "N" if kind is int else "X"}
            self.option(*names, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise `UserError` instead of printing the usage."""
        raise UserError(message)


def _help(field: "dataclasses.Field[Any]") -> str:
    limits = field.metadata
    words = [", ".join(limits["choices"])] if limits["choices"] else []
    words += [f"{limits['low']:g} or more"] if limits["low"] is not None and limits["high"] is None else []
    words += [f"{limits['low']:g} to {limits['high']:g}"] if limits["high"] is not None else []
    return f"{field.metadata['help']} ({words[0]})" if words else field.metadata["help"]


def run(run: Parser) -> None:
    """Add the options of `run`."""
    run.option("--samples", type=int, nargs=2, metavar=("N1", "N2"), help="training rows of experiments 1 and 2")
    run.option("--out", type=OUT, required=True, metavar="DIR", help="output folder")
    run.settings("n_samples", "profile")
    _profile(run)


def train(train: Parser) -> None:
    """Add the options of `train`."""
    files = ", ".join(sorted(path.name for path in distributed.CONFIGS.glob("*.yaml")))
    train.epilog = (
        "With several GPUs: accelerate launch --config_file FILE -m qlora_helpers train …, where FILE is one of "
        f"{files} in {distributed.CONFIGS}."
    )
    train.option("--out", type=OUT, required=True, metavar="DIR", help="run folder")
    train.option("--preset", help="published experiment or recipe (default tinyllama-guanaco-100)")
    train.settings("profile")
    _profile(train)


def batch(batch: Parser) -> None:
    """Add the options of `batch`."""
    batch.option("--samples", type=int, nargs="+", required=True, metavar="N", help="numbers of training rows")
    batch.option("--seeds", type=int, nargs="+", default=[0], metavar="S", help="training seeds (default 0)")
    for option, kind in (("learning-rates", float), ("ranks", int), ("epochs-list", int), ("effective-batches", int)):
        batch.option(f"--{option}", type=kind, nargs="+", metavar="X", help="values to try in turn, at the largest N")
    batch.option("--out", type=OUT, required=True, metavar="DIR", help="output folder")
    batch.option("--parallel", type=int, metavar="N", help="runs at a time (default: the number of GPUs, at least 1)")
    batch.settings("n_samples", "seed", "profile")
    _profile(batch)


def _profile(parser: Parser) -> None:
    parser.option("--profile", default="auto", help=f"{', '.join(PROFILES)}, or auto: detect this machine (default)")


def data(data: Parser) -> None:
    """Add the options of `data`."""
    data.add_argument("dataset", metavar="SOURCE", help="file, folder, hub id, 'sample' or 'python-stdlib'")
    data.option("--out", type=OUT, required=True, metavar="DIR", help="output folder for rows and report")
    data.option("--model", help="folder or hub id of the model whose tokenizer is used (default: the bundled model)")
    data.option("--max-tokens", type=int, default=512, metavar="N", help="maximum tokens per row (default 512)")
    data.option(
        "--over-length", default="drop", choices=("drop", "truncate"), help="what to do with longer rows (default drop)"
    )
    data.option(
        "--template",
        choices=("guanaco", "instruction", "auto"),
        help="prompt format (default: auto if the model has a chat template, else instruction)",
    )
    data.option("--n-heldout", type=int, metavar="N", help="held-out rows (default: a tenth, at most 1,000)")
    data.settings(only=("columns", "group_by", "split", "subset", "near_duplicates", "data_seed"))


def plan(plan: Parser) -> None:
    """Add the options of `plan`."""
    what = plan.add_mutually_exclusive_group()
    plan.option("--preset", group=what, default="tinyllama-guanaco-100", help="published experiment to plan")
    plan.option("--model", group=what, help="hub id, folder or config.json; some models are known offline")
    where = plan.add_mutually_exclusive_group()
    plan.option("--memory", group=where, type=float, metavar="GIB", help="memory of the GPU")
    plan.option("--device", group=where, help="GPU by name, such as t4")
    plan.option("--gpus", type=int, default=1, metavar="N", help="GPUs that share each step's rows (default 1)")
    plan.option("--strategy", default="ddp", help="what each of them stores: ddp, fsdp or fsdp-offload (default ddp)")
    plan.option("--method", help="qlora, lora or full (default: that of the preset)")
    plan.option("--targets", help="layers with an adapter, such as q_proj,v_proj, or all")
    plan.option("--rows", type=int, nargs="+", metavar="N", help="numbers of training rows to print the time for")
    plan.option("--detect", type=float, metavar="X", help="plan a comparison that detects X nats per token instead")
    plan.option("--pilot", type=RUN, nargs="+", metavar="RUN", help="finished runs to take variances from")
    plan.option("--json", action="store_true", help="print JSON")
    short = {"batch_size": "--batch", "gradient_accumulation": "--accumulation"}
    plan.settings("profile", "model", "target_modules", aliases={**short, "gradient_checkpointing": "--checkpointing"})


def compare(compare: Parser) -> None:
    """Add the options of `compare`."""
    words = "run folders; those that differ only in the seed count as one experiment"
    compare.add_argument("run_folders", type=RUN, nargs="+", metavar="RUN", help=words)
    compare.option("--out", type=OUT, required=True, metavar="DIR", help="output folder for the report")
    compare.option("--margin", type=float, metavar="X", help="differences below X nats per token do not matter")


def harness(harness: Parser) -> None:
    """Add the options of `harness`."""
    harness.add_argument("run_folder", type=RUN, metavar="RUN", help="folder of a finished run")
    harness.option("--tasks", nargs="+", required=True, metavar="TASK", help="names of lm-eval's tasks, or YAML files")
    harness.option("--limit", type=int, metavar="N", help="samples per task (default: all)")
    harness.option("--chat-template", action="store_true", dest="chat", help="prompt in the model's own chat template")


def export(export: Parser) -> None:
    """Add the options of `export`."""
    export.add_argument("run_folder", type=RUN, metavar="RUN", help="folder of a finished run")
    export.option("--out", type=OUT, required=True, metavar="DIR", help="new folder for the merged model")
    export.option("--gguf", metavar="KIND", help="also write a GGUF file and a Modelfile: f16, q8_0 or q4_k_m")


def serve(serve: Parser) -> None:
    """Add the options of `serve`."""
    serve.add_argument("path", type=MODEL, metavar="DIR", help="exported folder, merged folder or .gguf file")
    serve.option("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine)")
    serve.option("--port", type=int, default=8000, metavar="N", help="port to listen on (default 8000)")


def push(push: Parser) -> None:
    """Add the options of `push`."""
    push.add_argument("source", type=RUN, metavar="FOLDER", help="finished run, or folder written by export")
    push.option("--to", required=True, metavar="NAME/MODEL", dest="repository", help="repository on the hub")
    push.option("--public", action="store_true", help="make the repository public (default: private)")
    push.option("--yes", "--really", action="store_true", help="send it; without this option, nothing is sent")
