"""The exception for errors that the user can fix, the boundary that turns others into it, and suggestions for names.

Any exception that a given file causes becomes one line that names the file, with the traceback in a log file. There are
two ways: `blame`, around code that only reads a file, and `explain`, at the command line and in notebooks, for whatever
is left. Errors of our own stay what they are.
"""

import contextlib
import errno
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from types import TracebackType
from typing import Any

from qlora_helpers import quoting

PACKAGE = str(Path(__file__).parent)
LONGEST = 300  # characters of a reason; libraries quote whole files
FULL = (errno.ENOSPC, errno.EDQUOT)
NO_SPACE = "No space left on device"  # in the words of libraries that have errors of their own
NO_MEMORY = ("can't allocate memory", "out of memory", "bad allocation", "malloc of size", "std::bad_alloc")
BUGS = (NameError, ImportError, AssertionError, NotImplementedError)  # no file can make our own code raise these
BUG = "Fix: check it; if it is as it should be, report the log as a bug."
given: deque[str] = deque(maxlen=4)  # the paths given last, for `explain`


class UserError(Exception):
    """An error that the user can fix: one line that says what is wrong, where, and how to fix it.

    The command line prints it and exits with code 2. A notebook shows it without a traceback, because IPython calls
    `_render_traceback_` if an exception has it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(quoting.one_line(message))  # it may quote newlines or codes that steer a terminal

    def _render_traceback_(self) -> list[str]:
        return [f"UserError: {self}"]


def cause(error: BaseException) -> str:
    """Return the first line of the error that came first: leaving a failed capture of a graph raises another."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:LONGEST]


@contextlib.contextmanager
def blame(what: str, where: Any, fix: str = BUG) -> Iterator[None]:
    """Turn any exception in the body of a `with` statement, which only reads the file `where`, into `UserError`.

    `explain` adds the name of a log file with the traceback. `UserError` passes unchanged, and so do errors of the
    machine, such as a full disk, which `explain` puts into words.
    """
    try:
        yield
    except BaseException as error:
        bug = isinstance(error, BUGS) and _raised_here(error.__traceback__)
        if isinstance(error, UserError) or bug or not _is_error(error) or _of_machine(error):
            raise
        raise UserError(f"{what}: {where} cannot be used ({reason(error)}). {fix}") from error


def explain(error: BaseException) -> UserError | None:
    """Return the `UserError` that an exception amounts to, or None for a bug of this package.

    It is about the machine, or about the given files if a library raised it while there were any. Our own code reads
    files in `blame`, so anything else that it raises is a bug.
    """
    if isinstance(error, UserError):
        return UserError(f"{error}{_details(error)}") if error.__cause__ else error
    if line := _of_machine(error):
        return UserError(f"{line}{_details(error)}")
    if isinstance(error, OverflowError) and _raised_here(error.__traceback__):
        line = f"settings: a number is too large ({reason(error)}). Fix: use smaller numbers."
        return UserError(f"{line}{_details(error)}")
    if given and (isinstance(error, RecursionError) or not _raised_here(error.__traceback__)):
        return UserError(f"input: {', '.join(given)} cannot be used ({reason(error)}). {BUG}{_details(error)}")
    if isinstance(error, OSError) and error.filename is not None:
        line = f"file: {error.filename} cannot be used ({reason(error)}). Fix: check the path and its permissions."
        return UserError(f"{line}{_details(error)}")
    return None


def internal(error: BaseException) -> str:
    """Return the line that reports a bug of this package."""
    return f"internal error: {reason(error)}. This is a bug. Fix: report it with its log.{_details(error)}"


def reason(error: BaseException) -> str:
    """Return why something failed, in at most 300 characters: the system's words, or class and message."""
    if isinstance(error, OSError) and error.strerror:
        return str(error.strerror)
    words = " ".join(str(error).split())
    words = f"{type(error).__name__}: {words}" if words else type(error).__name__
    return (words if len(words) <= LONGEST else f"{words[:LONGEST]}…").rstrip(".")


def _is_error(error: BaseException) -> bool:
    """Whether this is an error, unlike an interrupt. Libraries in Rust panic with a class outside `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _of_machine(error: BaseException) -> str | None:
    """Return a line if the machine is the cause: its disk is full, or its memory too small."""
    text = str(error)
    if (isinstance(error, OSError) and error.errno in FULL) or NO_SPACE in text:
        where = getattr(error, "filename", None) or "it"
        return f"disk: {where} is full. Fix: free some space, then run the same again."
    if isinstance(error, MemoryError) or any(words in text for words in NO_MEMORY):
        return f"memory: there is not enough ({reason(error)}). Fix: a smaller model, or fewer and shorter rows."
    return None


def _raised_here(trace: TracebackType | None) -> bool:
    """Whether the innermost frame is one of ours, not of a library that we called."""
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace)]
    return not frames or frames[-1].startswith(PACKAGE)


def _details(error: BaseException) -> str:
    """Write the traceback to a log file and return words that name it; none if no file can be written."""
    try:
        options: dict[str, Any] = {"prefix": "qlora-error-", "suffix": ".log", "delete": False}
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", errors="backslashreplace", **options) as log:
            traceback.print_exception(error, file=log)
    except Exception:  # the disk may be full, and an exception's text may raise another
        return ""
    return f" Details: {log.name}"


def _show(shell: Any, kind: type, error: BaseException, trace: Any, tb_offset: int | None = None) -> None:
    """Show an exception in a notebook: those that passed through this package as one line, all others as usual."""
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace)]
    line = explain(error) if any(name.startswith(PACKAGE) for name in frames) else None
    shown = (UserError, line, trace) if line else (kind, error, trace)
    shell.showtraceback(shown, tb_offset=tb_offset, running_compiled_code=True)


def _guard_notebook() -> None:
    """Set the boundary in a notebook, unless somebody else has set a handler of exceptions."""
    ipython = sys.modules.get("IPython")
    shell: Any = ipython.get_ipython() if ipython else None
    if getattr(shell, "kernel", None) is not None and not shell.custom_exceptions:
        shell.set_custom_exc((Exception,), _show)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a suggestion for an unknown name, such as ` Did you mean 'epochs'?`, else a list of all known names."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else f" Known: {', '.join(known)}."


_guard_notebook()
