"""A model's shape from its config alone: parameters, layers, widths. Neither torch nor weights are needed."""

import json
from functools import cache
from importlib import resources
from typing import Any

from qlora_helpers.errors import UserError, nearest


@cache
def _known() -> dict[str, dict[str, Any]]:
    folder = resources.files("qlora_helpers") / "known_models"
    files = sorted(folder.iterdir(), key=lambda file: file.name)
    return {f.name.removesuffix(".json"): json.loads(f.read_text("utf-8")) for f in files if f.name.endswith(".json")}


def known(name: str) -> dict[str, Any]:
    """The config of a model that is known offline, by its short name or its name on the hub."""
    for short, entry in _known().items():
        if name == short or name in entry["names"]:
            return dict(entry["config"])
    raise UserError(f"model: no config of '{name}' is known offline.{nearest(name, _known())}")
