"""Locks between processes, also on file systems that have none."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

# What network and FUSE file systems answer that have no locks, or whose lock service is down.
WITHOUT = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO)


@contextlib.contextmanager
def hold(path: Path, timeout: float = -1) -> Iterator[None]:
    """Hold the lock file `path`. Where the file system has no locks, go on without one, and say so.

    Raises `filelock.Timeout` if another process holds it for longer than `timeout` seconds; -1 waits as long as needed.
    """
    import filelock

    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=timeout)
    except filelock.Timeout:
        raise
    except (OSError, NotImplementedError) as error:  # the latter is how older versions of filelock put ENOSYS
        if isinstance(error, OSError) and error.errno not in WITHOUT:
            raise
        print(f"{path.parent} is on a file system without locks: do not use it from two processes at once.")
    try:
        yield
    finally:
        lock.release()
