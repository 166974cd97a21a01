"""Where model files come from: the embedded model, a folder, or a model hub at a pinned revision."""

import socket
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from qlora_helpers import embedded
from qlora_helpers.config import EMBEDDED_MODEL, Config
from qlora_helpers.errors import UserError


def is_local(config: Config) -> bool:
    """Whether the model is the embedded one or a folder: such a model has no revision."""
    return config.model == EMBEDDED_MODEL or Path(config.model).expanduser().is_dir()


def from_pretrained(loader: Any, config: Config, **options: Any) -> Any:
    """`loader.from_pretrained` for the config's model. Raises `UserError` if it cannot be had.

    Code that comes with a model is never run: without the option, the libraries would ask, and take yes for an answer.
    A token for gated models is the library's matter: it looks into `HF_TOKEN` and Colab's secrets by itself.
    """
    options["trust_remote_code"] = False
    source: str | Path = config.model
    if config.model == EMBEDDED_MODEL:
        source = _embedded_folder()
    elif is_local(config):
        source = Path(config.model).expanduser()
    else:
        options |= {"revision": config.revision, "local_files_only": not reachable()}
    try:
        return loader.from_pretrained(source, **options)
    except (OSError, ValueError) as error:  # ValueError: a folder that holds no model
        why = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"model: '{config.model}' is neither a model folder nor to be had from the hub ({why}). Mend: check the "
            f"name and the connection, or pass model=FOLDER, or model={EMBEDDED_MODEL}."
        ) from None


@cache
def reachable() -> bool:
    """Whether the hub answers: without this look, the libraries try for most of a minute before they say so."""
    from huggingface_hub import constants

    if getproxies():  # a proxy looks names up itself
        return True
    try:
        socket.create_connection((urlsplit(constants.ENDPOINT).hostname, 443), timeout=5).close()
    except OSError:
        return False
    return True


@cache
def _embedded_folder() -> Path:
    """Checked once a process: it is 270 MB to hash."""
    return embedded.fetch()


def load_tokenizer(config: Config) -> Any:
    """The model's own tokenizer. Its padding token only fills: labels and attention mask leave padding out."""
    from transformers import AutoTokenizer

    tokenizer = from_pretrained(AutoTokenizer, config)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
