"""Work on many rows in several processes."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

MANY = 20_000  # items from which starting processes pays
SPAN = 500  # items that a process takes at a time
Item = TypeVar("Item")
Result = TypeVar("Result")

_task: tuple[Callable[[Any], Any], Sequence[Any]]  # what forked processes work on, without a copy


def in_order(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yield `work(item)` of each item, in order; of `MANY` items, from a process for each processor.

    `work` must change nothing and use no torch. The processes are forked, so that they share the memory and the seed of
    `hash`; on systems where that is not safe, there is one process. Raises what `work` raises.
    """
    global _task
    processors = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    if len(items) < MANY or processors == 1:
        yield from map(work, items)
        return
    _task = work, items
    with multiprocessing.get_context("fork").Pool(processors, _begin) as pool:
        for results in pool.imap(_span, range(0, len(items), SPAN)):
            yield from results


def _begin() -> None:
    """End with the parent: an interruption is for it, and if it is killed, nobody waits for the results."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _span(start: int) -> list[Any]:
    work, items = _task
    return [work(item) for item in items[start : start + SPAN]]
