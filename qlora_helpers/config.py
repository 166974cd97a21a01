"""Settings of a run: one frozen dataclass, filled from defaults, a preset, a profile and parameters.

Later layers override earlier ones. Names, types and ranges are checked here, because papermill checks none of them.
"""

import dataclasses
import hashlib
import json
import math
import types
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, get_args

from qlora_helpers.errors import UserError, nearest

PROFILES = ("cpu", "t4", "gpu")
BUNDLED_MODEL = "smollm2-135m-instruct"
SAMPLE_DATA = "sample"
PYTHON_DOCS = "python-stdlib"
OTHER_TOOLS = "_other_tools"  # file beside the presets: names of settings in other tools, and ours
SCORES = ("exact", "choice", "json", "python", "regex:PATTERN")
UNPACKED = 0.05  # share of weights in 16 bits, besides embeddings, above which 4 bits save too little
MANY_RUNS = ("sample_counts", "seconds_per_run")  # keys of a profile that concern many runs and are not in `Config`


def _field(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    identity: bool = True,
) -> Any:
    """Return a dataclass field with the range or the choices that `_check` enforces.

    `identity` says whether the setting affects the result of a run: see `Config.identity`.
    """
    limits = {"low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata={"help": help, "identity": identity, **limits})


@dataclass(frozen=True)
class Config:
    """Settings of one training run, fully resolved. Equal configs with equal data give the same run.

    Create one with `Config.preset` or `Config.from_params`. Both raise `UserError` for an unknown name, a wrong type
    or a value out of range.
    """

    preset_name: str = _field("", "preset that the settings come from", identity=False)
    profile: str = _field("cpu", "size of the machine", choices=PROFILES, identity=False)

    model: str = _field(BUNDLED_MODEL, "hub id, folder, or name of the bundled model")
    revision: str = _field("main", "commit or branch of the model on the hub")
    quantization: str = _field("nf4", "how the frozen base model is stored", choices=("nf4", "fp4", "none"))
    double_quant: bool = _field(True, "quantize the quantization constants too")
    compute_dtype: str = _field(
        "auto", "compute dtype; auto: chosen for this machine", choices=("auto", "bfloat16", "float16", "float32")
    )
    memory_limit_gib: float | None = _field(None, "limit GPU memory to this many GiB", low=0.5, identity=False)

    dataset: str | None = _field(SAMPLE_DATA, "hub id, file, folder, 'sample' or 'python-stdlib'")
    dataset_revision: str = _field("main", "commit or branch of the data set on the hub")
    subset: str | None = _field(None, "subset of the data set on the hub, or a subfolder")
    split: str | None = _field(None, "split to read; None: train on the hub, all of a folder")
    streaming: bool = _field(False, "read rows while training: more rows than memory")
    columns: str | None = _field(None, "what columns hold: question=Title,answer=Body")
    template: str = _field(
        "guanaco", "prompt format; auto: the model's own chat template", choices=("guanaco", "instruction", "auto")
    )
    system: str | None = _field(None, "system prompt of rows that have none of their own")
    thinking: bool | None = _field(None, "for chat templates with a switch; None: their default")
    template_date: str = _field("2026-01-01", "what chat templates write as today's date")
    end_token: str | None = _field(None, "ends an answer where the template writes no end")
    train_on: str = _field("assistant", "tokens that the loss is computed on", choices=("assistant", "all"))
    max_length: int = _field(256, "maximum number of tokens per row", low=8)
    over_length: str = _field("truncate", "what to do with longer rows", choices=("truncate", "drop"))
    min_chars: int = _field(10, "drop rows shorter than this (question plus answer)", low=1)
    max_chars: int = _field(1_000_000, "drop rows longer than this, in characters", low=100)
    near_duplicates: float = _field(0.7, "Jaccard similarity of duplicates; 1: identical only", low=0.5, high=1)
    rehearsal: float = _field(0.0, "general rows per training row, against forgetting", low=0, high=1)
    rehearsal_dataset: str = _field(SAMPLE_DATA, "source of rehearsal rows: hub id, file, or 'sample'")
    n_samples: int | None = _field(None, "number of training rows; None: all usable rows", low=1)
    n_heldout: int = _field(100, "number of held-out rows, which are never trained on", low=2)
    heldout_max_length: int = _field(2048, "maximum number of tokens per held-out row", low=8)
    n_selection: int | None = _field(None, "rows to choose the checkpoint on; None: n_heldout", low=2)
    group_by: str | None = _field(None, "field of rows that belong together, never split")
    data_seed: int = _field(0, "seed of the split into held-out and training rows", low=0)
    draw: int | None = _field(None, "seed of the choice of training rows; None: seed", low=0)

    rank: int = _field(16, "rank r of the LoRA adapter", low=1)
    alpha: int = _field(32, "the adapter's output is scaled by alpha / r", low=1)
    dropout: float = _field(0.05, "dropout on the adapter's input", low=0, high=0.9)
    target_modules: tuple[str, ...] = _field(("q_proj", "v_proj"), "layers with an adapter, or all-linear")
    bias: str = _field("none", "which biases are trained", choices=("none", "lora_only", "all"))

    epochs: int = _field(1, "number of passes over the training rows", low=1)
    batch_size: int = _field(4, "rows per forward pass", low=1, identity=False)
    gradient_accumulation: int = _field(1, "forward passes per optimizer step", low=1, identity=False)
    learning_rate: float = _field(2e-4, "peak learning rate", low=0, high=1)
    sampling: str = _field("random", "order of the training rows", choices=("random", "group_by_length"))
    lr_scheduler: str = _field("linear", "learning rate schedule", choices=("linear", "cosine", "constant"))
    warmup_ratio: float = _field(0.0, "fraction of the steps used for warmup", low=0, high=1)
    weight_decay: float = _field(0.0, "weight decay of AdamW", low=0)
    optimizer: str = _field(
        "adamw_torch", "optimizer", choices=("adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
    )
    max_grad_norm: float = _field(1.0, "clip gradients to this norm", low=0)
    gradient_checkpointing: bool = _field(False, "recompute activations: less memory, more time", identity=False)
    fast: str = _field(
        "auto", "how a GPU computes steps", choices=("auto", "off", "graphs", "compiled"), identity=False
    )
    auto_batch: bool = _field(False, "use the fastest batch split that fits, by the plan", identity=False)
    on_oom: str = _field(
        "stop", "out of GPU memory: stop, or split the batch and resume", choices=("stop", "shrink"), identity=False
    )
    eval_steps: int | None = _field(None, "steps between held-out losses; None: once per epoch", low=1)
    save_steps: int = _field(50, "steps between checkpoints", low=1, identity=False)
    keep_best: bool = _field(False, "end with the best checkpoint on the selection rows")
    early_stopping_patience: int | None = _field(None, "stop after this many evaluations without a new low", low=1)
    margin: float | None = _field(None, "differences in held-out loss below this do not matter", low=0, identity=False)
    n_seeds: int = _field(1, "training seeds per experiment in a comparison", low=1, identity=False)
    equal_steps: bool = _field(False, "also train the smaller experiment for as many steps", identity=False)
    few_shot: bool = _field(True, "also measure the base model with few-shot examples", identity=False)
    n_answers: int = _field(100, "number of held-out questions to answer and score", low=0, identity=False)
    score: str | None = _field(None, "score answers: exact, choice, json, python, regex:…", identity=False)
    run_code: bool = _field(False, "allow score=python to run answers on this machine", identity=False)
    seconds_per_step: float | None = _field(
        None, "measured with the profile's model; None: estimated", low=0, identity=False
    )
    max_thinking_tokens: int = _field(512, "more tokens per answer with thinking=True", low=0, identity=False)
    max_new_tokens: int = _field(128, "maximum number of tokens per answer", low=1, identity=False)
    seed: int = _field(0, "seed of adapter weights, row order and dropout", low=0)

    @classmethod
    def preset(cls, name: str, /, **changes: Any) -> "Config":
        """Return the published experiment `name` with the gpu profile. `changes` override its values."""
        return cls.from_params(preset=name, profile="gpu", **changes)

    @classmethod
    def from_params(cls, /, **params: Any) -> "Config":
        """Resolve notebook or command-line parameters. A parameter that is None keeps the value of the layer below.

        `preset` names a published experiment; `profile` is cpu, t4, gpu, or auto, which detects this machine.
        """
        given = {key: value for key, value in params.items() if value is not None}
        preset = given.pop("preset", "tinyllama-guanaco-100")
        profile = _resolve_profile(given.pop("profile", "auto"))
        _check(given)
        layers = {**load_preset(preset), "preset_name": preset, "profile": profile}
        settings = {key: value for key, value in _load_yaml("profiles", profile).items() if key not in MANY_RUNS}
        share, most = settings.pop("sample_share", 1.0), settings.pop("sample_limit", None)
        if layers.get("n_samples"):
            scaled = round(layers["n_samples"] * share)
            layers["n_samples"] = min(scaled, most or scaled)
        else:
            layers["n_samples"] = most
        if layers.get("dataset") == PYTHON_DOCS:  # profiles replace downloads, and this data set needs none
            settings.pop("dataset", None)
        layers |= settings
        for name in ("model", "dataset"):  # a pinned revision is valid only for what the preset names
            if given.get(name, layers.get(name)) != layers.get(name):
                layers["revision" if name == "model" else "dataset_revision"] = "main"
        layers |= given
        return cls(**_check(layers))

    @property
    def effective_batch(self) -> int:
        """Rows per optimizer step."""
        return self.batch_size * self.gradient_accumulation

    @property
    def training_draw(self) -> int:
        """Seed of the choice of training rows."""
        return self.seed if self.draw is None else self.draw

    @property
    def selection_rows(self) -> int:
        """Number of rows that the best checkpoint or the end of training is chosen on; 0 if nothing is chosen."""
        chooses = self.keep_best or self.early_stopping_patience
        return (self.n_selection or self.n_heldout) if chooses else 0

    @property
    def identity(self) -> str:
        """Fingerprint of every setting that affects the result. Two runs may share a folder only if it is equal.

        Settings that affect only where and how fast a run is computed do not count (`identity=False` in their field).
        Of the batch, the effective size counts, but not how it is split over forward passes.
        """
        deciding = {
            field.name: value
            for field, value in zip(dataclasses.fields(self), self.to_dict().values(), strict=True)
            if field.metadata["identity"]
        }
        deciding |= {"effective_batch": self.effective_batch, "draw": self.training_draw}
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as written to `config.json`."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @property
    def params(self) -> dict[str, Any]:
        """Arguments from which `from_params` recreates this config: preset, profile, and all values that differ."""
        own = {"preset": self.preset_name, "profile": self.profile}
        plain = Config.from_params(**own).to_dict()
        return own | {key: value for key, value in self.to_dict().items() if value != plain[key]}

    def replace(self, **changes: Any) -> "Config":
        """Return a copy with other values, checked like any parameters."""
        return Config(**_check({**dataclasses.asdict(self), **changes}))

    def steps(self, n_rows: int) -> int:
        """Return the number of optimizer steps for `n_rows` training rows. An incomplete last batch is a step."""
        return self.epochs * -(-n_rows // self.effective_batch)

    def __str__(self) -> str:
        """Return one line per setting: name, value, help. The help is omitted after a long value.

        A notebook cell is 102 columns wide, which leaves 54 for the help.
        """
        lines = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            shown = ", ".join(value) if isinstance(value, tuple) else str(value)
            words = "" if len(shown) > 22 else f"  {field.metadata['help']}"
            lines.append(f"{field.name:<24}{shown:<22}{words}".rstrip())
        return "\n".join(lines)


def our_name(name: str) -> str | None:
    """Return our parameter for one of another tool, or None."""
    return next((ours for ours, theirs in _load_yaml("presets", OTHER_TOOLS).items() if name in theirs), None)


def value_type(field: "dataclasses.Field[Any]") -> Any:
    """Return the type of a field's values, ignoring None."""
    return get_args(field.type)[0] if isinstance(field.type, types.UnionType) else field.type


@cache
def _load_yaml(folder: str, name: str) -> dict[str, Any]:
    import yaml

    return yaml.safe_load((resources.files("qlora_helpers") / folder / f"{name}.yaml").read_text("utf-8"))


def of_profile(profile: str, key: str) -> Any:
    """Return a value of a profile that concerns many runs: see `MANY_RUNS`."""
    return _load_yaml("profiles", profile)[key]


def preset_names() -> list[str]:
    """Return the names of all presets, sorted."""
    folder = resources.files("qlora_helpers") / "presets"
    names = {file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml")}
    return sorted(names - {OTHER_TOOLS})


def load_preset(name: str) -> dict[str, Any]:
    """Return the keys that a preset sets. `extends: NAME` starts from another preset.

    Raises `UserError` if there is no such preset.
    """
    if name not in preset_names():
        raise UserError(f"unknown preset '{name}'.{nearest(str(name), preset_names())}")
    keys = dict(_load_yaml("presets", name))
    parent = keys.pop("extends", None)
    return {**(load_preset(parent) if parent else {}), **keys}


def _resolve_profile(profile: str) -> str:
    if profile == "auto":
        from qlora_helpers import device  # detecting the machine imports torch

        return device.profile()
    if profile not in PROFILES:
        raise UserError(f"unknown profile '{profile}'.{nearest(str(profile), ('auto', *PROFILES))}")
    return profile


def _check(values: dict[str, Any]) -> dict[str, Any]:
    """Return `values` with numbers and names converted to their field's type.

    Raises `UserError` for the first unknown name, wrong type or value out of range, and for scores that cannot be used.
    """
    fields = {field.name: field for field in dataclasses.fields(Config)}
    checked = {}
    for name, value in values.items():
        if name not in fields:
            ours = our_name(name)
            hint = f" Fix: use {ours}." if ours else nearest(name, fields)
            raise UserError(f"unknown parameter '{name}'.{hint}")
        checked[name] = _check_value(value, fields[name])
    if checked.get("score"):
        _check_score(checked["score"], bool(checked.get("run_code")))
    return checked


def _check_score(score: str, run_code: bool) -> None:
    """Raise `UserError` for an unknown kind of score, a pattern that does not compile, or code that may not run."""
    import regex

    kind, _, pattern = score.partition(":")
    if score not in SCORES[:-1] and (kind != "regex" or not pattern):
        raise UserError(f"score: unknown kind '{score}'.{nearest(kind, SCORES)}")
    if kind == "regex":
        try:
            regex.compile(pattern)
        except (regex.error, ValueError, OverflowError, RecursionError, MemoryError) as error:
            why = str(error) or type(error).__name__
            raise UserError(f"score: '{pattern}' is no regular expression ({why}). Fix: correct it.") from None
    if score == "python" and not run_code:
        raise UserError(
            "score: python runs what the model writes on this machine. Fix: run_code=True (--run-code), in a container "
            "or on a machine where that may happen."
        )


def _check_value(value: Any, field: "dataclasses.Field[Any]") -> Any:
    if value is None and isinstance(field.type, types.UnionType):  # all unions are with None
        return None
    name, limits = field.name, field.metadata
    value = as_kind(name, value, value_type(field))
    low, high, choices = limits["low"], limits["high"], limits["choices"]
    if choices and value not in choices:
        raise UserError(f"{name}: '{value}' is not one of {', '.join(choices)}.")
    if low is not None and not value >= low:  # NaN fails this comparison
        raise UserError(f"{name}: {value} is too small. Fix: use {low:g} or more.")
    if high is not None and not value <= high:
        raise UserError(f"{name}: {value} is too large. Fix: use {high:g} or less.")
    return value


def as_kind(name: str, value: Any, kind: Any) -> Any:
    """Return `value` as a `kind`: int, float, bool, str, or a tuple of names.

    Raises `UserError` if the type is wrong or the conversion would lose something. An int is accepted as a float, and
    names may be one string, separated by commas or spaces.
    """
    if kind == tuple[str, ...]:
        value = value.replace(",", " ").split() if isinstance(value, str) else value
        if isinstance(value, list | tuple) and value and all(isinstance(v, str) and v for v in value):
            return tuple(value)
        raise UserError(f"{name}: expected names such as q_proj,v_proj, got {value!r}.")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1023 else math.inf
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
    hint = " Fix: in YAML write 2.0e-4, not 2e-4." if kind is float and isinstance(value, str) else ""
    raise UserError(f"{name}: expected {words}, got {value!r} ({type(value).__name__}).{hint}")
