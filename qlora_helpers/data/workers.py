"""Share the work on many rows among processes, in the order of the rows."""

import gc
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

MANY = 5_000  # items: with fewer, processes take longer to start than they save
MOST = 8  # processes, each of which holds a copy of what the function needs
CHUNK = 10_000  # items that a process is given at once, at most
IDLE = 60  # seconds, after which a process without work ends

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Keep the collector of reference cycles from searching all rows again and again. Rows have no cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def shared(function: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item]) -> Iterator[Result]:
    """Yield the results of a function of a list, which returns one for each item.

    The function, the items and the results are pickled. The calling script needs no `__main__` guard.
    """
    import joblib

    processes = min(MOST, joblib.cpu_count())
    if len(items) < MANY or processes == 1:
        yield from function(items)
        return
    rounds = max(2, math.ceil(len(items) / (processes * CHUNK)))
    size = math.ceil(len(items) / (processes * rounds))  # equal parts: all processes end together
    parts = (items[start : start + size] for start in range(0, len(items), size))
    parallel = joblib.Parallel(processes, batch_size=1, return_as="generator", idle_worker_timeout=IDLE)
    # Said of a process that is replaced because its memory grew: it costs a second, and no result is lost.
    warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given to the executor")
    for results in parallel(joblib.delayed(_one_part)(function, part) for part in parts):
        yield from results


def _one_part(function: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item]) -> list[Result]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores are busy with the other parts
    return function(items)
