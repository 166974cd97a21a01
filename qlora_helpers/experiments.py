"""The runs that a comparison needs: every experiment with its seeds, and the control of equal steps."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_helpers import cleaning, hub, runs
from qlora_helpers.cleaning import Data
from qlora_helpers.config import Config
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
        return self.config.minutes(len(self.data.trained_on))


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


def outlook(needed: list[Wanted]) -> str:
    """How many runs are missing, and how long they take together, in words."""
    missing = [item for item in needed if not item.run.complete]
    if not missing:
        return f"All {len(needed)} runs are there: nothing to train."
    seconds = sum(item.config.steps(len(item.data.trained_on)) * item.config.seconds_per_step for item in missing)
    return (
        f"{len(missing)} of {len(needed)} runs missing: about {max(1, round(seconds / 60))} min of training in all "
        "(with the profile's own model), and loading and measuring on top."
    )


def complete(needed: list[Wanted]) -> dict[str, list[RunFolder]]:
    """Train what is missing, after saying how long; returns the runs of each experiment, its seeds in order."""
    found: dict[str, list[RunFolder]] = {}
    print(outlook(needed))
    for item in needed:
        run = item.run
        if not run.complete:
            from qlora_helpers import training  # torch and TRL: only where something is to be trained

            print(f"{item.experiment}, seed {item.config.seed}: {item.minutes}")
            training.train(item.config, item.data, item.tokenizer, run)
        found.setdefault(item.experiment, []).append(run)
    return found
