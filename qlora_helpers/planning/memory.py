"""Peak memory of a run by part, computed from the model's config, without torch and without weights.

The content of each part was read from the tensors alive at the peak of real runs. `benchmarks/memory.py` measures whole
runs, and `docs/results.md` lists the errors of the plan. All sizes are in bytes.
"""

from collections.abc import Callable
from dataclasses import replace

from qlora_helpers.config import Config
from qlora_helpers.planning import graphs, sharding
from qlora_helpers.planning.shape import ATTENDED, Block
from qlora_helpers.planning.workload import ALONE, BLOCK, FULL, HALF, WORKSPACE, Workload
from qlora_helpers.planning.workload import workload_of as workload_of

GIB = 2**30
NESTED = 256  # scales that share a second scale, with double quantization
BLOCK_8BIT = 256  # optimizer values that share a scale in 8-bit AdamW
LOSS_COPIES = 3  # float32 matrices of tokens x vocabulary at the loss: log-softmax, its gradient, the logits' gradient
EVALUATION_LOGITS = 512  # tokens whose logits `evaluation` converts to float32 at once
MOST_ROWS, MOST_ANSWERS = 8, 128  # more rows at once are no faster on a CPU; many answers take as many steps as one
MOST_ROWS_ON_GPU = 32  # a pass of fewer tokens takes as long: until then, Python launches kernels

# Memory that the allocator reserves beyond what is used, as fractions fitted by least squares to the measured settings
# that are not held back for scoring. The first is of one float32 matrix of tokens x vocabulary, whose gaps are not
# filled again, the second of the activations.
SPARE = (0.58, 0.05)
SPARE_CHECKPOINTING = (0.81, 0.35)  # recomputed blocks lie between those that stay
SPARE_EVALUATION = (0.28, 0.05)  # without gradients: of temporary tensors, and of keys and values
SPARE_LOGITS = 0.03  # of the logits in an evaluation, most of which are one tensor
SPARE_PACKED = 0.03  # of 4-bit weights, which lie in gaps left by the 16-bit weights they were made from


def training_parts(workload: Workload) -> dict[str, float]:
    """Return bytes by part at the peak of a step: at the loss, in a block's backward pass, or in the optimizer step."""
    moments = (_at_loss(workload), _in_backward(workload), _at_step(workload))
    worst = max(moments, key=lambda parts: sum(parts.values()))
    of_loss, of_rest = SPARE_CHECKPOINTING if workload.config.gradient_checkpointing else SPARE
    spare = of_loss * _logits(workload) + of_rest * worst.get("activations", 0.0)
    added = {} if workload.path == "off" else {"graphs": graphs.held(workload)}
    return {**worst, "fragmentation": spare, **added}


def static_parts(workload: Workload) -> dict[str, float]:
    """Return bytes by part that stay allocated during the whole run: the stored model and the trained weights."""
    return sharding.shards(workload, _whole(workload))


def offloaded(workload: Workload) -> float:
    """Return the bytes that all GPUs together keep in the computer's memory: 0 without offload."""
    trained = {"optimizer states": _moments(workload), "gradients": _gradients(workload)}
    return sharding.offloaded(workload, {**_whole(workload), **trained})


def _whole(workload: Workload) -> dict[str, float]:
    shape, trained_biases = workload.shape, _trained_biases(workload)
    packed = shape.packable if workload.packed else 0
    if workload.full:
        return {"frozen weights": 0.0, "trained weights": float(HALF * shape.parameters)}
    constants = packed / BLOCK * (1 + FULL / NESTED if workload.config.double_quant else FULL)
    return {
        "frozen weights": packed / 2 + HALF * (shape.matrices - packed),
        "trained weights": 0.0,
        "quantization constants": constants,
        "embeddings, head, norms": float(HALF * (shape.embeddings + shape.norms + shape.biases - trained_biases)),
        "adapters": float(FULL * _adapter(workload)),
        "trained biases": float(FULL * trained_biases),
    }


def trained_parameters(workload: Workload) -> int:
    """Return the number of parameters that the optimizer updates."""
    return workload.shape.parameters if workload.full else _adapter(workload) + _trained_biases(workload)


def _adapter(workload: Workload) -> int:
    return sum(part.count * workload.adapter(part) for part in workload.shape.parts)


def _trained_biases(workload: Workload) -> int:
    if workload.full or workload.config.bias == "none":
        return 0
    if workload.config.bias == "all":
        return workload.shape.biases
    return sum(
        part.count * linear.n_out for part in workload.shape.parts for linear in workload.adapted(part) if linear.bias
    )


def _moments(workload: Workload) -> float:
    """Bytes of AdamW's two moments."""
    each = (1 + FULL / BLOCK_8BIT) if "8bit" in workload.config.optimizer else (HALF if workload.full else FULL)
    return 2 * each * trained_parameters(workload)


def _gradients(workload: Workload) -> float:
    return float((HALF if workload.full else FULL) * trained_parameters(workload))


def _base(workload: Workload) -> dict[str, float]:
    paged = workload.config.optimizer.startswith("paged")  # these moments move to CPU memory when the GPU's is short
    moments = 0.0 if paged else sharding.at_step(workload, _moments(workload))
    buckets = sharding.buckets(workload, _gradients(workload))
    return {**static_parts(workload), "optimizer states": moments, **buckets}


def _at_loss(workload: Workload) -> dict[str, float]:
    """After the forward pass: everything saved for the backward pass exists, and the logits get their gradient."""
    return {
        **_base(workload),
        **sharding.gathered(workload, layers=1, head=True),
        "gradients": sharding.between_passes(workload, _gradients(workload)),
        "activations": _saved(workload),
        "logits and loss": LOSS_COPIES * _logits(workload),
        "workspace": float(WORKSPACE),
    }


def _logits(workload: Workload) -> float:
    """Bytes of one float32 matrix of tokens x vocabulary at the loss."""
    return float(FULL * graphs.loss_tokens(workload) * workload.shape.vocabulary)


def _in_backward(workload: Workload) -> dict[str, float]:
    """Backward pass of the largest block: its own tensors if recomputed, and one layer's weights in 16 bits."""
    largest = max((_block(workload, block) for block in workload.shape.blocks), default=0.0)
    again = largest if workload.config.gradient_checkpointing else 0.0
    widest = max((linear.weights for block in workload.shape.blocks for linear in block.linears), default=0)
    dequantized = HALF * widest if workload.packed else 0.0
    width = FULL if workload.shape.family == "bloom" else HALF
    flowing = workload.tokens * width * (3 * workload.shape.intermediate + 4 * workload.shape.hidden)
    return {
        **_base(workload),
        **sharding.gathered(workload, layers=2, head=False),
        "gradients": sharding.in_backward(workload, _gradients(workload)),
        "activations": _saved(workload) + again + flowing,
        "logits and loss": 0.0,
        "workspace": float(WORKSPACE + dequantized),
    }


def _at_step(workload: Workload) -> dict[str, float]:
    """Optimizer step: all gradients exist, and AdamW's division needs one more copy of the trained parameters."""
    gradients = sharding.at_step(workload, _gradients(workload))
    copy = gradients if workload.config.optimizer == "adamw_torch" else 0.0
    return {**_base(workload), "gradients": gradients, "workspace": WORKSPACE + copy}


def _saved(workload: Workload) -> float:
    """Bytes saved for the backward pass, over all blocks. Graphs keep the inputs of the blocks elsewhere."""
    shape = workload.shape
    last_norm = FULL * shape.hidden * workload.tokens
    if workload.config.gradient_checkpointing:
        width = FULL if shape.family == "bloom" else HALF  # BLOOM's residual stream is in float32
        inputs = shape.layers if workload.path == "off" else 1  # see training/host_memory.py
        return last_norm + inputs * width * shape.hidden * workload.tokens
    return last_norm + workload.total(lambda block: _block(workload, block))


def _block(workload: Workload, block: Block) -> float:
    per_token = _bloom_block(workload) if workload.shape.family == "bloom" else _plain_block(workload, block)
    per_token *= graphs.COMPILED if workload.path == "compiled" else 1
    return workload.tokens * (per_token + _adapter_inputs(workload, block)) + _attention_mask(workload, block)


def _plain_block(workload: Workload, block: Block) -> float:
    """Bytes per token: norms in float32, and in 16 bits what lies between the layers that read the residual stream and
    those that write to it. In a Llama these are queries, keys, values, attention output; gate, its activation, product.
    """
    shape = workload.shape
    inner = sum(linear.n_out if linear.n_in == shape.hidden else linear.n_in for linear in block.linears)
    attention = 0
    if block.attends:
        attention = FULL * shape.heads
        if workload.masked:  # keys and values are repeated per head
            inner += 2 * (shape.heads - shape.kv_heads) * shape.head_dim
    return FULL * (block.normed + 2) + HALF * (inner + 3 * block.expert_width) + attention


def _bloom_block(workload: Workload) -> float:
    """Bytes per token: attention weights over the row in float32 and in 16 bits, queries, keys and values, the residual
    stream twice in float32, and the input of the activation, which is in float32 after a 4-bit layer.
    """
    shape = workload.shape
    attention = (FULL + HALF) * shape.heads * workload.config.max_length
    before_activation = (FULL if workload.packed else HALF) * shape.intermediate
    return attention + 3 * HALF * shape.hidden + 2 * FULL * shape.hidden + before_activation


def _adapter_inputs(workload: Workload, block: Block) -> float:
    """Bytes per token: each adapter's input after dropout, the dropout mask, and the r values between A and B."""
    adapted = workload.adapted(block)
    inner = HALF * workload.config.rank * len(adapted)
    if workload.config.dropout > 0 and not workload.full:
        return inner + (HALF + 1) * sum(linear.n_in for linear in adapted)
    trained = block.linears if workload.full else adapted
    read = {linear.reads: linear.n_in for linear in trained if linear.reads != ATTENDED}
    return float(inner + HALF * sum(read.values()))


def _attention_mask(workload: Workload, block: Block) -> float:
    """Bytes of one 16-bit mask per block, needed when rows are padded to the same length."""
    if workload.shape.family == "bloom" or not workload.masked or not block.attends:
        return 0.0
    return float(HALF * workload.rows * workload.config.max_length**2)


def evaluation_parts(workload: Workload) -> dict[str, float]:
    """Return bytes by part at the peak of an evaluation: during held-out losses or during answers."""
    losses = _whole_rows(workload, rows_at_once(workload))
    answers = answer_parts(workload, answers_at_once(workload))
    return max(losses, answers, key=lambda parts: sum(parts.values()))


def rows_at_once(workload: Workload) -> int:
    """Return how many of the longest held-out rows a GPU evaluates at once, in no more memory than training needs."""
    return _most(workload, _whole_rows, MOST_ROWS_ON_GPU)


def answers_at_once(workload: Workload) -> int:
    """Return how many questions to answer in one batch: at most as many as need no more memory than training.

    A GPU keeps room for the keys and values of whole answers from their first token on: see `forward.static_cache`.
    """
    return _most(workload, answer_parts, MOST_ANSWERS)


def _most(workload: Workload, parts: Callable[[Workload, int], dict[str, float]], most: int) -> int:
    workload = replace(workload, parallel=ALONE)  # each process takes as many as a run of its rows alone
    budget = sum(training_parts(workload).values())
    while most > 1 and sum(parts(workload, most).values()) > budget:
        most //= 2
    return most


def heldout_parts(workload: Workload, rows: int, length: int | None = None) -> dict[str, float]:
    """Return bytes by part while the losses of `rows` rows of `length` tokens (None: `max_length`) are computed."""
    length = length or workload.config.max_length
    tokens = rows * length
    # The logits of all rows, those of one row again, and in float32, with their log-softmax, those of some tokens.
    logits = HALF * (tokens + length) + 2 * FULL * min(EVALUATION_LOGITS, length)
    kept = HALF * 2 * workload.shape.hidden * tokens
    return _passing_through(workload, tokens, rows, float(logits * workload.shape.vocabulary + kept))


def _whole_rows(workload: Workload, rows: int) -> dict[str, float]:
    return heldout_parts(workload, rows, workload.heldout_length)


def question_tokens(config: Config) -> int:
    """Return the tokens of a question that batches of answers have room for. Of longer ones, a batch has fewer."""
    return max(config.max_length // 2, 1)


def answer_parts(workload: Workload, number: int) -> dict[str, float]:
    """Return bytes by part while `number` questions are answered in one batch.

    The questions pass through the model at once. The keys and values of all question and answer tokens stay.
    """
    shape = workload.shape
    read, written = number * question_tokens(workload.config), number * workload.config.max_new_tokens
    width = FULL if shape.family == "bloom" and workload.packed else HALF
    layers = workload.total(lambda block: block.attends)
    cache = 2.0 * width * layers * shape.kv_heads * shape.head_dim * (read + written)
    parts = _passing_through(workload, read, number, 0.0)
    return {**parts, "keys and values": cache, "fragmentation": parts["fragmentation"] + SPARE_EVALUATION[1] * cache}


def _passing_through(workload: Workload, tokens: int, rows: int, logits: float) -> dict[str, float]:
    """Bytes by part of one block's forward pass without gradients, or of the logits after it, if those are larger."""
    shape = workload.shape
    if shape.family == "bloom":  # float32; each step of the activation is a tensor of its own
        widest = (2 * FULL + HALF) * shape.heads * tokens / rows + 8 * FULL * shape.hidden
        block = tokens * max(widest, 4 * FULL * shape.intermediate + 2 * FULL * shape.hidden)
    else:
        wide = workload.targets & {"gate_proj", "up_proj", "gate_up_proj"}  # one more tensor: the adapter's output
        block = tokens * (HALF * (4 if wide else 3) * shape.intermediate + 2 * FULL * shape.hidden)
    static = static_parts(workload)
    temporary = max(SPARE_EVALUATION[0] * block, SPARE_LOGITS * logits)
    spare = temporary + (SPARE_PACKED * sum(static.values()) if workload.packed else 0)
    return {
        **static,
        **sharding.all_gathered(workload, _whole(workload)),
        "activations": block if block >= logits else 0.0,
        "logits and loss": logits if logits > block else 0.0,
        "workspace": float(WORKSPACE),
        "fragmentation": spare,
    }
