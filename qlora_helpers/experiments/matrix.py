"""The runs that a comparison or a batch needs, by experiment, seed, size or single setting; and training them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from qlora_helpers.wording import counted, noun

# Parameter with the list of values: the setting that it varies, and that setting's name in tables and in folder names.
SETTINGS = {
    "learning_rates": ("learning_rate", "learning rate", "lr"),
    "ranks": ("rank", "rank", "rank"),
    "epochs_list": ("epochs", "epochs", "epochs"),
    "effective_batches": ("effective_batch", "effective batch", "batch"),
}
LISTS = ("sample_counts", *SETTINGS)
Drawn = dict[tuple[int | None, int], Data]  # rows by their number and draw


@dataclass(frozen=True)
class PlannedRun:
    """One run that a comparison needs, and the experiment it belongs to."""

    experiment: str
    name: str
    config: Config
    data: Data
    tokenizer: Any
    folder: Path

    @cached_property
    def identity(self) -> dict[str, str]:
        """Fingerprints of its settings and of all rows of its data set."""
        return cleaning.identity(self.config, self.data)

    @property
    def run(self) -> RunFolder:
        """An equal run that exists, under any name, else the folder for this run."""
        return runs.find(self.folder, self.identity) or runs.choose(self.folder, self.name, self.identity)

    @property
    def minutes(self) -> str:
        """Rough training time, in words."""
        return step_time.estimate(self.config, len(self.data.trained_on))


def plan_runs(configs: dict[str, Config], folder: Path) -> list[PlannedRun]:
    """Return all runs of a comparison: `n_seeds` runs of each experiment, each on its own draw of training rows.

    With `equal_steps`, the first experiment is also trained for as many steps as the last. More data and more steps are
    two causes, and only this control separates them.
    """
    names = list(configs)
    first, last = configs[names[0]], configs[names[-1]]
    if first.equal_steps and len(names) > 1 and first.n_samples and last.n_samples:
        longer = with_steps(first, last.steps(last.n_samples))
        if longer.epochs > first.epochs:
            configs = {**configs, f"{names[0]}, equal steps": longer}
    planned = []
    for name, config in configs.items():
        tokenizer = hub.load_tokenizer(config)
        cleaned = cleaning.clean(config, tokenizer)
        drawn: Drawn = {}
        for seed in range(config.seed, config.seed + config.n_seeds):
            run_name = name.replace(", ", "-").replace(" ", "-") + (f"-seed{seed}" if seed != config.seed else "")
            own = config.replace(seed=seed)
            planned.append(PlannedRun(name, run_name, own, _select(drawn, cleaned, own, tokenizer), tokenizer, folder))
    return planned


def _select(drawn: Drawn, cleaned: Cleaned, config: Config, tokenizer: Any) -> Data:
    """Return the rows of a config, selected once for all runs of the same size and draw."""
    key = config.n_samples, config.training_draw
    if key not in drawn:
        drawn[key] = cleaning.select(cleaned, config, tokenizer)
    return drawn[key]


def missing_runs(planned: Iterable[PlannedRun]) -> tuple[list[PlannedRun], str]:
    """Return the runs that are not finished, and the rough time they need together, in words."""
    absent = [item for item in planned if not item.run.finished]
    seconds = sum(
        item.config.steps(len(item.data.trained_on)) * step_time.here(item.config)[0]
        + of_profile(item.config.profile, "seconds_per_run")
        for item in absent
    )
    source = step_time.here(absent[0].config)[1] if absent else "nothing to train"
    return absent, f"about {step_time.in_words(seconds)} ({source})"


def train_missing(planned: list[PlannedRun]) -> dict[str, list[RunFolder]]:
    """Print how long the missing runs take, then train them. Returns the runs of each experiment in order of seed."""
    results: dict[str, list[RunFolder]] = {}
    absent, minutes = missing_runs(planned)
    missing = f"{len(absent)} of {counted(len(planned), 'run')} missing: {minutes} in total, with evaluation."
    print(missing if absent else f"{counted(len(planned), 'finished run')} found: nothing to train.")
    for item in planned:
        run = item.run
        if not run.finished:
            from qlora_helpers.training import trainer  # imports torch and TRL, which finished runs do not need

            print(f"{item.experiment}, seed {item.config.seed}: training takes {item.minutes}")
            trainer.train(item.config, item.data, item.tokenizer, run)
        results.setdefault(item.experiment, []).append(run)
    return results


@dataclass(frozen=True)
class Setting:
    """A config, its name in tables, and the prefix of its folder names."""

    name: str
    folder: str
    config: Config


def training_sizes(config: Config, cleaned: Cleaned, asked: Any = None) -> tuple[list[int], list[str]]:
    """Return increasing sizes of the training set, and remarks on how they differ from those `asked` for.

    None asks for the profile's list. Sizes larger than the data are replaced by the number of training rows. Raises
    `UserError` if `asked` is not a list of sizes, or if fewer than two sizes are left: one point is not a curve.
    """
    cleaning.check_enough(cleaned, config.n_heldout, 1)
    wanted = _list("sample_counts", of_profile(config.profile, "sample_counts") if asked is None else asked)
    sizes = sorted({config.replace(n_samples=size).n_samples or 0 for size in wanted})
    remarks = []
    if twice := [size for size in sizes if wanted.count(size) > 1]:
        remarks.append(f"sample_counts: {_join(twice)} given more than once, run once")
    left = len(cleaned.train)
    if over := [size for size in sizes if size > left]:
        remarks.append(f"sample_counts: {left} instead of {_join(over)}, the number of training rows")
        sizes = sorted({left, *sizes} - {*over})
    if len(sizes) < 2:
        raise UserError(
            f"sample_counts: a curve needs at least two sizes, but only {_join(sizes)} is left of {_join(wanted)} "
            f"({counted(left, 'training row')}). Fix: pass smaller sizes."
        )
    return sizes, remarks


def size_settings(config: Config, sample_counts: Iterable[int]) -> list[Setting]:
    """Return one setting per size of the training set, with the config's epochs: more rows also mean more steps."""
    every = dict.fromkeys(sample_counts)
    return [Setting(f"{size} {noun(size, 'row')}", f"n{size}", config.replace(n_samples=size)) for size in every]


def with_steps(config: Config, steps: int) -> Config:
    """Return `config` with the number of epochs closest to `steps` steps on its own rows, but no fewer than it has."""
    one_epoch = config.replace(epochs=1).steps(config.n_samples or 0)
    return config.replace(epochs=max(config.epochs, round(steps / one_epoch)))


def equal_step_settings(config: Config, sample_counts: Sequence[int]) -> list[Setting]:
    """Return one setting per size of the training set, each with as many steps as the largest, up to whole epochs."""
    steps = config.steps(max(sample_counts))
    settings = []
    for setting in size_settings(config, sample_counts):
        rows, longer = setting.config.n_samples or 0, with_steps(setting.config, steps)
        if longer.epochs > config.epochs:
            steps_taken = longer.steps(rows)
            name = f"{setting.name}, {steps_taken} {noun(steps_taken, 'step')}"
            setting = Setting(name, f"n{rows}-epochs{longer.epochs}", longer)
        settings.append(setting)
    return settings


def one_at_a_time(config: Config, rows: int, lists: Mapping[str, Any]) -> list[Setting]:
    """Return the config on `rows` training rows, and one setting for each value in `lists` that changes it.

    `lists` are named as in `SETTINGS`. Values that the config already has are skipped. If nothing changes, the result
    is empty.
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
    """Return the config with one value changed. An effective batch is split into the largest passes it allows."""
    if key != "effective_batch":
        return config.replace(**{key: value})
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"effective_batches: expected a number of rows, got {value!r}. Fix: use integers, 1 or more.")
    batch = max(size for size in range(1, config.batch_size + 1) if value % size == 0)
    return config.replace(batch_size=batch, gradient_accumulation=value // batch)


def _list(name: str, asked: Any) -> list[Any]:
    if isinstance(asked, list | tuple) and asked and None not in asked:
        return list(asked)
    raise UserError(
        f"{name}: expected a list of numbers such as [1, 2], got {asked!r}. "
        f"Fix: with papermill, pass -y '{name}: [1, 2]'."
    )


def _join(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def batch_runs(
    settings: Iterable[Setting], seeds: Iterable[int], cleaned: Cleaned, tokenizer: Any, folder: Path
) -> list[PlannedRun]:
    """Return every run of the settings and seeds once, each on the rows that its seed draws.

    The base setting may also be a point of the curve.
    """
    drawn: Drawn = {}
    planned: dict[str, PlannedRun] = {}
    seeds = list(seeds)
    for setting in settings:
        for seed in seeds:
            name, own = f"{setting.folder}-seed{seed}", setting.config.replace(seed=seed)
            data = _select(drawn, cleaned, own, tokenizer)
            planned[name] = PlannedRun(setting.name, name, own, data, tokenizer, folder)
    return list(planned.values())
