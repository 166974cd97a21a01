"""GPUs that a plan can be made for by name: their memory and their speed."""

from dataclasses import dataclass

CONTEXT_GIB = 0.6  # CUDA itself: seen on an H100


@dataclass(frozen=True)
class Card:
    """One GPU: `memory` in GiB as its driver shows it, the `context` that CUDA itself takes of that, and `tflops`,
    dense 16-bit products with 32-bit sums in 10^12 a second, as NVIDIA's data sheets say.
    """

    memory: float
    context: float
    tflops: float


# The H100's memory was seen; of a T4's, torch can have 14.56; the others are as nvidia-smi lists them.
CARDS = {
    "t4": Card(14.74, 0.18, 65),
    "l4": Card(22.49, CONTEXT_GIB, 121),
    "rtx-4090": Card(23.99, CONTEXT_GIB, 165),
    "a100-40": Card(40.0, CONTEXT_GIB, 312),
    "a100-80": Card(80.0, CONTEXT_GIB, 312),
    "h100": Card(79.65, CONTEXT_GIB, 989),
}


def of_size(memory: float) -> Card:
    """A card with so much memory: a known one, or one as fast as the known one that is nearest in size."""
    nearest = min(CARDS.values(), key=lambda card: abs(card.memory - memory))
    known = abs(nearest.memory - memory) < 0.1
    return Card(memory, nearest.context if known else CONTEXT_GIB, nearest.tflops)
