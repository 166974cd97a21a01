"""An adapter merged into its 16-bit base, tensor by tensor: a plain transformers folder that needs no PEFT.

Never into the 4-bit base that it was trained on: what 4 bits rounded away would stay lost, and the sum would be rounded
again. The files are copied and the adapted weights overwritten where they lie, so one tensor is in memory at a time.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file

from qlora_helpers import files
from qlora_helpers.config import Config
from qlora_helpers.data import chat_template
from qlora_helpers.errors import UserError
from qlora_helpers.evaluation import model_card
from qlora_helpers.models import hub, qlora, safetensors_io
from qlora_helpers.models.safetensors_io import StoredTensor
from qlora_helpers.runs import RunFolder

PREFIX = "base_model.model."  # PEFT's, before every name of the base's
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
OTHER_KINDS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias")


@dataclass(frozen=True)
class Source:
    """What is merged: a run, its config, the folder of its 16-bit base, and the adapter's scale alpha / r."""

    run: RunFolder
    config: Config
    base: Path
    scale: float

    @property
    def bytes(self) -> int:
        """Size of the base's weights on disk, which is the merged model's too."""
        return sum(path.stat().st_size for path in safetensors_io.files(self.base))


def source(run: RunFolder) -> Source:
    """What a run's adapter is merged into, checked: the very base that it was trained on.

    Raises `UserError` for a run without an adapter, for an adapter that is not this run's, and for a base that differs.
    """
    config = run.config()
    qlora.check_saved(run.adapter)
    lora = LoraConfig.from_pretrained(str(run.adapter))
    for what, there, here in (("r", lora.r, config.rank), ("alpha", lora.lora_alpha, config.alpha)):
        if there != here:
            raise UserError(
                f"adapter: {run.adapter} has {what} = {there}, and its run {what} = {here}. Fix: put the run's own "
                "adapter back, or train it again."
            )
    if strange := [name for name in OTHER_KINDS if getattr(lora, name, None)]:
        raise UserError(f"adapter: {run.adapter} is of another kind ({strange[0]}). Fix: merge it with PEFT itself.")
    named = lora.base_model_name_or_path or config.model
    trained_on = run.read("manifest.json").get("model", {})
    if not hub.is_local(config) and named != config.model:
        raise UserError(f"adapter: {run.adapter} belongs to {named}, not to {config.model}. Fix: use its own base.")
    base = hub.folder(config, trained_on.get("revision"))
    noted = trained_on.get("fingerprint")
    if noted and noted != safetensors_io.fingerprint(base):
        raise UserError(
            f"model: the weights in {base} are not those that {run.path} was trained on. Fix: put that revision back, "
            "or train again on this one."
        )
    return Source(run, config, base, lora.lora_alpha / lora.r)


def merge(what: Source, out: Path) -> None:
    """Write the merged model into the new folder `out`: weights, configs, tokenizer, chat template, model card."""
    out.mkdir(parents=True)
    _merge_weights(what, out)
    tokenizer = hub.saved_tokenizer(what.run.adapter)
    stops = chat_template.stops(what.config, tokenizer)
    tokenizer.chat_template = chat_template.chat_template(what.config, tokenizer)
    tokenizer.save_pretrained(out)
    _write_configs(what, out, tokenizer, stops)
    card = model_card.render(what.run, what.config, what.run.read("metrics.json"), merged=True)
    files.write_text(out / "README.md", card)
    for pattern in ("LICENSE*", "NOTICE*"):
        for path in what.base.glob(pattern):
            shutil.copyfile(path, out / path.name)


def _merge_weights(what: Source, out: Path) -> None:
    for path in safetensors_io.files(what.base):
        shutil.copyfile(path, out / path.name)
    index = what.base / "model.safetensors.index.json"
    if index.exists():
        shutil.copyfile(index, out / index.name)
    stored = {tensor.name: tensor for tensor in safetensors_io.tensors(what.base)}
    adapter = load_file(what.run.adapter / "adapter_model.safetensors")
    for name, value in adapter.items():
        if name.endswith(LORA_A):
            continue  # its B brings it
        target = name.removeprefix(PREFIX).replace(".base_layer.", ".")
        if name.endswith(LORA_B):
            place = _place(target.removesuffix(LORA_B) + ".weight", stored, what)
            update = (value.float() @ adapter[name.removesuffix(LORA_B) + LORA_A].float()) * what.scale
            _check_shape(place, update, what)
            value = place.read().float() + update  # rounded once, as PEFT does
        else:  # a bias that was trained, whole
            place = _place(target, stored, what)
            _check_shape(place, value, what)
        place.overwrite(value, out / place.file.name)


def _place(name: str, stored: dict[str, StoredTensor], what: Source) -> StoredTensor:
    """Where a weight lies in the base. Some files leave the first part of a name out, as BLOOM's `transformer.`"""
    found = stored.get(name) or stored.get(name.partition(".")[2])
    if found is None:
        raise UserError(
            f"adapter: {what.run.adapter} adapts {name}, which {what.base} has not. Fix: use the base that it was "
            "trained on."
        )
    return found


def _check_shape(place: StoredTensor, value: torch.Tensor, what: Source) -> None:
    if tuple(value.shape) != place.shape:
        raise UserError(
            f"adapter: {what.run.adapter} was trained on another base: {place.name} is {_size(place.shape)} in "
            f"{what.base}, and {_size(value.shape)} in the adapter. Fix: use the base that it was trained on."
        )


def _size(shape: Any) -> str:
    return " x ".join(map(str, shape))


def _write_configs(what: Source, out: Path, tokenizer: Any, stops: list[int]) -> None:
    """The base's configs with the end tokens of training; greedy by default, since that is what was compared."""
    config = json.loads((what.base / "config.json").read_text("utf-8"))
    ends = {"eos_token_id": stops if len(stops) > 1 else stops[0]}
    ends |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config.pop("_name_or_path", None)
    files.write_json(out / "config.json", config | ends)
    files.write_json(out / "generation_config.json", {"do_sample": False, **ends})
