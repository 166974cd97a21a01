"""How long a training step takes, roughly, by arithmetic: to compare settings, and to think of hours before starting.

Two things take time: Python and the launching of kernels, which cost the same for one row as for many, and products
with the frozen weights. LAUNCH, UNPACKED and REACHED were fitted to eight settings on an H100,
`data/memory_speed_measured.jsonl`; the other two follow from what a step does.
"""

from qlora_helpers import memory
from qlora_helpers.cards import Card
from qlora_helpers.config import Config

LAUNCH = 6.4e-3  # seconds a block and pass, forward and backward, whatever the number of tokens
UNPACKED = 1.3  # 4-bit weights are unpacked at every use: more kernels
PRODUCTS = 4  # operations a weight and token: a product and a sum, forward and, for frozen weights, once backward
RECOMPUTED = 3 / 2  # checkpointing goes forward twice, backward once
REACHED = 0.8  # of the published speed of products


def seconds(config: Config, card: Card, method: str | None = None) -> float:
    """Seconds of one optimizer step, every row as long as rows may be. `method`: lora or qlora; if None, the config's.

    Raises `UserError` for a model whose config is not to be had.
    """
    load = memory.load_of(config, method)
    launches = load.shape.layers * LAUNCH * (UNPACKED if load.packed else 1)
    weights = load.shape.linear_weights + load.shape.vocabulary * load.shape.hidden
    products = PRODUCTS * weights * load.tokens / (REACHED * card.tflops * 1e12)
    again = RECOMPUTED if config.gradient_checkpointing else 1
    return config.gradient_accumulation * (launches + products) * again
