"""Shape of any model that transformers knows, counted on torch's meta device, which has shapes but no memory.

`architectures` starts this module as a process of its own: planning itself stays free of torch.
"""

import json
import sys
from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from qlora_helpers.models.qlora import usual_targets
from qlora_helpers.planning.shape import ATTENDED, Block, Linear, Shape

TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_topk")  # names of the number of experts that a token passes


def main() -> None:
    """Read a config from standard input, and print the `Shape` of its model as one line of JSON."""
    logging.set_verbosity_error()
    try:
        shape = measure(build(json.load(sys.stdin)))
    except Exception as error:  # any class of model may raise anything for a config that does not suit it
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split())[:200])
    print(json.dumps(asdict(shape)))


def build(config: dict[str, Any]) -> Any:
    """Return the model of a config on the meta device. Code that comes with a model is never run."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), trust_remote_code=False)


def measure(model: Any) -> Shape:
    """Return the shape of a model."""
    config = model.config.get_text_config()
    heads = _number(config, "num_attention_heads", 1)
    numbers = {
        "hidden": config.hidden_size,
        "heads": heads,
        "kv_heads": _number(config, "num_key_value_heads", heads),
        "head_dim": _number(config, "head_dim", config.hidden_size // heads),
        "vocabulary": config.vocab_size,
        "positions": _number(config, "max_position_embeddings", 0) or None,
        "embeddings": _embeddings(model),
    }
    folder, modules = _blocks(model, config)
    alike = Counter(_part(model, module, numbers, config) for module in modules)
    blocks = tuple(replace(block, count=number) for block, number in alike.items())
    widths = [linear.n_in for block in blocks for linear in block.linears if linear.reads != ATTENDED]
    return Shape(
        **numbers,
        name=type(model).__name__,
        family=model.config.model_type,
        intermediate=max([*widths, _number(config, "intermediate_size", 1)]),
        blocks=blocks,
        outside=_part(model, model, numbers, config, without=f"{folder}."),
        usual_targets=tuple(usual_targets(model)),
    )


def _number(config: Any, name: str, default: int) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else default  # some families give one number per block


def _blocks(model: Any, config: Any) -> tuple[str, list[Any]]:
    """Return the path and the modules of the list of blocks: the largest one with a module per hidden layer."""
    found = [
        (name, list(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    ]
    if not found:
        raise ValueError(f"no list of {config.num_hidden_layers} blocks")
    return max(found, key=lambda pair: sum(p.numel() for block in pair[1] for p in block.parameters()))


def _embeddings(model: Any) -> int:
    """Weights of all embeddings and of the output head. A tied matrix counts once."""
    matrices = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings()
    return sum({id(weight): weight.numel() for weight in [*matrices, *([head.weight] if head else [])]}.values())


def _part(model: Any, root: Any, numbers: dict[str, Any], config: Any, without: str = "\0") -> Block:
    """Count the modules under `root`, except those whose path starts with `without`."""
    layers, norms, biases, others, normed, experts = {}, 0, 0, 0, 0, 0
    head = model.get_output_embeddings()
    for path, module in root.named_modules():
        if path.startswith(without) or isinstance(module, nn.Embedding):
            continue
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            layers[path] = module
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if "bias" in name:  # as PEFT finds them
                biases += parameter.numel()
            elif module is head:
                continue
            elif parameter.ndim == 1:
                norms += parameter.numel()
                normed += _normed(parameter.numel(), path, numbers)
            else:
                others += parameter.numel()
                experts += parameter.ndim == 3 and "expert" in path
    width = _number(config, "moe_intermediate_size", _number(config, "intermediate_size", 0))
    active = next((value for name in TOP_K if (value := _number(config, name, 0))), 1)
    return Block(
        count=1,
        linears=tuple(_linears(layers, numbers["hidden"])),
        norms=norms,
        norm_biases=biases,
        others=others,
        normed=normed,
        expert_width=active * width if experts else 0,
    )


def _normed(width: int, path: str, numbers: dict[str, Any]) -> int:
    """Values per token that a norm reads. One as wide as a head reads all heads, of the queries or of the keys."""
    if width != numbers["head_dim"] or width == numbers["hidden"]:
        return width
    return width * numbers["heads" if path.rsplit(".", 1)[-1].startswith("q") else "kv_heads"]


def _linears(layers: dict[str, Any], hidden: int) -> list[Linear]:
    """Describe linear layers by their path in a block.

    Which tensor a layer reads follows from its place: within a module, the last layer that writes to the residual
    stream reads the module's inner values, and all others of one input width read the same tensor.
    """
    sizes = {path: tuple(layer.weight.shape) for path, layer in layers.items()}
    sizes = {path: size if isinstance(layers[path], Conv1D) else size[::-1] for path, size in sizes.items()}
    parent = {path: path.rpartition(".")[0] for path in sizes}
    group = Counter(parent.values())
    output = {parent[path]: path for path, (_, n_out) in sizes.items() if n_out == hidden and group[parent[path]] > 1}
    described = []
    for path, (n_in, n_out) in sizes.items():
        reads = f"{parent[path]} {n_in}"
        if output.get(parent[path]) == path:
            reads = ATTENDED if "att" in parent[path] else path
        packable = type(layers[path]) in (nn.Linear, Conv1D)
        name = path.rpartition(".")[2]
        described.append(Linear(name, n_in, n_out, layers[path].bias is not None, reads, packable))
    return described


if __name__ == "__main__":
    main()
