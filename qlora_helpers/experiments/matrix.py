"""The runs that a comparison needs: every experiment with its seeds, and the control of equal steps."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_helpers import runs
from qlora_helpers.config import Config, of_profile
from qlora_helpers.data import cleaning
from qlora_helpers.data.cleaning import Data
from qlora_helpers.models import hub
from qlora_helpers.planning import step_time
from qlora_helpers.runs import RunFolder


@dataclass(frozen=True)
class Wanted:
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


def wanted(configs: dict[str, Config], folder: Path) -> list[Wanted]:
    """All runs of a comparison: `n_seeds` of each experiment, and, if `equal_steps`, the first experiment trained for
    as many steps as the last: more data and more steps are two causes, and only this tells them apart.
    """
    names = list(configs)
    first, last = configs[names[0]], configs[names[-1]]
    if first.equal_steps and len(names) > 1 and first.n_samples and last.n_samples:
        epochs = round(last.epochs * last.n_samples / first.n_samples)
        if epochs > first.epochs:
            configs = {**configs, f"{names[0]}, equal steps": first.replace(epochs=epochs)}
    found = []
    for name, config in configs.items():
        tokenizer = hub.load_tokenizer(config)
        data = cleaning.prepare(config, tokenizer)
        for seed in range(config.seed, config.seed + config.n_seeds):
            run_name = name.replace(", ", "-").replace(" ", "-") + (f"-seed{seed}" if seed != config.seed else "")
            found.append(Wanted(name, run_name, config.replace(seed=seed), data, tokenizer, folder))
    return found


def missing(needed: Iterable[Wanted]) -> tuple[list[Wanted], str]:
    """The runs that are not complete, and how long they take, in words: rough."""
    absent = [item for item in needed if not item.run.complete]
    seconds = sum(
        item.config.steps(len(item.data.trained_on)) * step_time.here(item.config)[0]
        + of_profile(item.config.profile, "seconds_per_run")
        for item in absent
    )
    source = step_time.here(absent[0].config)[1] if absent else "nothing to train"
    return absent, f"about {step_time.in_words(seconds)} ({source})"


def outlook(needed: list[Wanted]) -> str:
    """How many runs are missing, and how long they take together, in words."""
    absent, minutes = missing(needed)
    if not absent:
        return f"All {len(needed)} runs are there: nothing to train."
    return f"{len(absent)} of {len(needed)} runs missing: {minutes} in all."


def complete(needed: list[Wanted]) -> dict[str, list[RunFolder]]:
    """Train what is missing, after saying how long; returns the runs of each experiment, its seeds in order."""
    found: dict[str, list[RunFolder]] = {}
    print(outlook(needed))
    for item in needed:
        run = item.run
        if not run.complete:
            from qlora_helpers.training import trainer  # torch and TRL: only where something is to be trained

            print(f"{item.experiment}, seed {item.config.seed}: {item.minutes}")
            trainer.train(item.config, item.data, item.tokenizer, run)
        found.setdefault(item.experiment, []).append(run)
    return found
