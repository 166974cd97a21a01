"""From a run to what people talk to: merged, as a GGUF if asked for, and only if it answers as the adapter did."""

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

from qlora_helpers import files
from qlora_helpers.data import chat_template
from qlora_helpers.errors import UserError
from qlora_helpers.export import gguf, merge, parity
from qlora_helpers.export.merge import Source
from qlora_helpers.export.parity import Parity
from qlora_helpers.models import hub
from qlora_helpers.runs import GGUF, MERGED, RunFolder

SPARE = 2**28  # bytes for tokenizer, cards and the file system itself
SHARE = {
    "f16": 1.0,
    "q8_0": 0.55,
    "q4_k_m": 1.4,
}  # of the disk a GGUF takes in that of 16-bit weights, while it is made


def ship(run: RunFolder, out: Path, kind: str | None = None) -> list[Parity]:
    """Merge a run's adapter into `out/merged`, write `out/gguf` if a `kind` is given (f16, q8_0 or q4_k_m), and compare
    both with the adapter. `out` appears whole, or not at all; the comparison is in `out/parity.json`.

    Raises `UserError` for what cannot be merged or written, too little disk, or an export that answers otherwise.
    """
    if kind is not None:
        gguf.check_kind(kind)
    what = merge.source(run)
    if kind:
        gguf.check(what.base)
    identity = _identity(what, kind)
    if out.exists() and any(out.iterdir()):
        return _again(out, identity)
    _check_disk(what, out, kind)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        made = Path(scratch) / out.name
        exports = _write(what, made, kind)
        compared = verify(what, exports)
        for found in compared:
            parity.check(found)
        files.write_json(
            made / "parity.json", {"identity": identity, "exports": [found.to_dict() for found in compared]}
        )
        if out.exists():
            out.rmdir()
        made.rename(out)
    return compared


def verify(what: Source, exports: dict[str, Path]) -> list[Parity]:
    """Each export, a merged folder or a GGUF file, against the adapter on its 16-bit base, on the fixed prompts."""
    device = parity.choose_device(what.base)
    questions = parity.questions()
    reference = parity.of_adapter(what, device, questions)
    ends = chat_template.stops(what.config, hub.saved_tokenizer(what.run.adapter))
    return [parity.compare(name, path, reference, questions, device, ends) for name, path in exports.items()]


def _write(what: Source, made: Path, kind: str | None) -> dict[str, Path]:
    merge.merge(what, made / MERGED)
    exports = {MERGED: made / MERGED}
    if kind:
        exports[kind] = made / GGUF / f"model-{kind}.gguf"
        exports[kind].parent.mkdir()
        gguf.write(made / MERGED, exports[kind], kind)
        tokenizer = hub.saved_tokenizer(what.run.adapter)
        text = chat_template.modelfile(what.config, tokenizer, exports[kind].name)
        files.write_text(made / GGUF / "Modelfile", text)
    return exports


def _identity(what: Source, kind: str | None) -> dict[str, Any]:
    with (what.run.adapter / "adapter_model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"run": what.run.name, "adapter_sha256": digest, "model": hub.public_name(what.config), "gguf": kind}


def _again(out: Path, identity: dict[str, Any]) -> list[Parity]:
    """The comparison of an equal export that is there already; another one is not overwritten."""
    there = RunFolder(out).read("parity.json") if (out / "parity.json").exists() else {}
    if there.get("identity") != identity:
        raise UserError(f"export: {out} holds something else. Fix: choose another folder, or delete that one.")
    print(f"{out} is there already: nothing to export.")
    extra = ("limits", "problems")
    return [Parity(**{k: v for k, v in found.items() if k not in extra}) for found in there["exports"]]


def _check_disk(what: Source, out: Path, kind: str | None) -> None:
    """Raise `UserError` before anything is written, if it would not fit."""
    there = next(path for path in (out, *out.parents) if path.exists())
    need = what.bytes * (1 + (SHARE[kind] if kind else 0)) + SPARE
    free = shutil.disk_usage(there).free
    if free < need:
        raise UserError(
            f"disk: {out} needs {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free. Fix: make room, or choose a "
            "folder on another disk."
        )
