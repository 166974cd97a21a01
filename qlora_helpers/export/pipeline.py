"""Export a run: merge it, convert it to GGUF on request, and keep the result only if it answers like the adapter."""

import shutil
from pathlib import Path
from typing import Any

from qlora_helpers import files
from qlora_helpers.data import chat_template, cleaning, rendering
from qlora_helpers.errors import UserError
from qlora_helpers.evaluation import losses, model_card, rivals
from qlora_helpers.evaluation.row_losses import RowLoss, mean_loss
from qlora_helpers.export import gguf, merge, parity
from qlora_helpers.export.merge import Source
from qlora_helpers.export.parity import Parity
from qlora_helpers.models import hub, qlora
from qlora_helpers.planning import compute_dtype
from qlora_helpers.runs import GGUF, MERGED, RunFolder

SPARE = 2**28  # bytes for the tokenizer, model cards and the file system
# Disk space that a GGUF file takes while it is written, as a multiple of the 16-bit weights.
# Its metadata is corrected in a copy, and q4_k_m is made from f16.
SHARE = {"f16": 2.0, "q8_0": 1.1, "q4_k_m": 1.4}


def ship(run: RunFolder, out: Path, kind: str | None = None) -> list[Parity]:
    """Export a run to the folder `out` and return how each export compares with the adapter.

    The adapter is merged into `out/merged`. With a `kind` (f16, q8_0 or q4_k_m), a GGUF file is written to `out/gguf`.
    The comparison is saved as `out/parity.json`. `out` appears only when it is complete and every export passes; if
    it already holds the same export, nothing is written.

    Raises `UserError` if the run cannot be merged or written, if the disk is too small, or if an export does not
    answer like the adapter.
    """
    if kind is not None:
        gguf.check_kind(kind)
    source = merge.source(run)
    identity = _identity(source, kind)
    if out.exists() and any(out.iterdir()):
        return _read_existing(out, identity)
    files.clear_leftovers(out)
    _check_disk(source, out, kind)
    if kind:
        gguf.check(source.base)
    with files.building(out) as made:
        compared = verify(source, _write(source, made, kind))
        for result in compared:
            parity.check(result)
        saved = {"identity": identity, "exports": [result.to_dict() for result in compared]}
        files.write_json(made / "parity.json", saved | _write_own_loss(source, made / MERGED))
    return compared


def verify(source: Source, exports: dict[str, Path]) -> list[Parity]:
    """Compare merged folders or GGUF files with the adapter on its 16-bit base model, on the fixed prompts.

    `exports` maps names of `parity.LIMITS` to paths.
    """
    device = parity.choose_device(source.base)
    questions = parity.questions()
    reference = parity.adapter_responses(source, device, questions)
    ends = rendering.end_tokens(source.config, hub.saved_tokenizer(source.run.adapter))
    return [parity.compare(name, path, reference, questions, device, ends) for name, path in exports.items()]


def _write(source: Source, made: Path, kind: str | None) -> dict[str, Path]:
    merge.merge(source, made / MERGED)
    exports = {MERGED: made / MERGED}
    if kind:
        exports[kind] = made / GGUF / f"model-{kind}.gguf"
        exports[kind].parent.mkdir()
        gguf.write(made / MERGED, exports[kind], kind)
        tokenizer = hub.saved_tokenizer(source.run.adapter)
        text = chat_template.modelfile(source.config, tokenizer, exports[kind].name)
        files.write_text(made / GGUF / "Modelfile", text)
    return exports


def _write_own_loss(source: Source, merged: Path) -> dict[str, Any]:
    """Measure the merged model on the run's held-out rows, and write its loss into its model card.

    Returns what belongs in `parity.json`: nothing, if the rows are not there any more or if it would take too long, as
    on a CPU after training on a GPU.
    """
    run, config = source.run, source.config
    try:
        own = _own_losses(source, merged)
    except UserError as error:
        print(f"The held-out loss of the merged model is not measured: {error}")
        return {}
    card = model_card.render(run, config, run.read("metrics.json"), merged=True, own=own)
    files.write_text(merged / "README.md", card)
    tokens = sum(row.tokens for row in own)
    return {"heldout": {"rows": len(own), "tokens": tokens, "loss": mean_loss(own)}}


def _own_losses(source: Source, merged: Path) -> list[RowLoss]:
    """Held-out losses of the merged model, in the dtype of the run. Raises `UserError` if they cannot be measured."""
    manifest, config = source.run.read("manifest.json"), source.config
    device = compute_dtype.as_begun(compute_dtype.device_for(config), source.run.compute_dtype())
    if manifest["device"].get("kind") != device.kind:
        raise UserError("it was trained on another kind of machine.")
    config = config.replace(quantization="none")
    at_once, obstacle = rivals.rows_in_16_bits(config, device)
    if obstacle:
        raise UserError(f"{obstacle}.")
    data = cleaning.prepare(source.config, hub.saved_tokenizer(source.run.adapter))
    if data.heldout_fingerprint != manifest["data"]["heldout_fingerprint"]:
        raise UserError("its held-out rows have changed.")
    model = qlora.load_base(config.replace(model=str(merged), revision="main"), device)
    return losses.heldout_losses(model, data.heldout, device, at_once)


def _identity(source: Source, kind: str | None) -> dict[str, Any]:
    digest = files.sha256(source.run.adapter / "adapter_model.safetensors")
    return {"run": source.run.name, "adapter_sha256": digest, "model": hub.public_name(source.config), "gguf": kind}


def _read_existing(out: Path, identity: dict[str, Any]) -> list[Parity]:
    """Return the comparison of an export that was made before. Raises `UserError` if `out` holds anything else."""
    saved = RunFolder(out).read("parity.json") if (out / "parity.json").exists() else {}
    if saved.get("identity") != identity:
        raise UserError(f"export: {out} contains something else. Fix: choose another folder, or delete it.")
    print(f"{out} already exists: nothing to export.")
    derived = ("limits", "problems")
    return [Parity(**{k: v for k, v in export.items() if k not in derived}) for export in saved["exports"]]


def _check_disk(source: Source, out: Path, kind: str | None) -> None:
    """Raise `UserError` if the export does not fit on the disk."""
    existing = next(path for path in (out, *out.parents) if path.exists())
    needed = source.bytes * (1 + (SHARE[kind] if kind else 0)) + SPARE
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"disk: {out} needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free. Fix: free some space, or "
            "choose a folder on another disk."
        )
