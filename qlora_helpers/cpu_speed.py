"""Speed of this CPU in float32 and in bfloat16: timed once per machine and stored in the cache folder."""

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qlora_helpers import files, locks
from qlora_helpers.wording import counted

CANDIDATES = ("float32", "bfloat16")
WORTHWHILE = 1.2  # bfloat16 rounds more coarsely, so it must be at least this many times as fast
TOKENS, FEW_TOKENS = 256, 8  # tokens of the timed product, and of a first quick trial
WIDEST = 2048  # wider layers reach the same speed but take longer to time
ROUNDS = 4
HOPELESS = 3.0  # a dtype this many times slower in the quick trial is not timed further
USUAL_SIZE = (576, 1536)  # hidden and intermediate size of the bundled model, for models whose config is unknown
STORE = "cpu_speed.json"


@dataclass(frozen=True)
class CpuSpeed:
    """Measured speed of matrix products on this CPU, forward and backward, in GFLOP/s."""

    float32: float
    bfloat16: float

    @property
    def dtype(self) -> str:
        """The dtype to compute in: bfloat16 if it is at least `WORTHWHILE` times as fast, else float32."""
        return "bfloat16" if self.bfloat16 >= WORTHWHILE * self.float32 else "float32"

    @property
    def reason(self) -> str:
        """Why `dtype` was chosen, with both speeds."""
        return (
            f"measured on this CPU: {self.bfloat16:.0f} GFLOP/s in bfloat16, {self.float32:.0f} in float32; "
            f"bfloat16 is used if it is at least {WORTHWHILE:g} times as fast"
        )


@cache
def lookup(hidden: int, intermediate: int) -> CpuSpeed:
    """Return the speed of this CPU on products of this size: stored for this machine, else measured and stored (0.2 s).

    It is stored so that all runs on a machine use the same dtype and can be compared. The key consists of the
    processor, the torch version and the number of threads.
    """
    size = min(hidden, WIDEST), min(intermediate, WIDEST)
    key, path = json.dumps([*cache_key(), *size]), files.cache_folder() / STORE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locks.hold(Path(f"{path}.lock")):
            stored = _stored(path)
            if (speed := _speed(stored.get(key))) is None:
                speed = measure(*size)
                files.write_json(path, stored | {key: asdict(speed)})
            return speed
    except OSError:  # the cache folder is not writable: measure for this process only
        return measure(*size)


def _stored(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _speed(entry: Any) -> CpuSpeed | None:
    """Parse an entry of the store. Returns None if it is missing or damaged."""
    try:
        return CpuSpeed(**{name: float(entry[name]) for name in CANDIDATES})
    except (TypeError, KeyError, ValueError):
        return None


def cache_key() -> tuple[Any, ...]:
    """Return everything besides the size that the speed of a product depends on."""
    import torch

    limits = [os.environ.get(name, "") for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")]
    return (cpu_name(), torch.__version__, threads(), *limits)


def threads() -> int:
    """Return the threads of all processes that train a run on this machine: as many as one process would have."""
    import torch

    return torch.get_num_threads() * int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def measure(n_in: int, n_out: int) -> CpuSpeed:
    """Time a linear layer with frozen weights, forward and backward, in both dtypes; return the best of a few rounds.

    A dtype that is hopelessly slow on a few tokens is not timed on more: without bfloat16 instructions, a single
    product of a large model takes seconds.
    """
    with _all_threads():
        few = {name: _seconds(name, FEW_TOKENS, n_in, n_out) for name in CANDIDATES}
        hopeful = [name for name in CANDIDATES if few[name] < HOPELESS * min(few.values())]
        many = [{name: _seconds(name, TOKENS, n_in, n_out) for name in hopeful} for _ in range(ROUNDS)]
    operations = 2 * 2 * n_in * n_out  # per token: a multiplication and an addition, forward and backward
    speed = {name: FEW_TOKENS * operations / few[name] for name in CANDIDATES}
    speed |= {name: TOKENS * operations / min(taken[name] for taken in many) for name in hopeful}
    return CpuSpeed(**{name: round(value / 1e9, 1) or value / 1e9 for name, value in speed.items()})


@contextmanager
def _all_threads() -> Iterator[None]:
    """Compute with the threads of all processes: the others wait for the one that measures."""
    import torch

    own = torch.get_num_threads()
    torch.set_num_threads(threads())
    try:
        yield
    finally:
        torch.set_num_threads(own)


def _seconds(dtype: str, tokens: int, n_in: int, n_out: int) -> float:
    """Return the seconds that the second of two runs of the layer takes. The first is a warmup."""
    import torch

    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    x = torch.ones(tokens, n_in, requires_grad=True, **options)
    weight, gradient = torch.ones(n_out, n_in, **options), torch.ones(tokens, n_out, **options)
    taken = 0.0
    for _ in range(2):
        began = time.perf_counter()
        torch.autograd.grad(torch.nn.functional.linear(x, weight), x, gradient)
        taken = time.perf_counter() - began
    return taken


def cpu_name() -> str:
    """Return the processor, the number of cores this process may use, and the vector instructions torch uses on it."""
    import torch

    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = next(iter(names), platform.processor() or platform.machine())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{name}, {counted(cores, 'core')}, {torch.backends.cpu.get_cpu_capability()}"
