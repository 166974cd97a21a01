"""Read and overwrite safetensors weights one tensor at a time, so that no whole model has to fit in memory."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from qlora_helpers import parse
from qlora_helpers.errors import UserError

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PLACES, BLOCK = 64, 2**16  # a fingerprint reads 64 blocks of 64 KiB per file: 4 MiB


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, stored in the bytes from `begin` up to `end` of the file."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    def read(self) -> torch.Tensor:
        """Read the tensor. The file is not memory-mapped, because mapped pages count as memory of this process."""
        with self.file.open("rb") as file:
            file.seek(self.begin)
            raw = bytearray(file.read(self.end - self.begin))
        return torch.frombuffer(raw, dtype=self.dtype).reshape(self.shape)

    def overwrite(self, value: torch.Tensor, file: Path) -> None:
        """Write `value`, rounded to the stored dtype, to this tensor's place in `file`, a copy of the original file."""
        raw = value.to(self.dtype).contiguous().view(torch.uint8).numpy().tobytes()
        with file.open("r+b") as target:
            target.seek(self.begin)
            target.write(raw)


def files(folder: Path) -> list[Path]:
    """Return the weight files of a model folder. Raises `UserError` if one is missing."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(parse.json_object(index, "model")["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"model: {folder} has no {missing[0]}. Fix: download the complete model as safetensors, then run again."
        )
    return [folder / name for name in names]


def tensors(folder: Path) -> Iterator[StoredTensor]:
    """Yield every tensor of a model folder in storage order. Raises `UserError` for other than 16- or 32-bit floats."""
    for path in files(folder):
        header = parse.weights_header(path)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in PLAIN:
                raise UserError(
                    f"model: {name} in {path} is stored as {entry['dtype']}, not as plain 16-bit numbers. Fix: train "
                    "on the model's 16-bit release; merging into quantized weights changes the answers."
                )
            yield StoredTensor(path, name, PLAIN[entry["dtype"]], tuple(entry["shape"]), *entry["data_offsets"])


def fingerprint(folder: Path) -> str:
    """Return 16 hex digits that tell weights of one shape apart, from the size and 64 even samples of each file."""
    digest = hashlib.sha256()
    for path in files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for place in range(PLACES):
                file.seek(place * max(0, size - BLOCK) // (PLACES - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]
