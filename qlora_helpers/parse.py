"""Read files that others wrote. Each format has one reader, with limits on size, depth and memory.

Every function raises `UserError` for a file that cannot be used, with its name and a fix. `what` names its role, such
as dataset or model.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

from qlora_helpers import errors
from qlora_helpers.errors import UserError, blame

MOST_JSON, MOST_YAML = 2**28, 300  # bytes
RATIO, SMALL = 100, 2**24  # a file may unpack to 100 times its size, and to 16 MiB in any case
BATCH, ROWS, ROW = 2**28, (4, 1000), 64  # bytes and rows of a Parquet batch, and bytes that an empty row takes
# Numbers of parts in a config. The libraries make a list of so many, before they look at the weights.
COUNT = re.compile(r"(n|num)_(\w+_)?(layers?|experts|labels|blocks)|(en|de)coder_layers")
MOST_PARTS = 4096
DOWNLOAD = "Fix: download the model again, or pass another one."


def path(given: str | Path, what: str, is_input: bool = True) -> Path:
    """Return a path that the user gave, with `~` expanded. It does not have to exist. Inputs are noted in `errors`.

    Raises `UserError` if no file can be there: for a null character, a name too long, or links in a circle.
    """
    try:
        found = Path(given).expanduser()
        os.stat(found)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, RuntimeError) as error:
        short = str(given) if len(str(given)) <= 80 else f"{str(given)[:80]}…"
        raise UserError(f"{what}: '{short}' cannot be used ({errors.reason(error)}). Fix: check the path.") from None
    if is_input and str(found) not in errors.given:
        errors.given.append(str(found))
    return found


def text(file: Path, what: str, most: int = MOST_JSON, fix: str = errors.BUG) -> str:
    """Return the text of a file in UTF-8. Pipes and devices, which may never end, are refused."""
    with blame(what, file, fix):
        if not file.is_file():
            raise UserError(f"{what}: {file} {'is not a file' if file.exists() else 'does not exist'}. {fix}")
        with file.open("rb") as stream:
            content = stream.read(most + 1)
        if len(content) > most:
            raise UserError(f"{what}: {file} has more than {most / 2**20:g} MiB. {fix}")
        return content.decode("utf-8")


def json_object(
    file: Path, what: str, hook: Callable[[dict[str, Any]], Any] | None = None, fix: str = errors.BUG
) -> dict[str, Any]:
    """Return the object in a JSON file. `hook` is applied to every object in it, as in `json.loads`."""
    content = text(file, what, fix=fix)
    with blame(what, file, fix):
        value = json.loads(content, object_hook=hook)
    if not isinstance(value, dict):
        raise UserError(f"{what}: {file} cannot be used (not a JSON object). {fix}")
    return value


def json_rows(file: Path, what: str, fix: str = errors.BUG) -> list[Any]:
    """Return the values in a file with one JSON value per line."""
    content = text(file, what, fix=fix)
    with blame(what, file, fix):
        return [json.loads(line) for line in content.split("\n") if line]


def model_config(file: Path, hook: Callable[[dict[str, Any]], Any] | None = None) -> dict[str, Any]:
    """Return a model's `config.json`. Raises `UserError` if it asks for more parts than any model has."""
    config = json_object(file, "config", hook, "Fix: pass the model's own config.json.")
    inner = [config]
    for part in inner:
        inner += [value for value in part.values() if isinstance(value, dict)]
        for key, value in part.items():
            if COUNT.fullmatch(str(key)) and isinstance(value, int | float) and not value <= MOST_PARTS:
                raise UserError(
                    f"config: {file} has {key} = {value!s:.20}, more than {MOST_PARTS:,}. Fix: pass the model's own "
                    "config.json."
                )
    return config


def header(markdown: Path, *keys: str) -> dict[str, str]:
    """Return the texts under some keys of the YAML that begins a Markdown file between two lines `---`.

    Each is read from its own line, because YAML as such takes hours to read if it is deep, and gigabytes if it has
    aliases.
    """
    import yaml

    begin, *lines = text(markdown, "model card").splitlines() or [""]
    found = {}
    for line in lines[: lines.index("---")] if begin.strip() == "---" and "---" in lines else []:
        key, _, written = line.partition(":")
        if key in keys and len(written) <= MOST_YAML:
            with blame("model card", markdown):
                found[key] = yaml.safe_load(written)
    return {key: value for key, value in found.items() if isinstance(value, str) and value}


def weights_header(file: Path) -> dict[str, dict[str, Any]]:
    """Return what a safetensors file says about each tensor: `dtype`, `shape` and `data_offsets`, from its begin.

    The file has 8 bytes that give the header's length, a JSON header, then the data without gaps
    (github.com/huggingface/safetensors). Raises `UserError` if it is cut off, or if sizes do not fit each other.
    """
    from safetensors import safe_open

    with blame("model", file, DOWNLOAD), safe_open(file, "numpy"), file.open("rb") as stream:  # the library checks it
        length = int.from_bytes(stream.read(8), "little")
        entries = json.loads(stream.read(length))
    entries.pop("__metadata__", None)
    for entry in entries.values():
        entry["data_offsets"] = [8 + length + offset for offset in entry["data_offsets"]]
    return entries


def no_devices(files: Iterator[Path], what: str) -> None:
    """Raise `UserError` if one of the files is a pipe or a device, whose content may never end."""
    for file in files:
        if file.exists() and not file.is_file() and not file.is_dir():
            raise UserError(f"{what}: {file} is not a file. Fix: remove it.")


def model_folder(folder: Path, weights: bool) -> None:
    """Check the files of a model folder before a library reads them, with `weights` also the headers of these.

    Raises `UserError` for pipes and devices, for a config of too many parts, and for weights that are cut off or hold
    fewer tensors than the config has layers.
    """
    no_devices(folder.iterdir(), "model")
    config = model_config(folder / "config.json") if (folder / "config.json").exists() else {}
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    if weights:
        tensors = sum(len(weights_header(file)) for file in sorted(folder.glob("*.safetensors")))
        if isinstance(layers, int) and layers > tensors > 0:
            raise UserError(
                f"model: {folder} has {layers} layers in its config.json, but {tensors} tensors. {DOWNLOAD}"
            )


def unpacked_limit(file: Path) -> int:
    """Return how many bytes a file may unpack to, in memory."""
    return max(SMALL, RATIO * file.stat().st_size)


def too_large(file: Path, what: str) -> UserError:
    """Return the error for a file that unpacks to too much."""
    most = unpacked_limit(file) / 2**20
    return UserError(
        f"{what}: {file} unpacks to more than {most:,.0f} MiB, {RATIO} times its size or more. Fix: unpack it, and "
        "check what it holds."
    )


class Bounded(RawIOBase):
    """A stream that unpacks a file, and raises `UserError` beyond `unpacked_limit`."""

    def __init__(self, stream: Any, file: Path, what: str) -> None:
        self.stream, self.file, self.what = stream, file, what
        self.left = unpacked_limit(file)

    def readable(self) -> bool:
        """As `BufferedReader` asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer and count."""
        count = int(self.stream.readinto(buffer))
        self.left -= count
        if self.left < 0:
            raise too_large(self.file, self.what)
        return count


def unpacked(file: Path, what: str) -> BinaryIO:
    """Open a compressed file (gzip, zstd, bz2) for reading."""
    import pyarrow

    return BufferedReader(Bounded(pyarrow.input_stream(str(file), compression="detect"), file, what), 2**16)


def parquet_rows(file: Path, what: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file, in batches that fit into memory.

    The sizes that the file declares are checked first. A repeated value is stored once, so what is unpacked is counted
    too.
    """
    from pyarrow import parquet

    with blame(what, file, "Fix: export it again."), parquet.ParquetFile(file) as opened:
        groups = [opened.metadata.row_group(number) for number in range(opened.metadata.num_row_groups)]
        sizes = [group.column(n).total_uncompressed_size for group in groups for n in range(group.num_columns)]
        left = unpacked_limit(file)
        if sum(sizes) > left:
            raise too_large(file, what)
        fewest, most = ROWS
        batch_size = min(most, max(fewest, BATCH // max([*sizes, 1])))
        for batch in opened.iter_batches(batch_size):
            columns = [_decoded(column) for column in batch.columns]
            left -= sum(column.nbytes for column in columns) + ROW * batch.num_rows
            if left < 0:
                raise too_large(file, what)
            cells = [column.to_pylist() for column in columns]
            yield from (dict(zip(batch.schema.names, row, strict=True)) for row in zip(*cells, strict=True))


def _decoded(column: Any) -> Any:
    """Return a column with its values written out, so that their size can be counted."""
    from pyarrow import types

    if types.is_dictionary(column.type):
        return column.dictionary_decode()
    if "dictionary<" in str(column.type):
        raise ValueError(f"{column.type} is not supported: categories inside of lists")
    return column
