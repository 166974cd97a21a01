"""Peak memory of a run by part, from the model's config alone: arithmetic, without torch and without weights.

What a part holds was read from the tensors alive at the peak of real runs; `benchmarks/memory.py` measures whole runs,
and `benchmarks/README.md` says how far off the arithmetic is. All sizes are bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass

from qlora_helpers.config import Config
from qlora_helpers.errors import UserError, nearest
from qlora_helpers.planning import architectures
from qlora_helpers.planning.architectures import Linear, Shape

METHODS = ("qlora", "lora", "full")

GIB = 2**30
HALF, FULL = 2, 4  # bytes of bf16 or fp16, and of float32
BLOCK = 64  # weights that share a 4-bit scale
NESTED = 256  # scales that share a second scale, with double quantisation
BLOCK_8BIT = 256  # optimizer values that share a scale in 8-bit AdamW
LOSS_COPIES = 3  # float32 matrices of tokens x words at the loss: log-softmax, its gradient, the logits' gradient
WORKSPACE = 64 * 2**20  # cuBLAS, forward and backward
EVALUATION_LOGITS = 512  # tokens whose logits `evaluation` holds at once: x 49,152 words x 4 bytes is 96 MiB
MOST_ROWS, MOST_ANSWERS = 8, 128  # more rows at once are no faster; answers cost as many steps for 1 as for all

# What the allocator reserves over what is used: least squares over the measured settings that are not kept for the
# score. First of one float32 matrix of tokens x words, whose holes are not filled again; then of the activations.
SPARE = (0.51, 0.05)
SPARE_CHECKPOINTING = (0.95, 0.31)  # blocks that are made again lie between those that stay
SPARE_EVALUATION = (0.28, 0.05)  # without gradients: of what comes and goes, and of keys and values
SPARE_PACKED = 0.03  # of 4-bit weights, which lie where 16-bit ones passed through


@dataclass(frozen=True)
class Load:
    """One run as far as memory is concerned. `tokens` of a forward pass: every row counts as long as rows may be."""

    shape: Shape
    config: Config
    full: bool

    @property
    def rows(self) -> int:
        """Rows of a forward pass."""
        return self.config.batch_size

    @property
    def tokens(self) -> int:
        """Tokens of a forward pass."""
        return self.rows * self.config.max_length

    @property
    def adapted(self) -> tuple[Linear, ...]:
        """Layers of a block with an adapter."""
        return () if self.full else self.shape.targets(self.config.target_modules)

    @property
    def packed(self) -> bool:
        """Whether the linear layers are stored in 4 bits."""
        return self.config.quantization != "none" and not self.full


def method_of(config: Config) -> str:
    """What a config's own run is: qlora with the base in 4 bits, else lora."""
    return "lora" if config.quantization == "none" else "qlora"


def load_of(config: Config, method: str | None = None) -> Load:
    """What a run of `config` holds, or of the same settings with another method.

    Raises `UserError` for a model whose config is not to be had, and for settings that the model cannot have.
    """
    if method not in (None, *METHODS):
        raise UserError(f"method: there is no '{method}'.{nearest(str(method), METHODS)}")
    shape = architectures.load(config.model, config.revision)
    if (method or method_of(config)) != "qlora":
        config = config.replace(quantization="none")
    elif config.quantization == "none":
        config = config.replace(quantization="nf4")
    load = Load(shape, config, method == "full")
    widths = [min(linear.n_in, linear.n_out) for linear in load.adapted]
    if config.rank > min(widths, default=config.rank):
        raise UserError(f"rank: {config.rank} is above the width of an adapted layer. Fix: {min(widths)} or less.")
    if shape.positions and config.max_length > shape.positions:
        raise UserError(
            f"max_length: {config.max_length} is above the {shape.positions} positions of {shape.name}. Fix: less."
        )
    return load


def training_parts(load: Load) -> dict[str, float]:
    """Bytes by part at the worst moment of a step: the loss, a block's backward pass, or the optimizer's own step."""
    moments = (_at_loss(load), _in_backward(load), _at_step(load))
    worst = max(moments, key=lambda parts: sum(parts.values()))
    of_loss, of_rest = SPARE_CHECKPOINTING if load.config.gradient_checkpointing else SPARE
    matrix = FULL * load.tokens * load.shape.vocabulary
    return {**worst, "fragmentation": of_loss * matrix + of_rest * worst.get("activations", 0.0)}


def static_parts(load: Load) -> dict[str, float]:
    """Bytes that stay through the run: the model as stored, and what is trained."""
    shape, trained_biases = load.shape, _trained_biases(load)
    linear = shape.linear_weights
    if load.full:
        return {"frozen weights": 0.0, "trained weights": float(HALF * shape.parameters)}
    scales = linear / BLOCK
    constants = scales * (1 + FULL / NESTED) if load.config.double_quant else scales * FULL
    return {
        "frozen weights": linear / 2 if load.packed else float(HALF * linear),
        "trained weights": 0.0,
        "quantisation constants": constants if load.packed else 0.0,
        "embeddings, head, norms": float(HALF * (shape.embeddings + shape.norms + shape.biases - trained_biases)),
        "adapters": float(FULL * _adapter(load)),
        "trained biases": float(FULL * trained_biases),
    }


def trained_parameters(load: Load) -> int:
    """Parameters that the optimizer moves."""
    return load.shape.parameters if load.full else _adapter(load) + _trained_biases(load)


def _adapter(load: Load) -> int:
    rank = load.config.rank
    return load.shape.layers * sum(rank * (linear.n_in + linear.n_out) for linear in load.adapted)


def _trained_biases(load: Load) -> int:
    if load.full or load.config.bias == "none":
        return 0
    if load.config.bias == "all":
        return load.shape.biases
    return load.shape.layers * sum(linear.n_out for linear in load.adapted if linear.bias)


def _optimizer(load: Load) -> float:
    """AdamW's two moments. Paged ones move to the CPU's memory when the GPU's is short: they do not count."""
    if load.config.optimizer.startswith("paged"):
        return 0.0
    each = (1 + FULL / BLOCK_8BIT) if load.config.optimizer == "adamw_8bit" else (HALF if load.full else FULL)
    return 2 * each * trained_parameters(load)


def _gradients(load: Load) -> float:
    return float((HALF if load.full else FULL) * trained_parameters(load))


def _base(load: Load) -> dict[str, float]:
    return {**static_parts(load), "optimizer states": _optimizer(load)}


def _at_loss(load: Load) -> dict[str, float]:
    """Forward pass done: everything saved for the backward pass is there, and the loss goes back to the logits."""
    between = _gradients(load) if load.config.gradient_accumulation > 1 else 0.0
    return {
        **_base(load),
        "gradients": between,
        "activations": _saved(load),
        "logits and loss": float(LOSS_COPIES * FULL * load.tokens * load.shape.vocabulary),
        "workspace": float(WORKSPACE),
    }


def _in_backward(load: Load) -> dict[str, float]:
    """The last block's turn: its own tensors once more if they are recomputed, and one layer's weights in 16 bits."""
    again = _block(load) if load.config.gradient_checkpointing else 0.0
    widest = max(linear.weights for linear in load.shape.linears)
    dequantised = HALF * widest if load.packed else 0.0
    width = FULL if load.shape.family == "bloom" else HALF
    flowing = load.tokens * width * (3 * load.shape.intermediate + 4 * load.shape.hidden)
    return {
        **_base(load),
        "gradients": _gradients(load),
        "activations": _saved(load) + again + flowing,
        "logits and loss": 0.0,
        "workspace": float(WORKSPACE + dequantised),
    }


def _at_step(load: Load) -> dict[str, float]:
    """Gradients are complete, and AdamW holds one more copy of what it moves while it divides."""
    copy = _gradients(load) if load.config.optimizer == "adamw_torch" else 0.0
    return {**_base(load), "gradients": _gradients(load), "workspace": WORKSPACE + copy}


def _saved(load: Load) -> float:
    """Bytes kept for the backward pass, over all blocks."""
    shape = load.shape
    last_norm = FULL * shape.hidden * load.tokens
    if load.config.gradient_checkpointing:
        width = FULL if shape.family == "bloom" else HALF  # BLOOM's residual stream is in float32
        return last_norm + shape.layers * width * shape.hidden * load.tokens
    return last_norm + shape.layers * _block(load)


def _block(load: Load) -> float:
    per_token = _bloom_block(load) if load.shape.family == "bloom" else _llama_block(load)
    return load.tokens * (per_token + _adapter_inputs(load)) + _attention_mask(load)


def _llama_block(load: Load) -> float:
    """Per token: two norms in float32; queries, keys, values and what they give; gate, activated gate, gated."""
    shape = load.shape
    queries = shape.heads * shape.head_dim
    keys = queries if load.rows > 1 else shape.kv_heads * shape.head_dim  # with padding, keys are repeated per head
    return 2 * FULL * (shape.hidden + 1) + HALF * (2 * queries + 2 * keys + 3 * shape.intermediate) + FULL * shape.heads


def _bloom_block(load: Load) -> float:
    """Per token: attention weights over the row in float32 and in 16 bits, queries, keys and values, the residual
    stream twice in float32, and what goes into the activation: in float32 behind a 4-bit layer.
    """
    shape = load.shape
    attention = (FULL + HALF) * shape.heads * load.config.max_length
    before_activation = (FULL if load.packed else HALF) * shape.intermediate
    return attention + 3 * HALF * shape.hidden + 2 * FULL * shape.hidden + before_activation


def _adapter_inputs(load: Load) -> float:
    """Per token: what each adapter reads after its dropout, the dropout's mask, and the r values between A and B."""
    if load.full:
        read = {linear.reads: linear.n_in for linear in load.shape.linears}
        return float(HALF * sum(n_in for reads, n_in in read.items() if reads != "attended"))
    inner = HALF * load.config.rank * len(load.adapted)
    if load.config.dropout > 0:
        return inner + (HALF + 1) * sum(linear.n_in for linear in load.adapted)
    read = {linear.reads: linear.n_in for linear in load.adapted if linear.reads != "attended"}
    return float(inner + HALF * sum(read.values()))


def _attention_mask(load: Load) -> float:
    """One 16-bit mask a block, where rows are padded to one length."""
    if load.shape.family == "bloom" or load.rows == 1:
        return 0.0
    return float(HALF * load.rows * load.config.max_length**2)


def evaluation_parts(load: Load) -> dict[str, float]:
    """Bytes by part at the worst moment of an evaluation: held-out losses, or answers."""
    losses, said = heldout_parts(load, rows_at_once(load)), answer_parts(load, answers_at_once(load))
    return max(losses, said, key=lambda parts: sum(parts.values()))


def rows_at_once(load: Load) -> int:
    """Held-out rows that go through the model together: so many that training needs more memory."""
    return _most(load, heldout_parts, MOST_ROWS)


def answers_at_once(load: Load) -> int:
    """Questions that are answered together: so many that training needs more memory."""
    return _most(load, answer_parts, MOST_ANSWERS)


def _most(load: Load, parts: Callable[[Load, int], dict[str, float]], most: int) -> int:
    budget = sum(training_parts(load).values())
    while most > 1 and sum(parts(load, most).values()) > budget:
        most //= 2
    return most


def heldout_parts(load: Load, rows: int) -> dict[str, float]:
    """Bytes by part while the losses of `rows` held-out rows are taken."""
    tokens = rows * load.config.max_length
    logits = min(EVALUATION_LOGITS, tokens) * load.shape.vocabulary * 2 * FULL
    kept = HALF * 2 * load.shape.hidden * tokens
    return _passing_through(load, tokens, rows, float(logits + kept))


def answer_parts(load: Load, number: int) -> dict[str, float]:
    """Bytes by part while `number` questions are answered: the questions, half as long as rows may be, go through at
    once; the keys and values of all that was read and said stay.
    """
    shape = load.shape
    asked, said = number * load.config.max_length // 2, number * load.config.max_new_tokens
    width = FULL if shape.family == "bloom" and load.packed else HALF
    cache = 2.0 * width * shape.layers * shape.kv_heads * shape.head_dim * (asked + said)
    parts = _passing_through(load, asked, number, 0.0)
    return {**parts, "keys and values": cache, "fragmentation": parts["fragmentation"] + SPARE_EVALUATION[1] * cache}


def _passing_through(load: Load, tokens: int, rows: int, logits: float) -> dict[str, float]:
    """One block's forward pass without anything saved; behind it, the logits."""
    shape = load.shape
    if shape.family == "bloom":  # float32; the activation is computed in steps, each a tensor
        widest = (2 * FULL + HALF) * shape.heads * tokens / rows + 8 * FULL * shape.hidden
        block = tokens * max(widest, 4 * FULL * shape.intermediate + 2 * FULL * shape.hidden)
    else:
        wide = {linear.name for linear in load.adapted} & {"gate_proj", "up_proj"}  # one more for the adapter's output
        block = tokens * (HALF * (4 if wide else 3) * shape.intermediate + 2 * FULL * shape.hidden)
    static = static_parts(load)
    spare = SPARE_EVALUATION[0] * max(block, logits) + (SPARE_PACKED * sum(static.values()) if load.packed else 0)
    return {
        **static,
        "activations": block if block >= logits else 0.0,
        "logits and loss": logits if logits > block else 0.0,
        "workspace": float(WORKSPACE),
        "fragmentation": spare,
    }
