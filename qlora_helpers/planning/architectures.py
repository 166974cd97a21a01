"""Shape of a model from its config: layers, widths, parameter counts. Needs neither torch nor the weights."""

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from qlora_helpers.errors import UserError, nearest

LLAMA_LIKE = ("llama", "mistral", "qwen2")
FAMILIES = (*LLAMA_LIKE, "bloom")


@dataclass(frozen=True)
class Linear:
    """One linear layer of a block. `reads` names its input; layers that read the same tensor share it in memory."""

    name: str
    n_in: int
    n_out: int
    bias: bool
    reads: str

    @property
    def weights(self) -> int:
        """Number of weights, without the bias."""
        return self.n_in * self.n_out


@dataclass(frozen=True)
class Shape:
    """Everything about a model that its memory depends on.

    `norm_weights` and `norm_biases` count the norms of one block, `outer_weights` and `outer_biases` those outside the
    blocks.
    """

    name: str
    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int | None
    tied: bool
    linears: tuple[Linear, ...]
    norm_weights: int
    norm_biases: int
    outer_weights: int
    outer_biases: int

    @property
    def linear_weights(self) -> int:
        """Number of weights that are quantized: those of every linear layer except the output head."""
        return self.layers * sum(linear.weights for linear in self.linears)

    @property
    def embeddings(self) -> int:
        """Number of weights of the embeddings, and of the output head unless the two are tied."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def biases(self) -> int:
        """Number of biases of the model, including those of its norms."""
        per_block = sum(linear.n_out for linear in self.linears if linear.bias) + self.norm_biases
        return self.layers * per_block + self.outer_biases

    @property
    def norms(self) -> int:
        """Number of weights of the norms, without their biases."""
        return self.layers * self.norm_weights + self.outer_weights

    @property
    def parameters(self) -> int:
        """Number of parameters of the model. A tied matrix counts once."""
        return self.linear_weights + self.embeddings + self.norms + self.biases

    @property
    def usual_targets(self) -> tuple[str, ...]:
        """Default layers for an adapter: queries and values, as in the LoRA paper (Hu et al., 2021)."""
        return ("query_key_value",) if self.family == "bloom" else ("q_proj", "v_proj")

    def targets(self, names: tuple[str, ...]) -> tuple[Linear, ...]:
        """Return the linear layers of a block that get an adapter. Raises `UserError` for a name that no layer has."""
        if names == ("all-linear",):
            return self.linears
        known_names = [linear.name for linear in self.linears]
        for name in names:
            if name not in known_names:
                raise UserError(
                    f"target_modules: {self.name} has no linear layer '{name}'.{nearest(name, known_names)}"
                )
        return tuple(linear for linear in self.linears if linear.name in names)


@cache
def _known() -> dict[str, dict[str, Any]]:
    folder = resources.files("qlora_helpers") / "known_models"
    files = sorted(folder.iterdir(), key=lambda file: file.name)
    return {f.name.removesuffix(".json"): json.loads(f.read_text("utf-8")) for f in files if f.name.endswith(".json")}


def known_models() -> list[str]:
    """Return the short names of the models whose config is known offline."""
    return list(_known())


def known(name: str) -> dict[str, Any] | None:
    """Return the config of a model that is known offline, by its short name or hub id, or None."""
    for short, entry in _known().items():
        if name == short or name in entry["names"]:
            return dict(entry["config"])
    return None


def load(model: str, revision: str = "main") -> Shape:
    """Return the shape of a model: one known offline, a folder with a `config.json`, such a file, or a hub id.

    Raises `UserError` if the config cannot be loaded or its model type is not supported.
    """
    path = Path(model).expanduser()
    if (config := known(model)) is None:
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            file = _from_hub(model, revision)
        try:
            config = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"config: {file} cannot be read ({error}). Fix: pass a model's config.json.") from None
    if not isinstance(config, dict):
        raise UserError(f"config: {model} does not contain a model's config. Fix: pass a model's config.json.")
    return from_config(model, config)


def _from_hub(model: str, revision: str) -> Path:
    from qlora_helpers.models import hub

    try:
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(model, "config.json", revision=revision, local_files_only=not hub.reachable())
        return Path(path)
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"model: cannot load the config of '{model}' ({why}). Fix: pass a folder or a config.json, or one of "
            f"{', '.join(_known())}."
        ) from None


def from_config(name: str, config: dict[str, Any]) -> Shape:
    """Return the shape that a model's `config.json` describes.

    Raises `UserError` for an unsupported model type or a missing key.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"config: model type '{kind}' is not supported by the plan. Supported: {', '.join(FAMILIES)}.")
    return _bloom(name, config) if kind == "bloom" else _llama(name, config)


def _count(name: str, config: dict[str, Any], *keys: str, default: int | None = None) -> int:
    """Return the value of the first of `keys` that the config has. Raises `UserError` unless it is a positive int."""
    value = next((config[key] for key in keys if config.get(key) is not None), default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(
            f"config: {name} has {keys[0]} = {value!r} instead of a positive integer. "
            "Fix: pass the model's own config.json."
        )
    return value


def _llama(name: str, config: dict[str, Any]) -> Shape:
    hidden, intermediate = _count(name, config, "hidden_size"), _count(name, config, "intermediate_size")
    heads = _count(name, config, "num_attention_heads")
    kv_heads = _count(name, config, "num_key_value_heads", default=heads)
    head_dim = _count(name, config, "head_dim", default=hidden // heads)
    attention_bias = config["model_type"] == "qwen2" or bool(config.get("attention_bias"))
    mlp_bias = bool(config.get("mlp_bias"))
    out_bias = attention_bias and config["model_type"] != "qwen2"
    return Shape(
        name=name,
        family="llama",
        hidden=hidden,
        intermediate=intermediate,
        layers=_count(name, config, "num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=_count(name, config, "vocab_size"),
        positions=_count(name, config, "max_position_embeddings") if "max_position_embeddings" in config else None,
        tied=bool(config.get("tie_word_embeddings", False)),
        linears=(
            Linear("q_proj", hidden, heads * head_dim, attention_bias, "normed"),
            Linear("k_proj", hidden, kv_heads * head_dim, attention_bias, "normed"),
            Linear("v_proj", hidden, kv_heads * head_dim, attention_bias, "normed"),
            Linear("o_proj", heads * head_dim, hidden, out_bias, "attended"),
            Linear("gate_proj", hidden, intermediate, mlp_bias, "normed again"),
            Linear("up_proj", hidden, intermediate, mlp_bias, "normed again"),
            Linear("down_proj", intermediate, hidden, mlp_bias, "gated"),
        ),
        norm_weights=2 * hidden,
        norm_biases=0,
        outer_weights=hidden,
        outer_biases=0,
    )


def _bloom(name: str, config: dict[str, Any]) -> Shape:
    hidden = _count(name, config, "hidden_size", "n_embed")
    heads = _count(name, config, "n_head", "num_attention_heads")
    return Shape(
        name=name,
        family="bloom",
        hidden=hidden,
        intermediate=4 * hidden,
        layers=_count(name, config, "n_layer", "num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocabulary=_count(name, config, "vocab_size"),
        positions=None,  # ALiBi has no position embeddings
        tied=bool(config.get("tie_word_embeddings", True)),
        linears=(
            Linear("query_key_value", hidden, 3 * hidden, True, "normed"),
            Linear("dense", hidden, hidden, True, "attended"),
            Linear("dense_h_to_4h", hidden, 4 * hidden, True, "normed again"),
            Linear("dense_4h_to_h", 4 * hidden, hidden, True, "activated"),
        ),
        norm_weights=2 * hidden,
        norm_biases=2 * hidden,
        outer_weights=2 * hidden,
        outer_biases=2 * hidden,
    )
