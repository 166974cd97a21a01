"""Did fine-tuning help, and was it the data? 100, 200 and all usable rows, and 100 rows for the steps of 200.

usage: python benchmarks/study.py DATASET --out DIR [--model FOLDER] [--seeds 3] [--profile gpu]

The recipe of the presets tinyllama-guanaco-100 and -200 on any model and rows. What is complete is not trained again:
the study may be stopped and started; the report is written from what is there.
"""

import argparse
import time
from pathlib import Path

from qlora_helpers import runs
from qlora_helpers.config import EMBEDDED_MODEL, PROFILES, Config
from qlora_helpers.data import cleaning
from qlora_helpers.evaluation import comparison, report
from qlora_helpers.experiments import matrix
from qlora_helpers.models import hub


def ladder(dataset: str, model: str, profile: str) -> dict[str, Config]:
    """The four experiments; "all" is what is left when 100 rows are held out."""
    config = Config.from_params(preset="tinyllama-guanaco-100", profile=profile, model=model, dataset=dataset)
    usable = len(cleaning.prepare(config, hub.load_tokenizer(config)).cleaned.train)
    return {
        "100 rows": config.replace(n_samples=100),
        f"100 rows, {2 * config.steps(100)} steps": config.replace(n_samples=100, epochs=2 * config.epochs),
        "200 rows": config.replace(n_samples=200),
        f"all {usable} rows": config.replace(n_samples=usable),
    }


def main() -> None:
    """Train what is missing, then compare and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--profile", default="gpu", choices=PROFILES)
    args = parser.parse_args()
    folder = runs.workdir(str(args.out))
    started = time.time()
    found: dict[str, list[runs.RunFolder]] = {}
    for name, config in ladder(args.dataset, args.model, args.profile).items():
        (item, *more) = matrix.plan_runs({name: config.replace(n_seeds=args.seeds, equal_steps=False)}, folder)
        found |= matrix.train_missing([item, *more])
        print(f"{name}: {time.time() - started:.0f} s since the start", flush=True)
    result = comparison.compare(found)
    report.write(result, found, folder)
    print(report.table_markdown(result), *report.verdicts(result), *report.forgetting(result), sep="\n")


if __name__ == "__main__":
    main()
