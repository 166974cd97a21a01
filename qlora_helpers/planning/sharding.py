"""What several GPUs change in the memory of each: buckets of gradients with DDP; shards and gathered weights with FSDP.

Sources: Li et al. 2020, https://arxiv.org/abs/2006.15704, for the buckets of DDP, which hold every gradient once more;
Zhao et al. 2023, https://arxiv.org/abs/2304.11277, for FSDP: a unit is gathered before it is used and freed after,
and the next one is gathered meanwhile; accelerate's `fsdp2_prepare_model`, for the units: each decoder layer, the
embeddings, and the head with the last norm, which stays gathered from the forward to the backward pass. All sizes are
in bytes, of one GPU unless the docstring says otherwise.
"""

from qlora_helpers.planning.shape import Block
from qlora_helpers.planning.workload import FULL, HALF, Workload

REPLICATED = "quantization constants"  # attributes of the 4-bit weights and no parameters: FSDP does not shard them


def shards(workload: Workload, whole: dict[str, float]) -> dict[str, float]:
    """Return what stays on each GPU of a model whose parts are `whole`."""
    parallel = workload.parallel
    if not parallel.sharded:
        return whole
    kept = 0 if parallel.offloaded else 1 / parallel.gpus
    return {name: size * (1 if name == REPLICATED else kept) for name, size in whole.items()}


def buckets(workload: Workload, gradients: float) -> dict[str, float]:
    """Return the part that DDP adds: buckets that hold all gradients once more, for the all-reduce."""
    shared = workload.parallel.gpus > 1 and not workload.parallel.sharded
    return {"gradient buckets": gradients} if shared else {}


def between_passes(workload: Workload, gradients: float) -> float:
    """Return the gradients that exist between the passes of a step.

    They are reduced after its last pass only: until then, each GPU sums whole gradients, with FSDP too. Those that
    graphs add to stay allocated.
    """
    return gradients if workload.config.gradient_accumulation > 1 or workload.path != "off" else 0.0


def in_backward(workload: Workload, gradients: float) -> float:
    """Return the gradients at the end of the backward pass. FSDP reduces those of a layer from a copy."""
    if not workload.parallel.sharded:
        return gradients
    of_layer = max((_trained(workload, block) for block in workload.shape.blocks), default=0)
    return max(between_passes(workload, gradients), at_step(workload, gradients)) + 2 * of_layer


def at_step(workload: Workload, values: float) -> float:
    """Return how much of a number of bytes, one value per trained parameter, is on the GPU in the optimizer step."""
    parallel = workload.parallel
    if not parallel.sharded:
        return values
    return 0.0 if parallel.offloaded else values / parallel.gpus


def gathered(workload: Workload, layers: int, head: bool) -> dict[str, float]:
    """Return the part that FSDP adds: so many of the largest layers, in their storage, and the head if it is in use.

    The head counts once more, whether it is in use or not: torch gathers it in a buffer of another stream, and what is
    freed there is not used for anything else.
    """
    if not workload.parallel.sharded:
        return {}
    shape = workload.shape
    largest = max((_stored(workload, block) for block in shape.blocks), default=0.0)
    return {"gathered weights": layers * largest + (1 + head) * HALF * shape.vocabulary * shape.hidden}


def all_gathered(workload: Workload, whole: dict[str, float]) -> dict[str, float]:
    """Return the part that FSDP adds in an evaluation: one process uses the model alone, so each gathers all of it.

    It is also what each GPU holds after loading, before the model is sharded.
    """
    if not workload.parallel.sharded:
        return {}
    return {"gathered weights": sum(size for name, size in whole.items() if name != REPLICATED)}


def offloaded(workload: Workload, whole: dict[str, float]) -> float:
    """Return the bytes of the computer's memory that the shards of all its GPUs take together."""
    if not workload.parallel.offloaded:
        return 0.0
    return sum(size for name, size in whole.items() if name != REPLICATED)


def _stored(workload: Workload, block: Block) -> float:
    packed = block.packable if workload.packed else 0
    others = block.matrices - packed + block.norms + block.biases
    return packed / 2 + HALF * others + FULL * workload.adapter(block)


def _trained(workload: Workload, block: Block) -> float:
    if workload.full:
        return HALF * (block.matrices + block.norms + block.biases)
    return FULL * (workload.adapter(block) + (block.biases if workload.config.bias != "none" else 0))
