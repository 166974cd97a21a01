"""What we run on: GPU, capability, arithmetic, memory; and why it was chosen."""

import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from qlora_helpers.errors import UserError

GIB = 2**30
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
    def profile(self) -> str:
        """The profile that suits this machine: cpu, t4 or gpu."""
        if self.kind == "cpu":
            return "cpu"
        return "gpu" if self.dtype == "bfloat16" else "t4"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest; free memory is left out, since it changes by the second."""
        return {key: value for key, value in asdict(self).items() if key != "free_gib"}


def detect(compute_dtype: str = "auto") -> Device:
    """Look at this machine. `compute_dtype` other than auto overrides the choice, and the reason says so.

    A GPU's capability decides, not `torch.cuda.is_bf16_supported()`, which says yes on a T4, by emulation. bfloat16 is
    refused there even if it is asked for.
    """
    import torch

    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(0)
        free, total = torch.cuda.mem_get_info(0)
        kind, name = "cuda", torch.cuda.get_device_name(0)
        modern = capability >= (8, 0)
        dtype = "bfloat16" if modern else "float16"
        reason = f"capability {capability[0]}.{capability[1]} has {'' if modern else 'no '}bf16 in hardware"
        if compute_dtype == "bfloat16" and not modern:
            raise UserError(f"compute_dtype: {name} only emulates bfloat16, many times slower ({reason}). Mend: auto.")
    else:
        import psutil

        memory = psutil.virtual_memory()
        kind, capability, free, total = "cpu", None, memory.available, memory.total
        name = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
        dtype, reason = "bfloat16", "no GPU: bf16 products are the faster ones on a CPU, sums stay in float32"
    if compute_dtype not in ("auto", dtype):
        reason = f"asked for, in place of {dtype}: {reason}"
        dtype = compute_dtype
    return Device(kind, name, capability, round(total / GIB, 2), round(free / GIB, 2), dtype, reason)


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
    """The arithmetic the trainer uses on this device, so that losses in and after training agree."""
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
    half = weight.to(device.kind, dtype)
    layer = bnb.nn.Linear4bit(size, size, bias=False, quant_type="nf4", compute_dtype=dtype)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    layer = layer.to(device.kind)
    with torch.no_grad():
        products = {"16-bit": x.to(half) @ half.T, "4-bit (NF4)": layer(x.to(half))}
    errors = {name: ((got.float().cpu() - want).norm() / want.norm()).item() for name, got in products.items()}
    if not errors["4-bit (NF4)"] < 0.15:  # 0.09 is what rounding normal weights to NF4's levels costs
        raise UserError(
            f"bitsandbytes: its 4-bit product is off by {errors['4-bit (NF4)']:.0%}. Mend: reinstall bitsandbytes for "
            "this machine's torch."
        )
    packed: Any = layer.weight
    sizes = {"16-bit": half.nbytes, "4-bit (NF4)": packed.nbytes + packed.quant_state.absmax.nbytes}
    return {name: {"relative error": errors[name], "KiB of weights": sizes[name] / 1024} for name in products}
