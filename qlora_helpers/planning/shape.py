"""Shape of a model: everything that its memory depends on, as numbers of weights per block."""

from dataclasses import dataclass
from typing import Any

from qlora_helpers.errors import UserError

ATTENDED = "attended"  # the output of the attention, which the attention itself keeps for its backward pass


@dataclass(frozen=True)
class Linear:
    """One linear layer. `reads` names its input; layers that read the same tensor share it in memory.

    `packable` says whether bitsandbytes stores it in 4 bits: transformers replaces `nn.Linear` and `Conv1D`, but no
    subclasses.
    """

    name: str
    n_in: int
    n_out: int
    bias: bool
    reads: str
    packable: bool = True

    @property
    def weights(self) -> int:
        """Number of weights, without the bias."""
        return self.n_in * self.n_out


@dataclass(frozen=True)
class Block:
    """Equal blocks of a model, `count` of them.

    `norms` and `norm_biases` count the weights and biases of one block that belong to no linear layer. `others` counts
    its further matrices, such as experts that are no linear layers: bitsandbytes leaves them in 16 bits. `normed` is
    the number of values per token that its norms read, `expert_width` that of the inner values of its experts.
    """

    count: int
    linears: tuple[Linear, ...] = ()
    norms: int = 0
    norm_biases: int = 0
    others: int = 0
    normed: int = 0
    expert_width: int = 0

    @property
    def biases(self) -> int:
        """Number of biases of one block."""
        return sum(linear.n_out for linear in self.linears if linear.bias) + self.norm_biases

    @property
    def packable(self) -> int:
        """Number of weights of one block that bitsandbytes stores in 4 bits."""
        return sum(linear.weights for linear in self.linears if linear.packable)

    @property
    def matrices(self) -> int:
        """Number of weights of one block except those of its norms."""
        return sum(linear.weights for linear in self.linears) + self.others

    @property
    def attends(self) -> bool:
        """Whether the block has attention, with keys and values."""
        return any(linear.reads == ATTENDED for linear in self.linears)


@dataclass(frozen=True)
class Shape:
    """Everything about a model that its memory depends on. `outside` is what belongs to no block: the last norm.

    `embeddings` counts the weights of the embeddings, and of the output head unless the two are tied. `usual_targets`
    are the layers that usually get an adapter.
    """

    name: str
    family: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int | None
    embeddings: int
    blocks: tuple[Block, ...]
    outside: Block
    usual_targets: tuple[str, ...]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Shape":
        """Return the shape with the values of `dataclasses.asdict`, in which lists may stand for tuples, as in JSON."""
        *blocks, outside = (
            Block(**{**part, "linears": tuple(Linear(**linear) for linear in part["linears"])})
            for part in (*values["blocks"], values["outside"])
        )
        targets = tuple(values["usual_targets"])
        return cls(**{**values, "blocks": tuple(blocks), "outside": outside, "usual_targets": targets})

    @property
    def parts(self) -> tuple[Block, ...]:
        """All blocks, and what is outside of them."""
        return (*self.blocks, self.outside)

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return sum(block.count for block in self.blocks)

    @property
    def multiplied(self) -> int:
        """Number of weights that each token is multiplied with: those of the linear layers and of the output head."""
        return sum(part.count * (part.matrices - part.others) for part in self.parts) + self.vocabulary * self.hidden

    @property
    def packable(self) -> int:
        """Number of weights that bitsandbytes stores in 4 bits."""
        return sum(part.count * part.packable for part in self.parts)

    @property
    def matrices(self) -> int:
        """Number of weights except those of embeddings, output head and norms."""
        return sum(part.count * part.matrices for part in self.parts)

    @property
    def biases(self) -> int:
        """Number of biases of the model, including those of its norms."""
        return sum(part.count * part.biases for part in self.parts)

    @property
    def norms(self) -> int:
        """Number of weights of the norms, without their biases."""
        return sum(part.count * part.norms for part in self.parts)

    @property
    def parameters(self) -> int:
        """Number of parameters of the model. A tied matrix counts once."""
        return self.matrices + self.embeddings + self.norms + self.biases

    def targets(self, names: tuple[str, ...]) -> frozenset[str]:
        """Return the names of the layers that get an adapter. Raises `UserError` for a name that no layer has."""
        known = {linear.name for part in self.parts for linear in part.linears}
        if names == ("all-linear",):
            return frozenset(known)
        for name in names:
            if name not in known:
                raise UserError(
                    f"target_modules: {self.name} has no linear layer '{name}'. Fix: choose from "
                    f"{', '.join(sorted(known))}, or all-linear; usual: {', '.join(self.usual_targets)}."
                )
        return frozenset(names)
