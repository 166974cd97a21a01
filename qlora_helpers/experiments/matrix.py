"""Which runs a comparison or a batch needs: experiments, seeds, sizes, one setting at a time; and training them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_helpers import runs
from qlora_helpers.config import Config, of_profile
from qlora_helpers.data import cleaning
from qlora_helpers.data.cleaning import Cleaned, Data
from qlora_helpers.errors import UserError
from qlora_helpers.models import hub
from qlora_helpers.planning import step_time
from qlora_helpers.runs import RunFolder

# A list's name as a parameter, what it changes, in words, and in a folder's name.
SETTINGS = {
    "learning_rates": ("learning_rate", "learning rate", "lr"),
    "ranks": ("rank", "rank", "rank"),
    "epochs_list": ("epochs", "epochs", "epochs"),
    "effective_batches": ("effective_batch", "effective batch", "batch"),
}
LISTS = ("sample_counts", *SETTINGS)


@dataclass(frozen=True)
class PlannedRun:
    """One run that a comparison needs, and the experiment it belongs to."""

    experiment: str
    name: str
    config: Config
    data: Data
    tokenizer: Any
    folder: Path

    @property
    def run(self) -> RunFolder:
        """The equal run that is there already, whatever its name; else the folder it will go to."""
        known = cleaning.identity(self.config, self.data)
        return runs.find(self.folder, known) or runs.choose(self.folder, self.name, known)

    @property
    def minutes(self) -> str:
        """Rough training time, in words."""
        return step_time.estimate(self.config, len(self.data.trained_on))


def plan_runs(configs: dict[str, Config], folder: Path) -> list[PlannedRun]:
    """All runs of a comparison: `n_seeds` of each experiment, and, if `equal_steps`, the first experiment trained for
    as many steps as the last: more data and more steps are two causes, and only this tells them apart.
    """
    names = list(configs)
    first, last = configs[names[0]], configs[names[-1]]
    if first.equal_steps and len(names) > 1 and first.n_samples and last.n_samples:
        longer = with_steps(first, last.steps(last.n_samples))
        if longer.epochs > first.epochs:
            configs = {**configs, f"{names[0]}, equal steps": longer}
    found = []
    for name, config in configs.items():
        tokenizer = hub.load_tokenizer(config)
        data = cleaning.prepare(config, tokenizer)
        for seed in range(config.seed, config.seed + config.n_seeds):
            run_name = name.replace(", ", "-").replace(" ", "-") + (f"-seed{seed}" if seed != config.seed else "")
            found.append(PlannedRun(name, run_name, config.replace(seed=seed), data, tokenizer, folder))
    return found


def missing_runs(planned: Iterable[PlannedRun]) -> tuple[list[PlannedRun], str]:
    """The runs that are not complete, and how long they take, in words: rough."""
    absent = [item for item in planned if not item.run.finished]
    seconds = sum(
        item.config.steps(len(item.data.trained_on)) * step_time.here(item.config)[0]
        + of_profile(item.config.profile, "seconds_per_run")
        for item in absent
    )
    source = step_time.here(absent[0].config)[1] if absent else "nothing to train"
    return absent, f"about {step_time.in_words(seconds)} ({source})"


def describe_missing(planned: list[PlannedRun]) -> str:
    """How many runs are missing, and how long they take together, in words."""
    absent, minutes = missing_runs(planned)
    if not absent:
        return f"All {len(planned)} runs are there: nothing to train."
    return f"{len(absent)} of {len(planned)} runs missing: {minutes} in all."


def train_missing(planned: list[PlannedRun]) -> dict[str, list[RunFolder]]:
    """Train what is missing, after saying how long; returns the runs of each experiment, its seeds in order."""
    found: dict[str, list[RunFolder]] = {}
    print(describe_missing(planned))
    for item in planned:
        run = item.run
        if not run.finished:
            from qlora_helpers.training import trainer  # torch and TRL: only where something is to be trained

            print(f"{item.experiment}, seed {item.config.seed}: {item.minutes}")
            trainer.train(item.config, item.data, item.tokenizer, run)
        found.setdefault(item.experiment, []).append(run)
    return found


@dataclass(frozen=True)
class Setting:
    """A config under the name that tables show and the one that its folders begin with."""

    name: str
    folder: str
    config: Config


def training_sizes(config: Config, cleaned: Cleaned, asked: Any = None) -> tuple[list[int], list[str]]:
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


def size_settings(config: Config, sample_counts: Iterable[int]) -> list[Setting]:
    """A setting for every size of training set, at the config's epochs: more rows are more steps too."""
    every = dict.fromkeys(sample_counts)
    return [Setting(f"{size} rows", f"n{size}", config.replace(n_samples=size)) for size in every]


def with_steps(config: Config, steps: int) -> Config:
    """`config` with as many epochs as come nearest to `steps` steps on its own rows; never fewer than it has."""
    one_epoch = config.replace(epochs=1).steps(config.n_samples or 0)
    return config.replace(epochs=max(config.epochs, round(steps / one_epoch)))


def equal_step_settings(config: Config, sample_counts: Sequence[int]) -> list[Setting]:
    """Every size of training set for as many steps as the largest, as nearly as whole epochs allow."""
    steps = config.steps(max(sample_counts))
    found = []
    for setting in size_settings(config, sample_counts):
        rows, longer = setting.config.n_samples or 0, with_steps(setting.config, steps)
        if longer.epochs > config.epochs:
            setting = Setting(f"{rows} rows, {longer.steps(rows)} steps", f"n{rows}-epochs{longer.epochs}", longer)
        found.append(setting)
    return found


def one_at_a_time(config: Config, rows: int, lists: Mapping[str, Any]) -> list[Setting]:
    """The config on `rows` training rows, and what the lists change of it, one value at a time; nothing without a list.

    `lists` are named as in `SETTINGS`; a value that the config has already is no change.
    """
    (base,) = size_settings(config, [rows])
    changed = {}
    for name, values in lists.items():
        key, words, short = SETTINGS[name]
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


def batch_runs(
    settings: Iterable[Setting], seeds: Iterable[int], cleaned: Cleaned, tokenizer: Any, folder: Path
) -> list[PlannedRun]:
    """Every run of the settings, once each: the base setting may be a point of the curve too."""
    data: dict[int | None, Data] = {}
    found: dict[str, PlannedRun] = {}
    seeds = list(seeds)
    for setting in settings:
        rows = setting.config.n_samples
        if rows not in data:
            data[rows] = cleaning.select(cleaned, setting.config, tokenizer)
        for seed in seeds:
            name = f"{setting.folder}-seed{seed}"
            found[name] = PlannedRun(
                setting.name, name, setting.config.replace(seed=seed), data[rows], tokenizer, folder
            )
    return list(found.values())
