"""Memory of training steps from CUDA graphs, as `training.cuda_graphs` computes them: what differs from the library's.

The graphs of all lengths share a pool that holds a pass of the longest rows. A graph is captured after an ordinary pass
of its length, so the peak is the pool, beside it a pass of the next shorter rows, and a cuBLAS workspace for the stream
of every capture. Peaks that were measured are in `results/h100-speed/speed.json`; COMPILED is fitted to them.
"""

from qlora_helpers.planning.workload import BLOCK, FULL, WORKSPACE, Workload

WIDTHS = {"random": 64, "group_by_length": 32}  # tokens: lengths are multiples
MOST_LENGTHS = 8
CHUNK = 1024  # tokens whose logits exist at the same time
COMPILED = 0.65  # of what a block saves for its backward pass, adapters aside, once element-wise kernels are fused


def paths(workload: Workload) -> tuple[str, ...]:
    """Return the path that `fast` asks for, and the other one that the run may take.

    `auto` takes the library's steps if graphs do not fit, and graphs need more than compiled blocks. Several GPUs, full
    fine-tuning and BLOOM, whose attention needs a mask, have the library's only.
    """
    fast = workload.config.fast
    if fast == "off" or workload.full or workload.parallel.gpus > 1 or workload.shape.family == "bloom":
        return ("off",)
    return ("off", "graphs") if fast == "auto" else (fast, "off")


def loss_tokens(workload: Workload) -> int:
    """Return the number of tokens whose logits exist at the same time."""
    return workload.tokens if workload.path == "off" else min(workload.tokens, CHUNK)


def lengths(workload: Workload) -> int:
    """Return the number of lengths that rows are padded to, each with a graph."""
    longest, width = workload.config.max_length, WIDTHS[workload.config.sampling]
    width *= -(-longest // (width * MOST_LENGTHS))
    return -(-longest // width)


def held(workload: Workload, of_pass: float) -> float:
    """Return the bytes that graphs add to a pass of `of_pass` bytes: a second pass, workspaces, scales in float32."""
    number = lengths(workload)
    scales = FULL * workload.shape.packable / BLOCK if workload.packed and workload.config.double_quant else 0.0
    return of_pass * (number - 1) / number + WORKSPACE * (number + 1) + scales
