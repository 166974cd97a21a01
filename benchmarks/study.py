"""Does fine-tuning help, and is it the data? Train on 100, 200 and all usable rows, and on 100 rows for more steps.

usage: python benchmarks/study.py DATASET --out DIR [--model FOLDER] [--seeds 3] [--profile gpu]

The recipe is that of the presets tinyllama-guanaco-100 and -200, on any model and rows. The run on 100 rows is repeated
with as many steps as the one on 200 rows. Finished runs are reused, so the study can be stopped and restarted.
"""

import argparse
import time
from pathlib import Path

from qlora_helpers import runs
from qlora_helpers.config import BUNDLED_MODEL, PROFILES, Config
from qlora_helpers.data import cleaning
from qlora_helpers.evaluation import comparison, report
from qlora_helpers.experiments import matrix
from qlora_helpers.models import hub


def ladder(dataset: str, model: str, profile: str) -> dict[str, Config]:
    """Return the four experiments. "All" rows are those left after 100 are held out."""
    config = Config.from_params(preset="tinyllama-guanaco-100", profile=profile, model=model, dataset=dataset)
    usable = len(cleaning.prepare(config, hub.load_tokenizer(config)).cleaned.train)
    return {
        "100 rows": config.replace(n_samples=100),
        f"100 rows, {2 * config.steps(100)} steps": config.replace(n_samples=100, epochs=2 * config.epochs),
        "200 rows": config.replace(n_samples=200),
        f"all {usable} rows": config.replace(n_samples=usable),
    }


def main() -> None:
    """Train missing runs, compare them and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=BUNDLED_MODEL)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--profile", default="gpu", choices=PROFILES)
    args = parser.parse_args()
    folder = runs.workdir(str(args.out))
    started = time.time()
    trained: dict[str, list[runs.RunFolder]] = {}
    for name, config in ladder(args.dataset, args.model, args.profile).items():
        (item, *more) = matrix.plan_runs({name: config.replace(n_seeds=args.seeds, equal_steps=False)}, folder)
        trained |= matrix.train_missing([item, *more])
        print(f"{name}: {time.time() - started:.0f} s since the start", flush=True)
    result = comparison.compare(trained)
    report.write(result, trained, folder)
    print(report.table_markdown(result), *report.verdicts(result), *report.forgetting(result), sep="\n")


if __name__ == "__main__":
    main()
