"""A merged model as one GGUF file for llama.cpp, Ollama and their kin: weights, tokenizer, chat template, end tokens.

Written with the `gguf` package of the llama.cpp project, one tensor in memory at a time.
"""

import ctypes
import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants

from qlora_helpers.data import chat_template
from qlora_helpers.errors import UserError, nearest
from qlora_helpers.models import hub, safetensors_io
from qlora_helpers.models.safetensors_io import StoredTensor

# Kinds that the `gguf` package can write: it reads q4_k_m, and leaves writing that to llama.cpp's own quantizer.
OWN = {"f16": (Kind.F16, gguf.LlamaFileType.MOSTLY_F16), "q8_0": (Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0)}
Q4 = "q4_k_m"
KINDS = (*OWN, Q4)
WRITTEN = ("llama", "mistral")  # one architecture to llama.cpp
TOKEN = gguf.TokenType
# How llama.cpp splits text before merging, by the regular expression that the tokenizer splits with.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def check(folder: Path) -> dict[str, Any]:
    """The model's config. Raises `UserError` for a model that this module cannot write, before anything is written."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    family = config.get("model_type")
    if family not in WRITTEN:
        raise UserError(
            f"gguf: a model of the family '{family}' cannot be written, only {' and '.join(WRITTEN)}. {MEND}"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"gguf: positions scaled as '{rope.get('rope_type')}' cannot be written. {MEND}")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise UserError(f"gguf: linear layers with biases cannot be written. {MEND}")
    return config


def check_kind(kind: str) -> None:
    """Raise `UserError` for a kind that cannot be written here."""
    if kind not in KINDS:
        raise UserError(f"gguf: '{kind}' cannot be written.{nearest(kind, KINDS)}")
    if kind == Q4 and importlib.util.find_spec("llama_cpp") is None:
        raise UserError(
            f"gguf: {Q4} is made by llama.cpp, which is not installed. Fix: pip install llama-cpp-python (a compiler "
            "works on it for minutes), or choose q8_0."
        )


MEND = "Fix: ship the merged folder, or convert it with llama.cpp's own script."


def write(folder: Path, target: Path, kind: str) -> None:
    """Write the merged model in `folder` to the file `target`, its matrices as `kind`: f16, q8_0 or q4_k_m."""
    if kind == Q4:
        return _write_q4(folder, target)
    config = check(folder)
    writer = gguf.GGUFWriter(target, "llama")
    _add_shape(writer, config, kind, folder)
    _add_tokenizer(writer, folder, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    tied = config.get("tie_word_embeddings", False)
    stored = [t for t in safetensors_io.tensors(folder) if not (tied and t.name == "lm_head.weight")]
    for tensor in stored:
        how = _how(tensor, kind)
        name = names.get_name(tensor.name, try_suffixes=(".weight",))
        if name is None:
            raise UserError(f"gguf: there is no place for {tensor.name}. {MEND}")
        size = gguf.quant_shape_to_byte_shape(tensor.shape, how)
        writer.add_tensor_info(name, size, np.dtype(np.uint8), int(np.prod(size)), raw_dtype=how)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in stored:
        values = _permuted(tensor.name, tensor.read().float(), config).numpy()
        writer.write_tensor_data(quants.quantize(values, _how(tensor, kind)))
    writer.close()


def _write_q4(folder: Path, target: Path) -> None:
    """By way of an f16 file, which is removed. Rows that blocks of 256 do not fill get 5 or 8 bits, by llama.cpp."""
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)  # it tells of every tensor, warnings as errors
    whole = target.with_name(f".{target.name}-f16")
    write(folder, whole, "f16")
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    failed = llama_cpp.llama_model_quantize(str(whole).encode(), str(target).encode(), ctypes.byref(options))
    whole.unlink()
    if failed:
        raise UserError(f"gguf: llama.cpp could not make {Q4} of {folder}. Fix: choose q8_0.")


def _how(tensor: StoredTensor, kind: str) -> Kind:
    """Norms stay in 32 bits, as in llama.cpp; a row that blocks of 32 do not fill stays in 16."""
    if len(tensor.shape) == 1:
        return Kind.F32
    return Kind.F16 if tensor.shape[-1] % 32 else OWN[kind][0]


def _permuted(name: str, weight: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """Queries and keys with the halves of each head interleaved: llama.cpp rotates neighbors, transformers halves."""
    heads = config["num_attention_heads"]
    if name.endswith("k_proj.weight"):
        heads = config.get("num_key_value_heads") or heads
    elif not name.endswith("q_proj.weight"):
        return weight
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def _add_shape(writer: gguf.GGUFWriter, config: dict[str, Any], kind: str, folder: Path) -> None:
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or config
    writer.add_name("fine-tuned with QLoRA")
    writer.add_file_type(OWN[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config["num_hidden_layers"])
    # llama.cpp knows no sliding window in this architecture: inside the window the two agree.
    writer.add_context_length(config.get("sliding_window") or config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or 10_000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any]) -> None:
    tokenizer = hub.saved_tokenizer(folder)
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe = whole["model"]
    if bpe["type"] != "BPE":
        raise UserError(f"gguf: a tokenizer of the type '{bpe['type']}' cannot be written. {MEND}")
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in bpe["merges"]]
    names, kinds = _vocabulary(tokenizer, config["vocab_size"], bpe["byte_fallback"])
    writer.add_tokenizer_model("llama" if bpe["byte_fallback"] else "gpt2")
    if not bpe["byte_fallback"]:
        writer.add_tokenizer_pre(_split(whole["pre_tokenizer"]))
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    if bpe["byte_fallback"]:
        writer.add_token_scores(_scores(names, kinds, merges))
        writer.add_add_space_prefix(tokenizer.tokenize("a")[0] != "a")
    writer.add_token_merges(merges)
    _add_ends(writer, folder, tokenizer)


def _vocabulary(tokenizer: Any, size: int, byte_fallback: bool) -> tuple[list[str], list[int]]:
    """Every id's token and its kind; ids that the tokenizer leaves free, up to the model's size, get a name."""
    known = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    names: list[str] = []
    kinds: list[int] = []
    for number in range(size):
        name = known.get(number)
        if name is None:
            names.append(f"[PAD{number}]")
            kinds.append(TOKEN.UNUSED)
            continue
        names.append(name)
        if number in added:
            kinds.append(TOKEN.CONTROL if added[number].special else TOKEN.USER_DEFINED)
        elif byte_fallback and len(name) == 6 and name.startswith("<0x"):
            kinds.append(TOKEN.BYTE)
        else:
            kinds.append(TOKEN.NORMAL)
    return names, kinds


def _scores(names: list[str], kinds: list[int], merges: list[str]) -> list[float]:
    """llama.cpp joins the pair of the best score first: so a token's score is the rank of the merge that makes it."""
    rank = {merge.replace(" ", ""): -float(number) for number, merge in reversed(list(enumerate(merges)))}
    return [rank.get(name, -1e9 if kind == TOKEN.NORMAL else 0.0) for name, kind in zip(names, kinds, strict=True)]


def _split(steps: dict[str, Any] | None) -> str:
    """llama.cpp's name for the way a byte-level tokenizer splits text; `UserError` for one that has none here."""
    found = steps["pretokenizers"] if steps and steps["type"] == "Sequence" else [steps or {"type": "nothing"}]
    kinds = [step["type"] for step in found]
    if kinds == ["ByteLevel"] and found[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and found[0]["individual_digits"] and found[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and found[0]["pattern"].get("Regex") == LLAMA3_SPLIT:
        return "llama-bpe"
    raise UserError(f"gguf: a tokenizer that splits text by {' and '.join(kinds)} cannot be written. {MEND}")


def _add_ends(writer: gguf.GGUFWriter, folder: Path, tokenizer: Any) -> None:
    """Start, end and padding tokens, and the chat template. The ends are those of the folder's generation config."""
    ends = json.loads((folder / "generation_config.json").read_text("utf-8")).get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    writer.add_eos_token_id(ends[0])
    if len(ends) > 1:
        writer.add_eot_token_id(ends[1])
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(chat_template.starts_with_bos(tokenizer))
    writer.add_chat_template(tokenizer.chat_template)
