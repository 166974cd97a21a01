"""Run the code of an answer with tests, in a process of its own with limits on time, memory, files and network."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

SECONDS, MEMORY, FILE_SIZE, FILES = 10, 2**30, 2**20, 100  # what an answer may use; sizes in bytes
PASSED, FAILED, TIMED_OUT = "passed", "failed", "timed out"
RUNNER = Path(__file__).with_name("code_runner.py")
# A network without connections, and processes that all end with the first one.
ISOLATION = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--")
KEPT = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT")  # variables of the environment; others may hold passwords


def run(code: str, tests: str, seconds: int = SECONDS) -> str:
    """Run `code` and then `tests`; returns passed, failed (an exception or a limit) or timed out."""
    passed = secrets.choice(range(64, 126))
    given = {"code": code, "tests": tests, "seconds": seconds, "memory": MEMORY, "file_size": FILE_SIZE}
    payload = json.dumps(given | {"files": FILES, "passed": passed}).encode()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        env = {name: os.environ[name] for name in KEPT if name in os.environ}
        env |= {"TMPDIR": folder, "HOME": folder, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [*_isolation(), sys.executable, "-I", "-B", str(RUNNER)], cwd=folder, env=env, stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            process.communicate(payload, timeout=seconds + 1)
        except subprocess.TimeoutExpired:
            return TIMED_OUT
        finally:
            _kill(process)
    if process.returncode in (-signal.SIGXCPU, 128 + signal.SIGXCPU):
        return TIMED_OUT
    return PASSED if process.returncode == passed else FAILED


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End the process and all others of its session."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


@lru_cache(maxsize=1)
def _isolation() -> tuple[str, ...]:
    """Words before the command that take network and other processes from it; none where the system allows none."""
    if not shutil.which(ISOLATION[0]):
        return ()
    probe = subprocess.run([*ISOLATION, "true"], capture_output=True, timeout=30)
    return ISOLATION if probe.returncode == 0 else ()
