"""Stop a chat template that does not come to an end. It is a program that comes with a model.

A signal would reach the main thread only, and JupyterLab runs the clicks of a panel in others. A process of its own
would copy every conversation there and back. Here, one thread watches the others and raises an exception in one that
takes too long.
"""

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from jinja2 import Environment, TemplateSyntaxError

from qlora_helpers.errors import UserError

SECONDS = 10.0  # for one conversation: real templates take milliseconds
POLL = 0.5  # seconds between two looks of the watching thread
ENDLESS = "template: the model's chat template {}. Fix: template=guanaco or template=instruction, or another model."


class _TimeIsUp(BaseException):
    """Raised in a thread that takes too long. `except Exception` does not catch it."""


_ends: dict[int, float] = {}  # when the time of each thread is up
_lock = threading.Lock()
_watcher: threading.Thread | None = None


@contextmanager
def limited() -> Iterator[None]:
    """Raise `UserError` in this thread, whichever it is, if the body renders for more than `SECONDS`."""
    global _watcher
    me = threading.get_ident()
    with _lock:
        _ends[me] = time.monotonic() + SECONDS
        if _watcher is None or not _watcher.is_alive():  # also after a fork
            _watcher = threading.Thread(target=_watch, name="template time limit", daemon=True)
            _watcher.start()
    try:
        yield
    except _TimeIsUp:
        raise UserError(ENDLESS.format(f"does not come to an end within {SECONDS:g} s")) from None
    finally:
        with _lock:
            _ends.pop(me, None)


def _watch() -> None:
    while True:
        time.sleep(POLL)
        with _lock:
            for thread in [thread for thread, end in _ends.items() if end < time.monotonic()]:
                del _ends[thread]
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_TimeIsUp))


def check_operators(template: str) -> None:
    """Raise `UserError` for a chat template with the operator `**`: a power is one step, which no time limit stops."""
    try:
        operators = [value for _, kind, value in Environment().lex(template) if kind == "operator"]
    except TemplateSyntaxError:
        return  # whoever renders it says what is wrong
    if "**" in operators:
        raise UserError(ENDLESS.format("computes powers (**)"))
