"""The machine: GPU or CPU, compute capability, dtype, memory, and why the dtype was chosen."""

import contextlib
import ctypes
import os
import platform
import sys
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import Any

from qlora_helpers import cpu_speed
from qlora_helpers.errors import UserError

GIB = 2**30
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
# Matrix cores with bfloat16: MI100 and later Instinct cards, RDNA 3 and 4.
AMD_WITH_BF16 = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "trl", "datasets", "accelerate", "numpy")


@dataclass(frozen=True)
class Device:
    """One machine as far as training is concerned. Memory in GiB, of the GPU if there is one, else of the computer."""

    kind: str
    name: str
    capability: tuple[int, int] | None
    memory_gib: float
    free_gib: float
    dtype: str
    reason: str

    @property
    def storage_dtype(self) -> str:
        """The 16-bit dtype in which frozen weights that are not packed are stored, whatever is computed in."""
        return "bfloat16" if self.dtype == "float32" else self.dtype

    def computing_in(self, dtype: str, reason: str = "as asked for") -> "Device":
        """The same machine with another dtype. Raises `UserError` for bfloat16 on a GPU that only emulates it."""
        if self.kind == "cuda" and dtype == "bfloat16" and not has_bf16():
            raise UserError(f"compute_dtype: {self.name} only emulates bfloat16, many times slower. Fix: auto.")
        return replace(self, dtype=dtype, reason=reason)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest; free memory is left out, since it changes by the second."""
        return {key: value for key, value in asdict(self).items() if key != "free_gib"}


def detect(compute_dtype: str = "auto") -> Device:
    """Look at this machine. `compute_dtype` other than auto overrides the choice, and the reason says so.

    On a CPU, `auto` is the dtype that suits the bundled model; `compute_dtype.device_for` asks for a config's own.
    Raises `UserError` for bfloat16 on a GPU that only emulates it.
    """
    return _gpu(compute_dtype) if _has_gpu() else _cpu(compute_dtype)


def profile() -> str:
    """The profile that suits this machine: cpu, t4 or gpu. Times nothing."""
    if not _has_gpu():
        return "cpu"
    return "gpu" if has_bf16() else "t4"


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def has_bf16() -> bool:
    """Whether the GPU computes in bfloat16 itself.

    Not `torch.cuda.is_bf16_supported()`, which says yes on a T4, by emulation. NVIDIA's cards have it from compute
    capability 8.0. AMD's answer `torch.cuda` too, but their capability counts differently: their architecture's name
    decides.
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
    amd = bool(torch.version.hip)
    capability = None if amd else torch.cuda.get_device_capability(0)
    generation = _amd_architecture() if amd else "capability {}.{}".format(*torch.cuda.get_device_capability(0))
    native = has_bf16()
    reason = f"{generation} has {'' if native else 'no '}bf16 in hardware"
    name = torch.cuda.get_device_name(0)
    device = Device("cuda", name, capability, *_gib(total, free), "bfloat16" if native else "float16", reason)
    return device if compute_dtype == "auto" else device.computing_in(compute_dtype)


def _cpu(compute_dtype: str) -> Device:
    import psutil

    memory = psutil.virtual_memory()
    device = Device("cpu", cpu_speed.cpu_name(), None, *_gib(memory.total, memory.available), "float32", "")
    if compute_dtype != "auto":
        return device.computing_in(compute_dtype)
    return on_cpu(device)


def on_cpu(device: Device, size: tuple[int, int] = cpu_speed.USUAL_SIZE) -> Device:
    """The CPU `device`, computing in the faster dtype for layers of this hidden and intermediate size."""
    speed = cpu_speed.lookup(*size)
    return device.computing_in(speed.dtype, speed.reason)


def _gib(total: int, free: int) -> tuple[float, float]:
    return round(total / GIB, 2), round(free / GIB, 2)


def keep_freed_memory(device: Device) -> None:
    """Without a GPU, on Linux: let memory that is freed stay with this process, for the next tensor.

    glibc returns large blocks to the system at once, and the next one costs a page fault every 4 KiB, in every step.
    """
    if device.kind == "cpu" and sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def limit_memory(device: Device, limit_gib: float | None) -> None:
    """Hold this process to `limit_gib` of GPU memory: a run that passes fits a card of that size."""
    if device.kind == "cuda" and limit_gib is not None and limit_gib < device.memory_gib:
        import torch

        torch.cuda.set_per_process_memory_fraction(limit_gib / device.memory_gib)


def forget_peak(device: Device) -> None:
    """Count the peak memory of a GPU anew. What torch keeps for later goes back first, or it would count too. What a
    process has taken from a computer at most cannot be forgotten.
    """
    if device.kind == "cuda":
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory_gib(device: Device) -> float:
    """Peak memory of this process so far: reserved by torch on a GPU since `forget_peak`, resident set on a CPU."""
    if device.kind == "cuda":
        import torch

        return torch.cuda.max_memory_reserved() / GIB
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / GIB
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def on_colab() -> bool:
    """Whether this is a Colab machine. Its environment says so; importing google.colab can hang outside the page."""
    return any(name.startswith("COLAB_") for name in os.environ)


def autocast(device: Device) -> Any:
    """The mixed precision that the trainer uses on this device, so that losses in and after training agree."""
    import torch

    mixed = device.kind == "cuda" and device.dtype != "float32"
    return torch.autocast(device.kind, getattr(torch, device.dtype), enabled=mixed)


def versions() -> dict[str, str]:
    """Python's version and those of the packages that decide results."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def prove_four_bit(device: Device, size: int = 512) -> dict[str, dict[str, float]]:
    """One matrix product with weights in 16 and in 4 bits: error relative to float32, and bytes of the weights.

    Raises `UserError` if the 4-bit product is further off than rounding to 16 levels explains.
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
    if not errors["4-bit (NF4)"] < 0.15:  # 0.09 is what rounding normal weights to NF4's levels costs
        raise UserError(
            f"bitsandbytes: its 4-bit product is off by {errors['4-bit (NF4)']:.0%}. Fix: reinstall bitsandbytes for "
            "this machine's torch."
        )
    packed: Any = layer.weight
    sizes = {"16-bit": half.nbytes, "4-bit (NF4)": packed.nbytes + packed.quant_state.absmax.nbytes}
    return {name: {"relative error": errors[name], "KiB of weights": sizes[name] / 1024} for name in products}
