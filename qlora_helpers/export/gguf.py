"""Write a merged model as one GGUF file for llama.cpp, Ollama and similar programs.

The file holds the weights, the tokenizer, the chat template and the end tokens. It is written with the `gguf` package
of the llama.cpp project, with one tensor in memory at a time.
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
from gguf import GGMLQuantizationType as TensorType
from gguf import quants

from qlora_helpers.data import chat_template
from qlora_helpers.errors import UserError, nearest
from qlora_helpers.models import hub, safetensors_io
from qlora_helpers.models.safetensors_io import StoredTensor

# Types that the `gguf` package can write. It reads q4_k_m, but only llama.cpp's own quantizer writes it.
WRITABLE = {
    "f16": (TensorType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (TensorType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
Q4 = "q4_k_m"
KINDS = (*WRITABLE, Q4)
FAMILIES = ("llama", "mistral")  # one architecture in llama.cpp
TOKEN = gguf.TokenType
FIX = "Fix: ship the merged folder, or convert it with llama.cpp's own script."
# Regular expression of Llama 3's pre-tokenizer, by which llama.cpp's "llama-bpe" is recognized.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def check(folder: Path) -> dict[str, Any]:
    """Return the config of the model in `folder`.

    Raises `UserError` for a model that this module cannot write: an unsupported family, scaled rotary positions, or
    linear layers with biases. Call it before writing anything.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"gguf: model family '{family}' is not supported, only {' and '.join(FAMILIES)}. {FIX}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default":
        raise UserError(f"gguf: rotary positions scaled as '{scaling}' are not supported. {FIX}")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise UserError(f"gguf: linear layers with biases are not supported. {FIX}")
    return config


def check_kind(kind: str) -> None:
    """Raise `UserError` if GGUF files of this kind cannot be written on this machine."""
    if kind not in KINDS:
        raise UserError(f"gguf: unknown kind '{kind}'.{nearest(kind, KINDS)}")
    if kind == Q4 and importlib.util.find_spec("llama_cpp") is None:
        raise UserError(
            f"gguf: {Q4} needs llama.cpp, which is not installed. Fix: pip install llama-cpp-python (it compiles for "
            "several minutes), or choose q8_0."
        )


def write(folder: Path, target: Path, kind: str) -> None:
    """Write the merged model in `folder` to the file `target`.

    `kind` is the type of its weight matrices: f16, q8_0 or q4_k_m. Raises `UserError` for a model that cannot be
    written.
    """
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
        tensor_type = _tensor_type(tensor, kind)
        name = names.get_name(tensor.name, try_suffixes=(".weight",))
        if name is None:
            raise UserError(f"gguf: {tensor.name} has no counterpart in llama.cpp's architecture. {FIX}")
        size = gguf.quant_shape_to_byte_shape(tensor.shape, tensor_type)
        writer.add_tensor_info(name, size, np.dtype(np.uint8), int(np.prod(size)), raw_dtype=tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in stored:
        values = _permuted(tensor.name, tensor.read().float(), config).numpy()
        writer.write_tensor_data(quants.quantize(values, _tensor_type(tensor, kind)))
    writer.close()


def _write_q4(folder: Path, target: Path) -> None:
    """Write an f16 file, have llama.cpp quantize it, and delete it.

    llama.cpp stores rows whose length is not a multiple of 256 in 5 or 8 bits.
    """
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)  # logs every tensor, and warnings as errors
    f16_file = target.with_name(f".{target.name}-f16")
    write(folder, f16_file, "f16")
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    failed = llama_cpp.llama_model_quantize(str(f16_file).encode(), str(target).encode(), ctypes.byref(options))
    f16_file.unlink()
    if failed:
        raise UserError(f"gguf: llama.cpp failed to quantize {folder} to {Q4}. Fix: choose q8_0.")


def _tensor_type(tensor: StoredTensor, kind: str) -> TensorType:
    """Norms stay in 32 bits, as in llama.cpp; rows whose length is not a multiple of 32 stay in 16 bits."""
    if len(tensor.shape) == 1:
        return TensorType.F32
    return TensorType.F16 if tensor.shape[-1] % 32 else WRITABLE[kind][0]


def _permuted(name: str, weight: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """Interleave the two halves of each head in query and key weights; return other weights unchanged.

    Rotary positions rotate pairs of dimensions: neighbors in llama.cpp, the two halves of a head in transformers.
    """
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
    writer.add_file_type(WRITABLE[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config["num_hidden_layers"])
    # llama.cpp has no sliding window in this architecture; up to the window's length the results are the same.
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
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe = description["model"]
    if bpe["type"] != "BPE":
        raise UserError(f"gguf: tokenizers of type '{bpe['type']}' are not supported. {FIX}")
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in bpe["merges"]]
    names, kinds = _vocabulary(tokenizer, config["vocab_size"], bpe["byte_fallback"])
    writer.add_tokenizer_model("llama" if bpe["byte_fallback"] else "gpt2")
    if not bpe["byte_fallback"]:
        writer.add_tokenizer_pre(_split(description["pre_tokenizer"]))
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    if bpe["byte_fallback"]:
        writer.add_token_scores(_scores(names, kinds, merges))
        writer.add_add_space_prefix(tokenizer.tokenize("a")[0] != "a")
    writer.add_token_merges(merges)
    _add_special_tokens(writer, folder, tokenizer)


def _vocabulary(tokenizer: Any, size: int, byte_fallback: bool) -> tuple[list[str], list[int]]:
    """Return the token and token type of every id below `size`; ids without a token get a padding name."""
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
    """Score each token by the rank of the merge that produces it: llama.cpp merges the pair with the best score first.

    Earlier merges score higher. Normal tokens that no merge produces get -1e9, all others 0.
    """
    rank = {merge.replace(" ", ""): -float(number) for number, merge in reversed(list(enumerate(merges)))}
    return [rank.get(name, -1e9 if kind == TOKEN.NORMAL else 0.0) for name, kind in zip(names, kinds, strict=True)]


def _split(pre_tokenizer: dict[str, Any] | None) -> str:
    """Return llama.cpp's name of a byte-level pre-tokenizer. Raises `UserError` if it is not one of the known ones."""
    if pre_tokenizer and pre_tokenizer["type"] == "Sequence":
        steps = pre_tokenizer["pretokenizers"]
    else:
        steps = [pre_tokenizer or {"type": "none"}]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and steps[0]["pattern"].get("Regex") == LLAMA3_SPLIT:
        return "llama-bpe"
    raise UserError(f"gguf: the pre-tokenizer {' + '.join(kinds)} is not supported. {FIX}")


def _add_special_tokens(writer: gguf.GGUFWriter, folder: Path, tokenizer: Any) -> None:
    """Add the special tokens and the chat template. The end tokens are those of the folder's generation config."""
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
