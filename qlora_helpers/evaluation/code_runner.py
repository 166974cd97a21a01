"""Run an answer's code and then its tests. A process of its own: `python -I code_runner.py`, started by `run_code`.

It reads JSON from its standard input: `code` and `tests`, the limits `seconds`, `memory` and `file_size` in bytes, the
number of `files`, and `passed`, its exit status if the tests raise nothing. The status differs each time, so that code
that ends the process before its tests does not pass. This keeps the mistakes of a model from doing harm. It is no
sandbox against an attacker.
"""

import ctypes  # noqa: F401 (loading it later is refused, and pandas imports it)
import json
import os
import subprocess  # noqa: F401 (likewise: it imports what is refused, and asyncio imports it)
import sys
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PATHS = {  # events that change files: places of their paths, each with that of the descriptor it is relative to
    "os.remove": ((0, 1),), "os.rmdir": ((0, 1),), "os.mkdir": ((0, 2),), "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)), "os.symlink": ((1, 2),), "os.truncate": ((0, None),), "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),), "os.utime": ((0, 3),), "os.setxattr": ((0, None),), "sqlite3.connect": ((0, None),),
}  # fmt: skip
# Other processes, the network, and code outside Python's control.
REFUSED = (
    "socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.spawn", "os.posix_spawn", "os.kill",
    "os.startfile", "pty.", "ctypes.",
)  # fmt: skip


def main() -> None:
    """Run what standard input holds, within its limits."""
    given = json.load(sys.stdin)
    _limit(given["seconds"], given["memory"], given["file_size"])
    code, tests = (compile(given[part], part, "exec") for part in ("code", "tests"))
    sys.modules.pop("_posixsubprocess", None)  # it starts processes without an event
    folder, opened = os.path.realpath(os.getcwd()), [given["files"]]
    sys.addaudithook(lambda event, args: _check(event, args, folder, opened))
    names: dict[str, Any] = {"__name__": "answer"}
    exec(code, names)
    exec(tests, names)
    os._exit(given["passed"])


def _limit(seconds: int, memory: int, file_size: int) -> None:
    """Limit processor time, memory and the size of a file, where the system has such limits."""
    try:
        import resource
    except ImportError:  # Windows; the time limit of the parent remains
        return
    limits = {"RLIMIT_CPU": seconds + 1, "RLIMIT_AS": memory, "RLIMIT_FSIZE": file_size, "RLIMIT_CORE": 0}
    for name, limit in limits.items():
        most = resource.getrlimit(getattr(resource, name))[1]
        value = limit if most == resource.RLIM_INFINITY else min(limit, most)
        soft = value - 1 if name == "RLIMIT_CPU" else value  # at the hard limit, no signal tells why
        resource.setrlimit(getattr(resource, name), (soft, value))


def _check(event: str, args: tuple[Any, ...], folder: str, opened: list[int]) -> None:
    """Raise `PermissionError` for an event that could do harm outside the folder."""
    if event.startswith(REFUSED) or (event == "import" and args[0] == "_posixsubprocess"):
        raise PermissionError(f"{event} is not allowed")
    if event == "open":
        path, mode, flags = args
        if set(mode or "") & set("wax+") or (flags or 0) & WRITING:
            opened[0] -= 1
            if opened[0] < 0 or (mode is None and not isinstance(path, int) and not os.path.isabs(path)):
                # os.open with a relative path: the event does not tell the descriptor that it is relative to
                raise PermissionError(f"{path} is not allowed")
            _inside(path, None, folder)
    for path, base in PATHS.get(event, ()):
        _inside(args[path], None if base is None else args[base], folder)


def _inside(path: Any, base: Any, folder: str) -> None:
    """Raise `PermissionError` unless the path is in the folder. `base` is the descriptor that it is relative to."""
    if isinstance(path, int):
        return  # opened before, and checked then
    start = os.readlink(f"/proc/self/fd/{base}") if isinstance(base, int) and base >= 0 else os.getcwd()
    real = os.path.realpath(os.path.join(start, os.fsdecode(path)))
    if real not in (folder, os.devnull) and not real.startswith(folder + os.sep):
        raise PermissionError(f"{real} is outside the folder of the answer")


if __name__ == "__main__":
    main()
