"""This machine: GPU or CPU, compute capability, memory, dtype, and why that dtype was chosen."""

import contextlib
import ctypes
import gc
import os
import platform
import sys
import traceback
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import Any

from qlora_helpers import cpu_speed
from qlora_helpers.errors import UserError

GIB = 2**30
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h
# AMD architectures with bfloat16 in hardware: Instinct GPUs from the MI100 on, RDNA 3 and 4.
AMD_WITH_BF16 = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "trl", "datasets", "accelerate", "numpy")


@dataclass(frozen=True)
class Device:
    """A machine to train on. Memory is in GiB: that of the GPU if there is one, else that of the computer."""

    kind: str
    name: str
    capability: tuple[int, int] | None
    memory_gib: float
    free_gib: float
    dtype: str
    reason: str

    @property
    def storage_dtype(self) -> str:
        """The 16-bit dtype in which unquantized frozen weights are stored, whatever the compute dtype."""
        return "bfloat16" if self.dtype == "float32" else self.dtype

    def computing_in(self, dtype: str, reason: str = "as requested") -> "Device":
        """Return the same machine with another dtype.

        Raises `UserError` for bfloat16 on a GPU that only emulates it.
        """
        if self.kind == "cuda" and dtype == "bfloat16" and not has_bf16():
            raise UserError(
                f"compute_dtype: {self.name} only emulates bfloat16, which is many times slower. "
                "Fix: compute_dtype=auto."
            )
        return replace(self, dtype=dtype, reason=reason)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for the manifest, without free memory, which changes by the second."""
        return {key: value for key, value in asdict(self).items() if key != "free_gib"}


def detect(compute_dtype: str = "auto") -> Device:
    """Detect this machine. A `compute_dtype` other than auto overrides the choice, and `reason` says so.

    On a CPU, auto is the faster dtype for the bundled model; `compute_dtype.device_for` chooses for a config's model.
    Raises `UserError` for bfloat16 on a GPU that only emulates it.
    """
    return _gpu(compute_dtype) if _has_gpu() else cpu(compute_dtype)


def profile() -> str:
    """Return the profile that suits this machine: cpu, t4 or gpu. This times nothing."""
    if not _has_gpu():
        return "cpu"
    return "gpu" if has_bf16() else "t4"


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def has_bf16() -> bool:
    """Return whether the GPU computes bfloat16 in hardware.

    `torch.cuda.is_bf16_supported()` is not used: it returns true on a T4, which only emulates bfloat16. NVIDIA GPUs
    have it from compute capability 8.0 on. AMD GPUs are also found through `torch.cuda`, but number their capabilities
    differently, so the name of the architecture decides.
    """
    import torch

    if torch.version.hip:
        return _amd_architecture().startswith(AMD_WITH_BF16)
    return torch.cuda.get_device_capability(0) >= (8, 0)


def _amd_architecture() -> str:
    import torch

    return torch.cuda.get_device_properties(0).gcnArchName.split(":")[0]


def _gpu(compute_dtype: str) -> Device:
    import torch

    free, total = torch.cuda.mem_get_info(0)
    capability = None if torch.version.hip else torch.cuda.get_device_capability(0)
    generation = "capability {}.{}".format(*capability) if capability else _amd_architecture()
    native = has_bf16()
    reason = f"{generation} has {'' if native else 'no '}bf16 in hardware"
    name = torch.cuda.get_device_name(0)
    device = Device("cuda", name, capability, *_gib(total, free), "bfloat16" if native else "float16", reason)
    return device if compute_dtype == "auto" else device.computing_in(compute_dtype)


def cpu(compute_dtype: str = "auto") -> Device:
    """Return the CPU of this machine, also if it has a GPU. The arguments are those of `detect`."""
    import psutil

    memory = psutil.virtual_memory()
    device = Device("cpu", cpu_speed.cpu_name(), None, *_gib(memory.total, memory.available), "float32", "")
    if compute_dtype != "auto":
        return device.computing_in(compute_dtype)
    return on_cpu(device)


def on_cpu(device: Device, size: tuple[int, int] = cpu_speed.USUAL_SIZE) -> Device:
    """Return the CPU `device` with the faster dtype for layers of this hidden and intermediate size."""
    speed = cpu_speed.lookup(*size)
    return device.computing_in(speed.dtype, speed.reason)


def _gib(total: int, free: int) -> tuple[float, float]:
    return round(total / GIB, 2), round(free / GIB, 2)


def keep_freed_memory(device: Device) -> None:
    """On Linux without a GPU, keep freed memory in this process for the next tensor.

    By default glibc returns large blocks to the system at once, so that each new tensor costs a page fault every 4 KiB,
    in every step.
    """
    if device.kind == "cpu" and sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def free_last_error() -> None:
    """Release what the last error in a notebook keeps in memory: the variables of its frames, such as a model.

    Python keeps the error in `sys.last_value`, IPython in its last result. A debugger finds these frames empty.
    """
    errors, seen = [getattr(sys, "last_value", None)], set()
    while errors:
        error = errors.pop()
        if isinstance(error, BaseException) and id(error) not in seen:
            seen.add(id(error))
            traceback.clear_frames(error.__traceback__)
            for frame, _ in traceback.walk_tb(error.__traceback__):
                _ = frame.f_locals  # up to Python 3.12 a copy, made to show the error: reading updates it
            errors += [error.__cause__, error.__context__]
    gc.collect()


def limit_memory(device: Device, limit_gib: float | None) -> None:
    """Limit this process to `limit_gib` of GPU memory. A run that finishes under the limit fits a GPU of that size."""
    if device.kind == "cuda" and limit_gib is not None and limit_gib < device.memory_gib:
        import torch

        torch.cuda.set_per_process_memory_fraction(limit_gib / device.memory_gib)


def forget_peak(device: Device) -> None:
    """Reset the peak memory of a GPU. Memory that torch caches is released first, since it would count too.

    On a CPU the peak of a process cannot be reset.
    """
    if device.kind == "cuda":
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory_gib(device: Device) -> float:
    """Return the peak memory of this process in GiB.

    On a GPU this is the memory reserved by torch since `forget_peak`, on a CPU the resident set of the whole process.
    """
    if device.kind == "cuda":
        import torch

        return torch.cuda.max_memory_reserved() / GIB
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def on_colab() -> bool:
    """Return whether this is a Colab machine, by its environment: importing google.colab can hang outside the page."""
    return any(name.startswith("COLAB_") for name in os.environ)


def autocast(device: Device) -> Any:
    """Return the trainer's autocast context for this device, so that losses during and after training agree."""
    import torch

    mixed = device.kind == "cuda" and device.dtype != "float32"
    return torch.autocast(device.kind, getattr(torch, device.dtype), enabled=mixed)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect results."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed[package] = "not installed"
    return installed


def prove_four_bit(device: Device, size: int = 512) -> dict[str, dict[str, float]]:
    """Compute a matrix product with 16-bit and with 4-bit weights.

    Returns the error of each relative to float32 and the size of its weights in KiB. Raises `UserError` if the error of
    the 4-bit product is larger than rounding to 16 levels explains.
    """
    import bitsandbytes as bnb
    import torch

    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, size, generator=generator) for rows in (size, 8))
    want, dtype = x @ weight.T, getattr(torch, device.dtype)
    half = weight.to(device.kind, getattr(torch, device.storage_dtype))
    x = x.to(device.kind, dtype)
    layer = bnb.nn.Linear4bit(size, size, bias=False, quant_type="nf4", compute_dtype=dtype)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    layer = layer.to(device.kind)
    with torch.no_grad():
        products = {"16-bit": x @ half.to(dtype).T, "4-bit (NF4)": layer(x)}
    errors = {name: ((got.float().cpu() - want).norm() / want.norm()).item() for name, got in products.items()}
    if not errors["4-bit (NF4)"] < 0.15:  # rounding normally distributed weights to the levels of NF4 gives 0.09
        raise UserError(
            f"bitsandbytes: its 4-bit product is off by {errors['4-bit (NF4)']:.0%}. Fix: reinstall bitsandbytes for "
            "this machine's torch."
        )
    packed: Any = layer.weight
    sizes = {"16-bit": half.nbytes, "4-bit (NF4)": packed.nbytes + packed.quant_state.absmax.nbytes}
    return {name: {"relative error": errors[name], "KiB of weights": sizes[name] / 1024} for name in products}
