"""Run notebooks headless with papermill: the series in order, or notebook 05 once per run of a batch."""

import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_helpers import device, files, runs
from qlora_helpers.config import Config
from qlora_helpers.data import cleaning
from qlora_helpers.errors import UserError
from qlora_helpers.experiments import matrix
from qlora_helpers.experiments.matrix import PlannedRun
from qlora_helpers.models import hub
from qlora_helpers.runs import RunFolder
from qlora_helpers.wording import counted

EXPERIMENTS = {  # notebooks that train a run, with its name and preset
    "05_train_exp1": ("exp1", "tinyllama-guanaco-100"),
    "06_train_exp2": ("exp2", "tinyllama-guanaco-200"),
}
SERIES = ("01_install", "02_load_data", "03_quantize", "04_attach_lora", *EXPERIMENTS, "07_compare")


def notebooks_folder() -> Path:
    """Return the folder of the notebooks: that of the checkout, else that of the installed package."""
    checkout = files.ROOT / "notebooks"
    return checkout if checkout.is_dir() else Path(__file__).parents[1] / "_notebooks"


def run_series(out: Path, samples: list[int] | None = None, **params: Any) -> Path:
    """Execute notebooks 01–07 with results in `out`, and return the path of the report.

    `samples` are the training rows of experiments 1 and 2; `params` are passed to every notebook. Finished runs are
    reused. Raises `UserError` before anything is written if parameters or data are invalid.
    """
    first, second = samples or (None, None)
    for (run_name, preset), n_samples in zip(EXPERIMENTS.values(), (first, second), strict=True):
        config = Config.from_params(preset=preset, n_samples=n_samples, **params)
        runs.check_free(RunFolder(out / run_name), config)
        tokenizer = hub.load_tokenizer(config)
        cleaning.select(
            cleaning.clean(config, tokenizer), config, tokenizer
        )  # refuses a stream: notebooks show all rows
    folder = runs.workdir(str(out))
    common = {"workdir": str(folder), **params}
    own: dict[str, dict[str, Any]] = {
        "02_load_data": {"n_samples": first},
        "05_train_exp1": {"n_samples": first, "run_name": "exp1"},
        "06_train_exp2": {"n_samples": second, "run_name": "exp2"},
        "07_compare": {"n_samples_1": first, "n_samples_2": second},
    }
    seconds = {}
    for number, name in enumerate(SERIES, 1):
        began = time.monotonic()
        execute(name, executed(folder, name), common | own.get(name, {}), f"[{number}/{len(SERIES)}] {name}")
        seconds[name] = round(time.monotonic() - began, 1)
    _note_time(folder, seconds)
    return folder / "report.md"


def executed(folder: Path, name: str) -> Path:
    """Return the path of an executed notebook of the series: in the run folder if it trains a run."""
    trains = name in EXPERIMENTS
    return folder / EXPERIMENTS[name][0] / "notebook.ipynb" if trains else folder / "notebooks" / f"{name}.ipynb"


def _note_time(folder: Path, seconds: dict[str, float]) -> None:
    """Print the total time of the notebooks, and write the times with this machine to `series.json`."""
    here = device.detect()
    print(
        f"Notebooks: {len(seconds)} done in {sum(seconds.values()):.0f} s on {here.name}, in {here.dtype}", flush=True
    )
    noted = {"device": here.to_dict(), "versions": device.versions(), "seconds": seconds}
    files.write_json(folder / "series.json", noted | {"total": round(sum(seconds.values()), 1)})


def run_batch(
    out: Path, samples: list[int], seeds: list[int], lists: Mapping[str, Any] | None = None,
    parallel: int | None = None, **params: Any,
) -> list[RunFolder]:  # fmt: skip
    """Train one run per sample count and seed and, at the largest count, per value in `lists` (see `matrix.SETTINGS`).

    `parallel` is that of `train`. Raises `UserError` before anything is written if parameters or data are invalid, or
    if a folder holds another run.
    """
    if parallel is not None and parallel < 1:
        raise UserError(f"parallel: {parallel} is too small. Fix: use 1 or more.")
    config = Config.from_params(preset="tinyllama-guanaco-100", n_samples=max(samples), **params)
    tokenizer = hub.load_tokenizer(config)
    cleaned = cleaning.clean(config, tokenizer)
    settings = [*matrix.size_settings(config, samples), *matrix.one_at_a_time(config, max(samples), lists or {})]
    needed = matrix.batch_runs(settings, seeds, cleaned, tokenizer, out.expanduser().resolve())
    for item in needed:
        if item.run.identity() is None:
            runs.check_free(RunFolder(item.folder / item.name), item.config, item.identity)
    runs.workdir(str(out))
    return [run for group in train(needed, parallel=parallel).values() for run in group]


def train(needed: Sequence[PlannedRun], bar: bool = True, parallel: int | None = None) -> dict[str, list[RunFolder]]:
    """Execute notebook 05 for every run that is not finished, under any folder name. Interrupted runs are resumed.

    Returns the runs of each experiment in order of seed. `bar` shows papermill's progress bar, which does not work
    inside a notebook. `parallel` runs train at a time, each on a GPU of its own as far as there are enough; None: as
    many as there are GPUs. A failed run does not stop the others: `UserError` is raised at the end.
    """
    gpus = visible_gpus()
    workers = min(parallel or max(1, len(gpus)), len(needed))
    results: dict[str, list[RunFolder]] = {}
    with _pool(workers, gpus) as run_all:
        outcomes = run_all(_attempt, _jobs(needed, bar and workers <= 1, results))
        failed = [name for name in outcomes if name is not None]
    if failed:
        raise UserError(
            f"batch: {len(failed)} of {counted(len(needed), 'run')} failed ({', '.join(failed)}); the others are "
            "finished. Fix: correct the errors printed above, then run the same command again."
        )
    return results


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    import torch

    number = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(number)))
    return named.split(",")[:number]


@contextmanager
def _pool(workers: int, gpus: list[str]) -> Iterator[Any]:
    """A `map` over processes that see one GPU each, or for one worker the built-in one, in this process."""
    if workers <= 1:
        yield map
        return
    fresh = multiprocessing.get_context("spawn")  # a copy of this process would share its state of CUDA
    free = fresh.Queue()
    for worker in range(workers):
        free.put(gpus[worker % len(gpus)] if gpus else None)
    with ProcessPoolExecutor(workers, fresh, _take_gpu, (free,)) as pool:
        yield pool.map


def _take_gpu(free: Any) -> None:
    """Let this process, and the notebooks that it starts, see only the next GPU of a queue."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # otherwise Ctrl-C ends one run and the next one begins
    if (gpu := free.get()) is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu


def _jobs(
    needed: Sequence[PlannedRun], bar: bool, results: dict[str, list[RunFolder]]
) -> Iterator[tuple[Path, dict[str, Any], str, bool]]:
    """Yield the arguments of `execute` for every run that is not finished, and note all runs in `results`."""
    for number, item in enumerate(needed, 1):
        run = item.run
        results.setdefault(item.experiment, []).append(run)
        label = f"[{number}/{len(needed)}] {run.name}"
        if run.finished:
            _say(f"{label}: complete, not run again")
        else:
            params = item.config.params | {"workdir": str(item.folder), "run_name": run.name}
            yield run / "notebook.ipynb", params, label, bar


def _attempt(job: tuple[Path, dict[str, Any], str, bool]) -> str | None:
    """Execute notebook 05 for one run. If it fails, print why and return the run's name."""
    target, params, label, bar = job
    try:
        execute("05_train_exp1", target, params, label, bar)
    except UserError as error:
        _say(f"{label}: failed: {error}")
        return target.parent.name
    return None


def execute(name: str, target: Path, params: dict[str, Any], label: str, bar: bool = True) -> None:
    """Execute one notebook with papermill and write the result to `target`.

    Shows a progress bar over the cells or, without a terminal or without `bar`, one line at the start and one at the
    end. Every error in the notebook is raised as a `UserError` that names the notebook and the cell.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    target.parent.mkdir(parents=True, exist_ok=True)
    # papermill warns about parameters that a cell does not list. The notebooks accept more and check names themselves.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    bar, began = bar and sys.stdout.isatty(), time.monotonic()
    if not bar:
        _say(f"{label}: begins")
    try:
        papermill.execute_notebook(
            notebooks_folder() / f"{name}.ipynb",
            target,
            parameters={key: value for key, value in params.items() if value is not None},
            kernel_name="python3",
            progress_bar={"desc": label, "file": sys.stdout} if bar else False,
            shutdown_kernel="immediate",  # all cells are done, and a graceful shutdown takes seconds
            extra_arguments=["--log-level=ERROR"],  # hides the kernel's messages about its transport
        )
    except PapermillExecutionError as error:
        if error.ename == "UserError":
            raise UserError(f"{error.evalue} (Notebook {name}, cell {error.exec_count}.)") from None
        why = (error.evalue.strip().splitlines() or [""])[-1]
        raise UserError(
            f"notebook {name}, cell {error.exec_count}: {error.ename}: {why}. Fix: see the executed notebook, {target}."
        ) from None
    except DeadKernelError:
        raise UserError(
            f"notebook {name}: its process was killed, most likely because the machine ran out of memory. Fix: use a "
            "smaller model or batch_size, or free some memory; then run the same command again."
        ) from None
    if not bar:
        _say(f"{label}: done in {time.monotonic() - began:.0f} s")


def _say(line: str) -> None:
    """Print a line in one piece: runs at the same time share the terminal."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
