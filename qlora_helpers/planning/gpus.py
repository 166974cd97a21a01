"""GPUs that a plan can be made for by name: their memory and their speed."""

from dataclasses import dataclass

CONTEXT_GIB = 0.6  # CUDA itself: seen on an H100


@dataclass(frozen=True)
class Gpu:
    """One GPU: `memory` in GiB as its driver shows it, the `context` that CUDA itself takes of that, and `tflops`,
    dense 16-bit products with 32-bit sums in 10^12 a second, as NVIDIA's data sheets say.
    """

    memory: float
    context: float
    tflops: float


# The H100's memory was seen; of a T4's, torch can have 14.56; the others are as nvidia-smi lists them.
GPUS = {
    "t4": Gpu(14.74, 0.18, 65),
    "l4": Gpu(22.49, CONTEXT_GIB, 121),
    "rtx-4090": Gpu(23.99, CONTEXT_GIB, 165),
    "a100-40": Gpu(40.0, CONTEXT_GIB, 312),
    "a100-80": Gpu(80.0, CONTEXT_GIB, 312),
    "h100": Gpu(79.65, CONTEXT_GIB, 989),
}


def of_memory(memory: float) -> Gpu:
    """A card with so much memory: a known one, or one as fast as the known one that is nearest in size."""
    nearest = min(GPUS.values(), key=lambda gpu: abs(gpu.memory - memory))
    known = abs(nearest.memory - memory) < 0.1
    return Gpu(memory, nearest.context if known else CONTEXT_GIB, nearest.tflops)
