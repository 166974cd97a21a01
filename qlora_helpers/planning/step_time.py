"""How long a training step takes, roughly: to compare settings, and to think of hours before starting.

On a GPU two things take time: Python and the launching of kernels, which cost the same for one row as for many, and
products with the frozen weights. LAUNCH, UNPACKED and REACHED were fitted to eight settings on an H100,
`data/memory_speed_measured.jsonl`; PRODUCTS and RECOMPUTED follow from what a step does. On a CPU only the products
count, and their speed is measured on the spot.
"""

from qlora_helpers import cpu_speed
from qlora_helpers.config import EMBEDDED_MODEL, Config
from qlora_helpers.errors import UserError
from qlora_helpers.planning import architectures, compute_dtype, memory
from qlora_helpers.planning.gpus import Gpu

LAUNCH = 6.4e-3  # seconds a block and pass, forward and backward, whatever the number of tokens
UNPACKED = 1.3  # 4-bit weights are unpacked at every use: more kernels
PRODUCTS = 4  # operations a weight and token: a product and a sum, forward and, for frozen weights, once backward
RECOMPUTED = 3 / 2  # checkpointing goes forward twice, backward once
REACHED = 0.8  # of the published speed of products
# Of the measured speed on a CPU, with every row as long as rows may be. Attention and the rest take about as much again
# as half the products; rows that are shorter than the limit, and are not padded, save about that much.
REACHED_ON_CPU = 1.0


def seconds(config: Config, gpu: Gpu, method: str | None = None) -> float:
    """Seconds of one optimizer step, every row as long as rows may be. `method`: lora or qlora; if None, the config's.

    Raises `UserError` for a model whose config is not to be had.
    """
    workload = memory.workload_of(config, method)
    launches = workload.shape.layers * LAUNCH * (UNPACKED if workload.packed else 1)
    weights = workload.shape.linear_weights + workload.shape.vocabulary * workload.shape.hidden
    products = PRODUCTS * weights * workload.tokens / (REACHED * gpu.tflops * 1e12)
    again = RECOMPUTED if config.gradient_checkpointing else 1
    return config.gradient_accumulation * (launches + products) * again


def here(config: Config) -> tuple[float, str]:
    """Seconds of one optimizer step on this machine, and where the figure comes from, in words.

    A profile may say how long its own model takes. Where it does not, as on a CPU, the measured speed of products and
    the model's size say it; for a model whose shape is not known, those of the embedded model.
    """
    if config.seconds_per_step is not None:
        return config.seconds_per_step, "as measured with the profile's own model"
    hidden, intermediate = compute_dtype.product_size(config)
    speed = cpu_speed.lookup(hidden, intermediate)
    try:
        shape = architectures.load(config.model, config.revision)
    except UserError:
        shape = architectures.load(EMBEDDED_MODEL)
    weights = shape.linear_weights + shape.vocabulary * shape.hidden
    operations = PRODUCTS * weights * config.effective_batch * config.max_length
    taken = operations / (REACHED_ON_CPU * getattr(speed, speed.dtype) * 1e9)
    return taken, f"by the measured speed of this CPU, {getattr(speed, speed.dtype):.0f} GFLOP/s in {speed.dtype}"


def estimate(config: Config, n_rows: int) -> str:
    """Rough training time for `n_rows` rows, in words."""
    seconds_per_step, source = here(config)
    return f"about {in_words(config.steps(n_rows) * seconds_per_step)} ({source})"


def in_words(seconds: float) -> str:
    """Seconds, minutes or hours, whichever a person would say."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
