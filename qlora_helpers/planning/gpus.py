"""GPUs that a plan accepts by name: their memory and speed."""

from dataclasses import dataclass

CONTEXT_GIB = 0.6  # GiB of the CUDA context, as measured on an H100


@dataclass(frozen=True)
class Gpu:
    """One GPU. `memory` is in GiB as shown by the driver, `context` the GiB of it that the CUDA context takes.

    `tflops` is the speed of dense 16-bit products with 32-bit accumulation in TFLOP/s, from NVIDIA's data sheets.
    """

    memory: float
    context: float
    tflops: float


# The memory of the H100 was measured; torch can use 14.56 GiB of a T4; the others are as listed by nvidia-smi.
GPUS = {
    "t4": Gpu(14.74, 0.18, 65),
    "l4": Gpu(22.49, CONTEXT_GIB, 121),
    "rtx-4090": Gpu(23.99, CONTEXT_GIB, 165),
    "a100-40": Gpu(40.0, CONTEXT_GIB, 312),
    "a100-80": Gpu(80.0, CONTEXT_GIB, 312),
    "h100": Gpu(79.65, CONTEXT_GIB, 989),
}


def of_memory(memory: float) -> Gpu:
    """Return a GPU with `memory` GiB: a known one, or one as fast as the known GPU with the most similar memory."""
    nearest = min(GPUS.values(), key=lambda gpu: abs(gpu.memory - memory))
    known = abs(nearest.memory - memory) < 0.1
    return Gpu(memory, nearest.context if known else CONTEXT_GIB, nearest.tflops)
