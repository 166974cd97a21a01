"""Shape of a model from its config: layers, widths, parameter counts. Needs neither torch nor the weights."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from qlora_helpers import parse
from qlora_helpers.config import BUNDLED_MODEL, Config
from qlora_helpers.errors import UserError
from qlora_helpers.planning.shape import ATTENDED, Block, Linear, Shape


@dataclass(frozen=True)
class Traits:
    """How a family differs from Llama. The defaults are those of its config class, for keys that a config leaves out.

    `norms` is the number of norms per block that are as wide as the model. `qk_norms` says whether queries and keys
    have norms of their own: as wide as a head, or as all heads together. `fused`: one layer for queries, keys and
    values, and one for gate and up.
    """

    norms: int = 2
    qk_norms: str | None = None
    fused: bool = False
    tied: bool = False
    head_dim: int | None = None


LLAMA_LIKE = {
    "llama": Traits(),
    "mistral": Traits(),
    "qwen2": Traits(),
    "granite": Traits(),
    "qwen3": Traits(qk_norms="head", head_dim=128),
    "gemma2": Traits(norms=4, tied=True, head_dim=256),
    "gemma3_text": Traits(norms=4, qk_norms="head", tied=True, head_dim=256),
    "phi3": Traits(fused=True),
    "smollm3": Traits(tied=True),
    "olmo2": Traits(qk_norms="all heads"),
}
FAMILIES = (*LLAMA_LIKE, "bloom")
LARGEST = 2**31  # no width or number of layers comes near it
SECONDS = 180  # building the largest models takes about a minute


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


def _infinite(value: dict[str, Any]) -> Any:
    """Convert what transformers writes for an infinite number, which JSON lacks."""
    return float(value["__float__"]) if set(value) == {"__float__"} else value


def load(model: str, revision: str = "main") -> Shape:
    """Return the shape of a model: see `read`. Raises `UserError` also if transformers does not know its type."""
    return from_config(model, read(model, revision))


def load_or_bundled(config: Config) -> Shape:
    """Return the shape of the config's model, or of the bundled model if it is unknown."""
    try:
        return load(config.model, config.revision)
    except UserError:
        return load(BUNDLED_MODEL)


def read(model: str, revision: str = "main") -> dict[str, Any]:
    """Return the config of a model: one known offline, a folder with a `config.json`, such a file, or a hub id.

    Raises `UserError` if it cannot be loaded.
    """
    if (offline := known(model)) is not None:
        return offline
    path = parse.path(model, "model")
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        file = _from_hub(model, revision)
    return parse.model_config(file, _infinite)


@cache
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

    Families in `FAMILIES` are counted here. Any other is counted by building it on torch's meta device, in a process of
    its own, so that this one stays free of torch. Raises `UserError` for an unknown model type or a missing key.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise UserError(f"config: {name} has model_type = {kind!r}. Fix: pass the model's own config.json.")
    if kind in LLAMA_LIKE:
        return _llama(name, config)
    if kind == "bloom":
        return _bloom(name, config)
    counted = _built_elsewhere(
        json.dumps({key: value for key, value in config.items() if key != "quantization_config"})
    )
    if isinstance(counted, str):
        raise UserError(
            f"config: {name} cannot be planned: transformers builds no model of type '{kind}' from it ({counted}). "
            "Fix: pass the model's own config.json, or update transformers."
        )
    return replace(counted, name=name)


@cache
def _built_elsewhere(config: str) -> Shape | str:
    """Return the shape that `meta_device` counts in a process of its own, or why it could not, in a line."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "qlora_helpers.planning.meta_device"]
    texts: dict[str, Any] = {"text": True, "encoding": "utf-8", "errors": "replace"}
    try:
        done = subprocess.run(command, input=config, env=environment, capture_output=True, timeout=SECONDS, **texts)
    except subprocess.TimeoutExpired:
        return f"not done after {SECONDS} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no output"])[-1]
    return Shape.from_dict(json.loads(done.stdout.splitlines()[-1]))


def _count(name: str, config: dict[str, Any], *keys: str, default: int | None = None) -> int:
    """Return the value of the first of `keys` that the config has. Raises `UserError` unless it is a positive int."""
    value = next((config[key] for key in keys if config.get(key) is not None), default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < LARGEST:
        raise UserError(
            f"config: {name} has {keys[0]} = {value!r:.40} instead of a positive integer. "
            "Fix: pass the model's own config.json."
        )
    return value


def _llama(name: str, config: dict[str, Any]) -> Shape:
    kind = config["model_type"]
    traits = LLAMA_LIKE[kind]
    hidden, intermediate = _count(name, config, "hidden_size"), _count(name, config, "intermediate_size")
    heads = _count(name, config, "num_attention_heads")
    kv_heads = _count(name, config, "num_key_value_heads", default=heads)
    head_dim = _count(name, config, "head_dim", default=traits.head_dim or hidden // heads)
    vocabulary, queries, keys = _count(name, config, "vocab_size"), heads * head_dim, kv_heads * head_dim
    tied = config.get("tie_word_embeddings")
    block = Block(
        count=_count(name, config, "num_hidden_layers"),
        linears=_llama_linears(config, hidden, intermediate, queries, keys),
        norms=traits.norms * hidden + {None: 0, "head": 2 * head_dim, "all heads": queries + keys}[traits.qk_norms],
        normed=traits.norms * hidden + (queries + keys if traits.qk_norms else 0),
    )
    return Shape(
        name=name,
        family="llama",
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=vocabulary,
        positions=_count(name, config, "max_position_embeddings") if "max_position_embeddings" in config else None,
        embeddings=vocabulary * hidden * (1 if (traits.tied if tied is None else tied) else 2),
        blocks=(block,),
        outside=Block(1, norms=hidden, normed=hidden),
        usual_targets=("qkv_proj", "o_proj") if traits.fused else ("q_proj", "v_proj"),
    )


def _llama_linears(
    config: dict[str, Any], hidden: int, intermediate: int, queries: int, keys: int
) -> tuple[Linear, ...]:
    """Return the linear layers of a block; `queries` and `keys` are the widths of all heads."""
    qwen2, mlp_bias = config["model_type"] == "qwen2", bool(config.get("mlp_bias"))
    bias = qwen2 or bool(config.get("attention_bias"))
    output = Linear("o_proj", queries, hidden, bias and not qwen2, ATTENDED)
    down = Linear("down_proj", intermediate, hidden, mlp_bias, "gated")
    if LLAMA_LIKE[config["model_type"]].fused:
        qkv = Linear("qkv_proj", hidden, queries + 2 * keys, False, "normed")
        return qkv, output, Linear("gate_up_proj", hidden, 2 * intermediate, False, "normed again"), down
    return (
        Linear("q_proj", hidden, queries, bias, "normed"),
        Linear("k_proj", hidden, keys, bias, "normed"),
        Linear("v_proj", hidden, keys, bias, "normed"),
        output,
        Linear("gate_proj", hidden, intermediate, mlp_bias, "normed again"),
        Linear("up_proj", hidden, intermediate, mlp_bias, "normed again"),
        down,
    )


def _bloom(name: str, config: dict[str, Any]) -> Shape:
    hidden = _count(name, config, "hidden_size", "n_embed")
    heads = _count(name, config, "n_head", "num_attention_heads")
    vocabulary = _count(name, config, "vocab_size")
    tied = bool(config.get("tie_word_embeddings", True))
    block = Block(
        count=_count(name, config, "n_layer", "num_hidden_layers"),
        linears=(
            Linear("query_key_value", hidden, 3 * hidden, True, "normed"),
            Linear("dense", hidden, hidden, True, ATTENDED),
            Linear("dense_h_to_4h", hidden, 4 * hidden, True, "normed again"),
            Linear("dense_4h_to_h", 4 * hidden, hidden, True, "activated"),
        ),
        norms=2 * hidden,
        norm_biases=2 * hidden,
        normed=2 * hidden,
    )
    return Shape(
        name=name,
        family="bloom",
        hidden=hidden,
        intermediate=4 * hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocabulary=vocabulary,
        positions=None,  # ALiBi has no position embeddings
        embeddings=vocabulary * hidden * (1 if tied else 2),
        blocks=(block,),
        outside=Block(1, norms=2 * hidden, norm_biases=2 * hidden, normed=2 * hidden),  # of embeddings and output
        usual_targets=("query_key_value",),
    )
