"""Which runs a batch needs: sizes of training set, and a base config with one setting at a time changed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_helpers.config import Config, of_profile
from qlora_helpers.data import cleaning
from qlora_helpers.data.cleaning import Cleaned, Data
from qlora_helpers.errors import UserError
from qlora_helpers.experiments.matrix import Wanted

# A list's name as a parameter, what it changes, in words, and in a folder's name.
KNOBS = {
    "learning_rates": ("learning_rate", "learning rate", "lr"),
    "ranks": ("rank", "rank", "rank"),
    "epochs_list": ("epochs", "epochs", "epochs"),
    "effective_batches": ("effective_batch", "effective batch", "batch"),
}
LISTS = ("sample_counts", *KNOBS)


@dataclass(frozen=True)
class Setting:
    """A config under the name that tables show and the one that its folders begin with."""

    name: str
    folder: str
    config: Config


def counts(config: Config, cleaned: Cleaned, asked: Any = None) -> tuple[list[int], list[str]]:
    """Sizes of training set, rising, and what became of the ones `asked` for (None: the profile's list).

    For all that are larger than the data, the largest possible comes in. Raises `UserError` for what is no list of
    sizes, and where fewer than two are left: one point makes no curve.
    """
    cleaning.check_enough(cleaned, config.n_heldout, 1)
    wanted = _list("sample_counts", of_profile(config.profile, "sample_counts") if asked is None else asked)
    sizes = sorted({config.replace(n_samples=size).n_samples or 0 for size in wanted})
    remarks = []
    if twice := [size for size in sizes if wanted.count(size) > 1]:
        remarks.append(f"sample_counts: {_join(twice)} named more than once, run once")
    left = len(cleaned.train)
    if over := [size for size in sizes if size > left]:
        remarks.append(f"sample_counts: the data has {left} rows to train on: {left} instead of {_join(over)}")
        sizes = sorted({left, *sizes} - {*over})
    if len(sizes) < 2:
        raise UserError(
            f"sample_counts: a curve needs two sizes or more, and {_join(sizes)} alone is left of {_join(wanted)} "
            f"({left} rows to train on). Fix: name smaller ones."
        )
    return sizes, remarks


def sizes(config: Config, sample_counts: Iterable[int]) -> list[Setting]:
    """A setting for every size of training set, at the config's epochs: more rows are more steps too."""
    every = dict.fromkeys(sample_counts)
    return [Setting(f"{size} rows", f"n{size}", config.replace(n_samples=size)) for size in every]


def equal_steps(config: Config, sample_counts: Sequence[int]) -> list[Setting]:
    """Every size of training set for as many steps as the largest, as nearly as whole epochs allow."""
    steps = config.steps(max(sample_counts))
    found = []
    for setting in sizes(config, sample_counts):
        rows = setting.config.n_samples or 0
        epochs = max(config.epochs, round(steps / config.replace(epochs=1).steps(rows)))
        if epochs > config.epochs:
            longer = setting.config.replace(epochs=epochs)
            setting = Setting(f"{rows} rows, {longer.steps(rows)} steps", f"n{rows}-epochs{epochs}", longer)
        found.append(setting)
    return found


def knobs(config: Config, rows: int, lists: Mapping[str, Any]) -> list[Setting]:
    """The config on `rows` training rows, and what the lists change of it, one value at a time; nothing without a list.

    `lists` are named as in `KNOBS`; a value that the config has already is no change.
    """
    (base,) = sizes(config, [rows])
    changed = {}
    for name, values in lists.items():
        key, words, short = KNOBS[name]
        for value in [] if values is None else _list(name, values):
            varied = _with(base.config, key, value)
            if varied.identity != base.config.identity:
                changed[words, value] = Setting(f"{words} {value:g}", f"{base.folder}-{short}{value:g}", varied)
    return [base, *changed.values()] if changed else []


def _with(config: Config, key: str, value: Any) -> Config:
    """The config with one value changed. An effective batch is split into the largest passes the config allows."""
    if key != "effective_batch":
        return config.replace(**{key: value})
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"effective_batches: {value!r} is no number of rows. Fix: whole numbers, 1 or more.")
    batch = max(size for size in range(1, config.batch_size + 1) if value % size == 0)
    return config.replace(batch_size=batch, gradient_accumulation=value // batch)


def _list(name: str, asked: Any) -> list[Any]:
    if isinstance(asked, list | tuple) and asked and None not in asked:
        return list(asked)
    raise UserError(
        f"{name}: expected a list of numbers such as [1, 2], got {asked!r}. Fix: with papermill, -y '{name}: [1, 2]'."
    )


def _join(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def needed(
    settings: Iterable[Setting], seeds: Iterable[int], cleaned: Cleaned, tokenizer: Any, folder: Path
) -> list[Wanted]:
    """Every run of the settings, once each: what a knob is turned from may be a point of the curve too."""
    data: dict[int | None, Data] = {}
    found: dict[str, Wanted] = {}
    seeds = list(seeds)
    for setting in settings:
        rows = setting.config.n_samples
        if rows not in data:
            data[rows] = cleaning.select(cleaned, setting.config, tokenizer)
        for seed in seeds:
            name = f"{setting.folder}-seed{seed}"
            found[name] = Wanted(setting.name, name, setting.config.replace(seed=seed), data[rows], tokenizer, folder)
    return list(found.values())
