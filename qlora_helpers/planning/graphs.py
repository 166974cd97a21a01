"""Memory of training steps from CUDA graphs, as `training.cuda_graphs` computes them: what differs from the library's.

The graphs of all lengths share a pool that holds a pass of the longest rows. The passes before the first capture run on
a stream of their own, and give their memory back. Peaks that were measured are in `results/h100-speed/speed.json`. They
are higher where there was room: torch reserves a pass for each of the two streams until memory is short.
"""

from qlora_helpers.planning.workload import BLOCK, FULL, WORKSPACE, Workload

LOGITS = 2**25  # that exist at the same time: 128 MiB in float32
LEAST = 128  # tokens of a chunk, however large the vocabulary
COMPILED = 0.65  # of what a block saves for its backward pass, adapters aside, as their kernels are fused: fitted


def paths(workload: Workload) -> tuple[str, ...]:
    """Return the path that `fast` asks for, and the other one that the run may take.

    `auto` takes the library's steps if graphs do not fit, and compiled blocks need less than graphs. Sharded models,
    full fine-tuning, recomputed activations with dropout, and BLOOM, whose attention needs a mask, have only those.
    """
    config = workload.config
    again = config.gradient_checkpointing and config.dropout > 0  # a graph cannot draw the same dropout again
    if config.fast == "off" or workload.full or workload.parallel.sharded or workload.shape.family == "bloom" or again:
        return ("off",)
    return ("off", "graphs") if config.fast == "auto" else (config.fast, "off")


def chunk(vocabulary: int, short_of_memory: bool) -> int:
    """Return the number of tokens whose logits exist at the same time, a multiple of 64."""
    most = LOGITS // 2 if short_of_memory else LOGITS
    return max(most // vocabulary // 64 * 64, LEAST)


def loss_tokens(workload: Workload) -> int:
    """Return the number of tokens whose logits exist at the same time."""
    if workload.path == "off":
        return workload.tokens
    return min(workload.tokens, chunk(workload.shape.vocabulary, workload.config.gradient_checkpointing))


def held(workload: Workload) -> float:
    """Return the bytes that graphs add: cuBLAS on another stream, and scales in float32."""
    config = workload.config
    plain = workload.packed and config.double_quant and not config.gradient_checkpointing
    return WORKSPACE + (FULL * workload.shape.packable / BLOCK if plain else 0.0)
