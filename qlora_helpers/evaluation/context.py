"""What belongs to one run, passed around together."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qlora_helpers.config import Config
from qlora_helpers.data import cleaning
from qlora_helpers.data.cleaning import Data
from qlora_helpers.device import Device
from qlora_helpers.runs import RunFolder


@dataclass(frozen=True)
class RunContext:
    """A run's settings and rows, its model's tokenizer, the device it computes on, and the folder it writes to."""

    config: Config
    data: Data
    tokenizer: Any
    device: Device
    run: RunFolder

    @cached_property
    def identity(self) -> dict[str, str]:
        """Fingerprints of settings and rows: runs with the same identity are the same run."""
        return cleaning.identity(self.config, self.data)
