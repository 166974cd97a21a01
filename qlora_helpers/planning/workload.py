"""The properties of a run that its memory depends on: model, settings, and the GPUs that share the work."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import gcd

from qlora_helpers.config import Config
from qlora_helpers.errors import UserError, nearest
from qlora_helpers.planning import architectures, quantization
from qlora_helpers.planning.shape import Block, Linear, Shape

HALF, FULL = 2, 4  # bytes of bf16 or fp16, and of float32
BLOCK = 64  # weights that share a 4-bit scale
WORKSPACE = 64 * 2**20  # bytes for cuBLAS on each stream, forward and backward
STRATEGIES = ("ddp", "fsdp", "fsdp-offload")


@dataclass(frozen=True)
class Parallel:
    """GPUs that train one run together, each on its share of every step's rows, and what each of them stores.

    ddp: the whole model. fsdp: a shard of it. fsdp-offload: a shard of it, in the computer's memory. Raises `UserError`
    for an unknown strategy or fewer than one GPU.
    """

    gpus: int = 1
    strategy: str = "ddp"

    def __post_init__(self) -> None:
        """Check the values, which come from the command line."""
        if self.gpus < 1:
            raise UserError(f"gpus: {self.gpus} is too small. Fix: use 1 or more.")
        if self.strategy not in STRATEGIES:
            raise UserError(f"unknown strategy '{self.strategy}'.{nearest(self.strategy, STRATEGIES)}")

    @property
    def sharded(self) -> bool:
        """Whether each GPU owns only a part of the weights, the gradients and the optimizer states."""
        return self.strategy != "ddp"

    @property
    def offloaded(self) -> bool:
        """Whether the shards lie in the computer's memory."""
        return self.strategy == "fsdp-offload"

    def share(self, config: Config) -> Config:
        """Return the config of one GPU: accumulation is divided by the number of GPUs, and what is left the batch.

        Raises `UserError` if the effective batch does not divide.
        """
        if config.effective_batch % self.gpus:
            raise UserError(
                f"gpus: {self.gpus} GPUs cannot share an effective batch of {config.effective_batch} rows equally. "
                f"Fix: a batch_size or gradient_accumulation that {self.gpus} divides."
            )
        passes = gcd(config.gradient_accumulation, self.gpus)
        return config.replace(
            gradient_accumulation=config.gradient_accumulation // passes,
            batch_size=config.batch_size * passes // self.gpus,
        )


ALONE = Parallel()


@dataclass(frozen=True)
class Workload:
    """The work of one GPU. Every row counts with the maximum length of its kind.

    `path` is how steps are computed: off (by the library), graphs or compiled, see `planning.graphs`.
    """

    shape: Shape
    config: Config
    full: bool
    parallel: Parallel = ALONE
    path: str = "off"

    @property
    def rows(self) -> int:
        """Rows per forward pass."""
        return self.config.batch_size

    @property
    def tokens(self) -> int:
        """Tokens per forward pass."""
        return self.rows * self.config.max_length

    @property
    def masked(self) -> bool:
        """Whether padding is masked in attention. Steps from graphs need no mask: see `training.cuda_graphs`."""
        return self.rows > 1 and self.path == "off"

    @property
    def heldout_length(self) -> int:
        """Tokens of the longest held-out row, which may be longer than those that are trained on."""
        limit = self.config.heldout_max_length
        return max(self.config.max_length, min(limit, self.shape.positions or limit))

    @cached_property
    def targets(self) -> frozenset[str]:
        """Names of the layers that have an adapter."""
        return frozenset() if self.full else self.shape.targets(self.config.target_modules)

    def adapted(self, block: Block) -> tuple[Linear, ...]:
        """Layers of a block that have an adapter."""
        return tuple(linear for linear in block.linears if linear.name in self.targets)

    def adapter(self, block: Block) -> int:
        """Number of weights of the adapters in a block."""
        return self.config.rank * sum(linear.n_in + linear.n_out for linear in self.adapted(block))

    def total(self, of_block: Callable[[Block], float]) -> float:
        """Sum of a number over all blocks."""
        return sum(block.count * of_block(block) for block in self.shape.blocks)

    @property
    def packed(self) -> bool:
        """Whether the linear layers are stored in 4 bits."""
        return self.config.quantization != "none" and not self.full


def workload_of(config: Config, method: str | None = None, parallel: Parallel = ALONE) -> Workload:
    """Return the work of each GPU in a run of `config`, or of the same settings with another method.

    Raises `UserError` if the model's config cannot be loaded, if a setting is impossible for the model, or if the GPUs
    cannot share the batch.
    """
    config = parallel.share(quantization.of_method(config, method))
    quantization.check(config)
    shape = architectures.load(config.model, config.revision)
    workload = Workload(shape, config, method == "full", parallel)
    adapted = [linear for part in shape.parts for linear in workload.adapted(part)]
    widths = [min(linear.n_in, linear.n_out) for linear in adapted]
    if config.rank > min(widths, default=config.rank):
        raise UserError(f"rank: {config.rank} exceeds the width of an adapted layer. Fix: use {min(widths)} or less.")
    if shape.positions and config.max_length > shape.positions:
        raise UserError(
            f"max_length: {config.max_length} exceeds the {shape.positions} positions of {shape.name}. "
            f"Fix: use {shape.positions} or less."
        )
    return workload
