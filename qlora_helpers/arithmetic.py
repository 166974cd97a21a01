"""The dtype a run computes in. On a GPU its generation decides; on a CPU two candidates are timed, once per machine."""

import json
import os
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qlora_helpers import runs
from qlora_helpers.config import Config
from qlora_helpers.device import Device, cpu_name, detect, profile
from qlora_helpers.errors import UserError
from qlora_helpers.models.bundled import cache_folder
from qlora_helpers.planning import architectures

CANDIDATES = ("float32", "bfloat16")
WORTHWHILE = 1.2  # bfloat16 rounds more coarsely: it has to be this much faster
TOKENS, FEW_TOKENS = 256, 8  # rows of the timed product, and of a first look
WIDEST = 2048  # wider layers are as fast as this one, and take longer to time
ROUNDS = 4
HOPELESS = 3.0  # times slower at the first look
USUAL_SIZE = (576, 1536)  # hidden and intermediate size of the embedded model, for models whose config is not known
STORE = "arithmetic.json"


@dataclass(frozen=True)
class CpuSpeed:
    """Measured speed of matrix products on this CPU, forward and backward, in 10^9 operations a second."""

    float32: float
    bfloat16: float

    @property
    def dtype(self) -> str:
        """The dtype to compute in: bfloat16 if it is at least `WORTHWHILE` times as fast, else float32."""
        return "bfloat16" if self.bfloat16 >= WORTHWHILE * self.float32 else "float32"

    @property
    def reason(self) -> str:
        """Why, with both figures."""
        return (
            f"measured on this CPU: {self.bfloat16:.0f} GFLOP/s in bfloat16, {self.float32:.0f} in float32; "
            f"bfloat16 is used from {WORTHWHILE:g} times the speed"
        )


def device_for(config: Config) -> Device:
    """This machine, computing in the dtype that suits the config's model on it.

    Without a GPU, trained biases need float32: they are float32 themselves, and no autocast joins the two.
    """
    device = detect("auto" if profile() != "cpu" else "float32")
    if device.kind == "cpu" and config.bias != "none":
        return device.computing_in("float32", "biases are trained, which a CPU does in float32")
    if config.compute_dtype != "auto":
        return device.computing_in(config.compute_dtype)
    if device.kind == "cuda":
        return device
    return on_cpu(device, *product_size(config))


def on_cpu(device: Device, hidden: int = USUAL_SIZE[0], intermediate: int = USUAL_SIZE[1]) -> Device:
    """The CPU `device`, computing in the faster dtype for layers of this size."""
    speed = cpu_speed(hidden, intermediate)
    return device.computing_in(speed.dtype, speed.reason)


def as_begun(device: Device, dtype: str | None) -> Device:
    """`device`, computing in the dtype in which a run began, if it has begun: another one would make it another run.

    Prints a line if that dtype is slow here. Raises `UserError` if this GPU only emulates it.
    """
    if dtype is None or dtype == device.dtype:
        return device
    if device.kind == "cpu":
        speed = cpu_speed(*USUAL_SIZE)
        if getattr(speed, dtype, 0.0) * WORTHWHILE < getattr(speed, device.dtype, 0.0):
            print(f"This run began in {dtype} and stays in it, which is slow here ({speed.reason}).")
    return device.computing_in(dtype, f"the run began in {dtype}")


def product_size(config: Config) -> tuple[int, int]:
    """Hidden and intermediate size of the config's model; the embedded model's for one whose shape is not known."""
    try:
        shape = architectures.load(config.model, config.revision)
    except UserError:
        return USUAL_SIZE
    return shape.hidden, shape.intermediate


@cache
def cpu_speed(hidden: int, intermediate: int) -> CpuSpeed:
    """Speed of this CPU on products of this size: as stored for this machine, else measured and stored (0.2 s).

    Stored, so that runs that are compared use one arithmetic. The processor, torch's version and the number of threads
    make up the key.
    """
    import filelock

    size = min(hidden, WIDEST), min(intermediate, WIDEST)
    key, path = json.dumps([*machine(), *size]), cache_folder() / STORE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{path}.lock"):
            stored = _stored(path)
            if (speed := _speed(stored.get(key))) is None:
                speed = measure(*size)
                runs.write_json(path, stored | {key: asdict(speed)})
            return speed
    except OSError:  # a cache that cannot be written: this process measures for itself
        return measure(*size)


def _stored(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _speed(entry: Any) -> CpuSpeed | None:
    """An entry of the store; None if it is missing or damaged."""
    try:
        return CpuSpeed(**{name: float(entry[name]) for name in CANDIDATES})
    except (TypeError, KeyError, ValueError):
        return None


def machine() -> tuple[Any, ...]:
    """All that the speed of a product depends on, besides its size."""
    import torch

    limits = [os.environ.get(name, "") for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")]
    return (cpu_name(), torch.__version__, torch.get_num_threads(), *limits)


def measure(n_in: int, n_out: int) -> CpuSpeed:
    """Time a linear layer with frozen weights, forward and backward, in both dtypes; the fastest of a few rounds.

    A candidate that is hopeless on a few rows is not timed on more: without instructions for bfloat16 a single product
    of a large model takes seconds.
    """
    few = {name: _seconds(name, FEW_TOKENS, n_in, n_out) for name in CANDIDATES}
    hopeful = [name for name in CANDIDATES if few[name] < HOPELESS * min(few.values())]
    many = [{name: _seconds(name, TOKENS, n_in, n_out) for name in hopeful} for _ in range(ROUNDS)]
    operations = 2 * 2 * n_in * n_out  # of a row: a product and a sum, forward and backward
    speed = {name: FEW_TOKENS * operations / few[name] for name in CANDIDATES}
    speed |= {name: TOKENS * operations / min(taken[name] for taken in many) for name in hopeful}
    return CpuSpeed(**{name: round(value / 1e9, 1) for name, value in speed.items()})


def _seconds(dtype: str, tokens: int, n_in: int, n_out: int) -> float:
    """The second of two runs of the layer: the first warms up."""
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
