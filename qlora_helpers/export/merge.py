"""Merge an adapter into its 16-bit base model. The result is a plain transformers folder that does not need PEFT.

An adapter is never merged into the 4-bit base that it was trained on: what 4 bits rounded away would stay lost, and the
sum would be rounded again. The weight files are copied and the adapted weights overwritten in place, so that only one
tensor is in memory at a time. The safetensors library would need a whole file: it cannot write a single tensor, and the
pages of its memory-mapped files count as memory of this process.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file

from qlora_helpers import files, parse
from qlora_helpers.config import Config
from qlora_helpers.data import chat_template, rendering
from qlora_helpers.errors import UserError
from qlora_helpers.evaluation import model_card
from qlora_helpers.models import hub, links, qlora, safetensors_io
from qlora_helpers.models.safetensors_io import StoredTensor
from qlora_helpers.runs import RunFolder

PREFIX = "base_model.model."  # PEFT puts it before every name of the base model
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Source:
    """A run, its config, the folder of its 16-bit base model, and the adapter's scale alpha / r."""

    run: RunFolder
    config: Config
    base: Path
    scale: float

    @property
    def bytes(self) -> int:
        """Size of the base model's weights on disk, which is also the size of the merged model."""
        return sum(path.stat().st_size for path in safetensors_io.files(self.base))


def source(run: RunFolder) -> Source:
    """Check that a run's adapter can be merged, and return it with the base model that it was trained on.

    Raises `UserError` if the run has no adapter, if the adapter is not this run's or is not plain LoRA, if the base
    model differs from the one in training, or if it has a link that leads out of its folder.
    """
    config = run.config()
    qlora.check_adapter(run.adapter)
    lora = LoraConfig.from_pretrained(str(run.adapter))
    for name, saved, expected in (("r", lora.r, config.rank), ("alpha", lora.lora_alpha, config.alpha)):
        if saved != expected:
            raise UserError(
                f"adapter: {run.adapter} has {name} = {saved}, but its run has {name} = {expected}. Fix: restore the "
                "run's own adapter, or train it again."
            )
    base_name = lora.base_model_name_or_path or config.model
    trained_on = run.read("manifest.json").get("model", {})
    if not hub.is_local(config) and base_name != config.model:
        raise UserError(
            f"adapter: {run.adapter} belongs to {base_name}, not to {config.model}. Fix: use its own base model."
        )
    base = hub.model_folder(config, trained_on.get("revision"))
    links.check([*base.iterdir(), *safetensors_io.files(base)], base)
    fingerprint = trained_on.get("fingerprint")
    if fingerprint and fingerprint != safetensors_io.fingerprint(base):
        raise UserError(
            f"model: the weights in {base} are not those that {run.path} was trained on. Fix: restore that revision, "
            "or train again on this one."
        )
    return Source(run, config, base, lora.lora_alpha / lora.r)


def merge(source: Source, out: Path) -> None:
    """Write the merged model into the new folder `out`.

    The folder gets weights, configs, tokenizer, chat template, model card and the base model's license files. Raises
    `UserError` if the adapter does not fit the base model.
    """
    out.mkdir(parents=True)
    _merge_weights(source, out)
    tokenizer = hub.saved_tokenizer(source.run.adapter)
    stops = rendering.end_tokens(source.config, tokenizer)
    tokenizer.chat_template = chat_template.chat_template(source.config, tokenizer)
    tokenizer.save_pretrained(out)
    _copy_sentencepiece(source.base, out, tokenizer)
    _write_configs(source, out, tokenizer, stops)
    card = model_card.render(source.run, source.config, source.run.read("metrics.json"), merged=True)
    files.write_text(out / "README.md", card)
    for pattern in ("LICENSE*", "NOTICE*"):
        for path in source.base.glob(pattern):
            shutil.copyfile(path, out / path.name)


def _merge_weights(source: Source, out: Path) -> None:
    for path in [*safetensors_io.files(source.base), *source.base.glob("model.safetensors.index.json")]:
        shutil.copyfile(path, out / path.name)
    stored = {tensor.name: tensor for tensor in safetensors_io.tensors(source.base)}
    adapter = load_file(source.run.adapter / "adapter_model.safetensors")
    for name, value in adapter.items():
        if name.endswith(LORA_A):
            continue  # handled with its B
        base_name = name.removeprefix(PREFIX).replace(".base_layer.", ".")
        if name.endswith(LORA_B):
            tensor = _adapted_tensor(base_name.removesuffix(LORA_B) + ".weight", stored, source)
            update = (value.float() @ adapter[name.removesuffix(LORA_B) + LORA_A].float()) * source.scale
            _check_shape(tensor, update, source)
            value = tensor.read().float() + update  # rounded once, as in PEFT
        else:  # a trained bias replaces the base model's
            tensor = _adapted_tensor(base_name, stored, source)
            _check_shape(tensor, value, source)
        tensor.overwrite(value, out / tensor.file.name)


def _adapted_tensor(name: str, stored: dict[str, StoredTensor], source: Source) -> StoredTensor:
    """Find a weight in the base model. Some files omit the first part of every name, such as BLOOM's `transformer.`."""
    tensor = stored.get(name) or stored.get(name.partition(".")[2])
    if tensor is None:
        raise UserError(
            f"adapter: {source.run.adapter} adapts {name}, which is not in {source.base}. Fix: use the base model it "
            "was trained on."
        )
    return tensor


def _check_shape(tensor: StoredTensor, value: torch.Tensor, source: Source) -> None:
    if tuple(value.shape) != tensor.shape:
        raise UserError(
            f"adapter: {source.run.adapter} was trained on another base model: {tensor.name} is {_size(tensor.shape)} "
            f"in {source.base}, but {_size(value.shape)} in the adapter. Fix: use the base model it was trained on."
        )


def _size(shape: Any) -> str:
    return " x ".join(map(str, shape))


def _copy_sentencepiece(base: Path, out: Path, tokenizer: Any) -> None:
    """Copy the SentencePiece model, if there is one, for programs that read it instead of `tokenizer.json`.

    Such programs, llama.cpp's converter among them, find added tokens in `tokenizer_config.json`, where transformers 5
    no longer writes them.
    """
    if not (base / "tokenizer.model").exists():
        return
    shutil.copyfile(base / "tokenizer.model", out / "tokenizer.model")
    config = parse.json_object(out / "tokenizer_config.json", "tokenizer")
    added = {number: token.__getstate__() for number, token in tokenizer.added_tokens_decoder.items()}
    files.write_json(out / "tokenizer_config.json", config | {"added_tokens_decoder": added})


def _write_configs(source: Source, out: Path, tokenizer: Any, stops: list[int]) -> None:
    """Write the base model's configs with the end tokens of training.

    Decoding is greedy by default, because that is what was compared with the adapter.
    """
    config = parse.model_config(source.base / "config.json")
    tokens = {"eos_token_id": stops if len(stops) > 1 else stops[0]}
    tokens |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for name in ("_name_or_path", "auto_map"):  # a local path, and code that is not in the merged folder
        config.pop(name, None)
    files.write_json(out / "config.json", config | tokens)
    files.write_json(out / "generation_config.json", {"do_sample": False, **tokens})
