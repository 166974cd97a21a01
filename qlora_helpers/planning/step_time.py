"""Rough time of a training step, to compare settings and to estimate the hours of a run before it starts.

On a GPU, two things take time: Python and kernel launches, which cost the same for one row as for many, and products
with the frozen weights. LAUNCH, UNPACKED and REACHED were fitted to eight settings measured on an H100,
`data/memory_speed_measured.jsonl`; PRODUCTS and RECOMPUTED follow from the operations of a step. On a CPU only the
products count, and their speed is measured on this machine.
"""

from qlora_helpers import cpu_speed
from qlora_helpers.config import Config
from qlora_helpers.planning import architectures, memory
from qlora_helpers.planning.gpus import Gpu

LAUNCH = 6.4e-3  # seconds per block and pass, forward and backward, for any number of tokens
UNPACKED = 1.3  # factor for 4-bit weights: dequantizing them at every use launches more kernels
PRODUCTS = 4  # operations per weight and token: a product and a sum, forward and, for frozen weights, once backward
RECOMPUTED = 3 / 2  # gradient checkpointing: two forward passes and one backward pass
REACHED = 0.8  # fraction of the published speed of products that is reached
# Fraction of the measured speed that is reached on a CPU, counting every row at the maximum length. Attention and all
# else take about half as long as the products; shorter rows, which are not padded, save about as much.
REACHED_ON_CPU = 1.0


def seconds(config: Config, gpu: Gpu, method: str | None = None) -> float:
    """Return the seconds of one optimizer step on `gpu`, with every row at the maximum length.

    `method` is lora or qlora; None means the config's own. Experts that are no linear layers do not count, so for their
    models this is a lower bound. Raises `UserError` if the model's config cannot be loaded.
    """
    workload = memory.workload_of(config, method)
    launches = workload.shape.layers * LAUNCH * (UNPACKED if workload.packed else 1)
    products = PRODUCTS * workload.shape.multiplied * workload.tokens / (REACHED * gpu.tflops * 1e12)
    again = RECOMPUTED if config.gradient_checkpointing else 1
    return config.gradient_accumulation * (launches + products) * again


def here(config: Config) -> tuple[float, str]:
    """Return the seconds of one optimizer step on this machine, and the source of that number, in words.

    A profile may state the time for its own model. Otherwise, as on a CPU, the time follows from the measured speed of
    products and the size of the model, or of the bundled model if the model's shape is unknown.
    """
    if config.seconds_per_step is not None:
        return config.seconds_per_step, "measured with the profile's own model"
    shape = architectures.load_or_bundled(config)
    speed = cpu_speed.lookup(shape.hidden, shape.intermediate)
    operations = PRODUCTS * shape.multiplied * config.effective_batch * config.max_length
    taken = operations / (REACHED_ON_CPU * getattr(speed, speed.dtype) * 1e9)
    return taken, f"{getattr(speed, speed.dtype):.0f} GFLOP/s in {speed.dtype}, measured on this CPU"


def estimate(config: Config, n_rows: int) -> str:
    """Return a rough training time for `n_rows` rows, in words."""
    seconds_per_step, source = here(config)
    return f"about {in_words(config.steps(n_rows) * seconds_per_step)} ({source})"


def in_words(seconds: float) -> str:
    """Return a duration in words: in seconds below 90 s, in minutes below 90 min, else in hours."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
