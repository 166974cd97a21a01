"""At which size does a fine-tune pay? Train on several sizes and draws of training rows; judge against every rival.

usage: python benchmarks/study.py DATASET --out DIR [--samples 100 200 400] [--draws 9] [--larger 800 1600]
                                  [--larger-draws 3] [--model FOLDER] [--workers 12] [--limit SECONDS]

The recipe is that of the preset tinyllama-guanaco-100, on any model and rows. Each size is trained with the epochs of
the recipe, and again with as many steps as the largest, on each draw of training rows with a seed of its own; two more
seeds of the first draw show what the seed alone changes. Larger sizes, which take longest, have fewer draws and no
control with equal steps. The first run is alone on its GPU, so that its speed is that of one run; the others share
GPUs. Finished runs are reused, and stopped ones go on from their last checkpoint, so the study can be continued.
"""

import argparse
import dataclasses
import os
import statistics
import time
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

import torch

from qlora_helpers import files, runs
from qlora_helpers.config import BUNDLED_MODEL, PROFILES, Config
from qlora_helpers.data import cleaning
from qlora_helpers.evaluation import comparison, report
from qlora_helpers.evaluation.row_losses import mean_loss, read_losses
from qlora_helpers.experiments import matrix
from qlora_helpers.experiments.matrix import PlannedRun
from qlora_helpers.models import hub

SEEDS_OF_ONE_DRAW = 3
ONE_DRAW = "one draw"


def plan(config: Config, sizes: list[int], draws: int, larger: list[int], few: int, folder: Path) -> list[PlannedRun]:
    """Return every run of the study. Only the first draw answers questions: greedy answers are not averaged."""
    tokenizer = hub.load_tokenizer(config)
    cleaned = cleaning.clean(config.replace(n_samples=max(sizes + larger)), tokenizer)
    settings = [*matrix.size_settings(config, sizes)[:-1], *matrix.equal_step_settings(config, sizes)]
    planned = matrix.batch_runs(settings, range(draws), cleaned, tokenizer, folder)
    if larger:
        settings = matrix.size_settings(config, larger)
        planned += matrix.batch_runs(settings, range(few), cleaned, tokenizer, folder)
    first = planned[0]
    for seed in range(1, SEEDS_OF_ONE_DRAW):
        again = first.config.replace(seed=seed, draw=first.config.training_draw)
        planned.append(PlannedRun(ONE_DRAW, f"one-draw-seed{seed}", again, first.data, tokenizer, folder))
    return [
        item if item.config.seed == 0 else dataclasses.replace(item, config=item.config.replace(n_answers=0))
        for item in planned
    ]


def train(item: PlannedRun) -> None:
    """Train one run in this process."""
    from qlora_helpers.training import trainer

    trainer.train(item.config, item.data, item.tokenizer, item.run)
    print(f"{item.name}: finished", flush=True)


def train_all(missing: list[PlannedRun], first: PlannedRun, workers: int, limit: float) -> None:
    """Train the runs, each on one GPU, the longest first. After `limit` seconds, no further one is begun.

    The first run of the study has its GPU for itself. The others begin when it has measured the rivals, which they
    would otherwise measure too.
    """
    began = time.monotonic()
    slots = [number % max(1, torch.cuda.device_count()) for number in range(workers)]
    running: dict[SpawnProcess, list[int]] = {}
    free = slots
    if first in missing:
        alone = start(first, gpu=0)
        while alone.is_alive() and not (first.run / "log.jsonl").exists():
            time.sleep(0.2)
        running[alone] = [slot for slot in slots if slot == 0]
        free = [slot for slot in slots if slot != 0]
    for item in sorted((one for one in missing if one is not first), key=steps, reverse=True):
        while not free:
            wait([process.sentinel for process in running])
            for process in [one for one in running if not one.is_alive()]:
                free.extend(running.pop(process))
        if time.monotonic() - began > limit:
            break
        gpu = free.pop(0)
        running[start(item, gpu)] = [gpu]
    for process in running:
        process.join()


def start(item: PlannedRun, gpu: int) -> SpawnProcess:
    """Begin a run in a process of its own, which sees one GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)  # must be set before the process begins to count GPUs
    process = get_context("spawn").Process(target=train, args=(item,))
    process.start()
    return process


def steps(item: PlannedRun) -> int:
    """Optimizer steps of a run."""
    return item.config.steps(len(item.data.trained_on))


def spread(planned: list[PlannedRun]) -> dict[str, float]:
    """Standard deviation of the held-out loss over draws, each with its own seed, and over seeds of one draw."""
    first = planned[0].experiment
    over_draws = [mean_loss(read_losses(item.run)) for item in planned if item.experiment == first]
    over_seeds = over_draws[:1] + [mean_loss(read_losses(item.run)) for item in planned if item.experiment == ONE_DRAW]
    return {"draws and seeds": statistics.stdev(over_draws), "seeds": statistics.stdev(over_seeds)}


def main() -> None:
    """Train missing runs, compare them and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, nargs="+", default=[100, 200, 400])
    parser.add_argument("--draws", type=int, default=9)
    parser.add_argument("--larger", type=int, nargs="*", default=[800, 1600])
    parser.add_argument("--larger-draws", type=int, default=3)
    parser.add_argument("--model", default=BUNDLED_MODEL)
    parser.add_argument("--profile", default="gpu", choices=PROFILES)
    parser.add_argument("--workers", type=int, default=12, help="runs at a time")
    parser.add_argument("--limit", type=float, default=float("inf"), help="begin no run after this many seconds")
    args = parser.parse_args()
    folder = runs.workdir(str(args.out))
    config = Config.from_params(
        preset="tinyllama-guanaco-100", profile=args.profile, model=args.model, dataset=args.dataset, n_heldout=100
    )
    planned = plan(config, args.samples, args.draws, args.larger, args.larger_draws, folder)
    train_all([item for item in planned if not item.run.finished], planned[0], args.workers, args.limit)
    finished = [item for item in planned if item.run.finished]
    print(f"{len(finished)} of {len(planned)} runs are finished.")
    if len(finished) < len(planned):
        return
    trained: dict[str, list[runs.RunFolder]] = {}
    for item in planned:
        if item.experiment != ONE_DRAW:
            trained.setdefault(item.experiment, []).append(item.run)
    result = comparison.compare(trained)
    report.write(result, trained, folder)
    files.write_json(folder / "spread.json", spread(planned))
    print(report.table_markdown(result, speed=False), *report.verdicts(result), *report.forgetting(result), sep="\n")


if __name__ == "__main__":
    main()
