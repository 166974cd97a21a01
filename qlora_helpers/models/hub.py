"""Where model files come from: the embedded model, a folder, or a model hub at a pinned revision."""

import socket
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from qlora_helpers.config import EMBEDDED_MODEL, Config
from qlora_helpers.errors import UserError
from qlora_helpers.models import bundled

WANTED = ["*.safetensors", "*.json", "LICENSE*", "NOTICE*"]  # no code, and no weights in a format that can hold some


def is_local(config: Config) -> bool:
    """Whether the model is the embedded one or a folder: such a model has no revision."""
    return config.model == EMBEDDED_MODEL or Path(config.model).expanduser().is_dir()


def public_id(config: Config) -> str | None:
    """The model's id on the hub, which tells readers what it is; None for a folder of this machine."""
    if config.model == EMBEDDED_MODEL:
        return bundled.ORIGIN
    known = not is_local(config) and config.model.count("/") < 2 and not config.model.startswith(("~", ".", "/"))
    return config.model if known else None


def public_name(config: Config) -> str:
    """The model in words that say nothing of this machine: its id on the hub, or its folder's own name."""
    return public_id(config) or Path(config.model).name


def license(config: Config, revision: str | None = None) -> dict[str, str]:
    """The base model's license as its card has it: `license`, and its name and link if it is none of the common ones.

    Empty if the card cannot be had, or says nothing.
    """
    from huggingface_hub import ModelCard, hf_hub_download

    if config.model == EMBEDDED_MODEL:
        return {"license": bundled.LICENSE}
    try:
        if is_local(config):
            path = Path(config.model).expanduser() / "README.md"
        else:
            options: dict[str, Any] = {"revision": revision or config.revision, "local_files_only": not reachable()}
            path = Path(hf_hub_download(config.model, "README.md", **options))
        said = ModelCard(path.read_text("utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError):
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: str(said[key]) for key in keys if said.get(key)} if said.get("license") else {}


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
        raise _not_there(config, error) from None


def folder(config: Config, revision: str | None = None) -> Path:
    """The model's files on this machine, at `revision` if it comes from the hub: fetched if need be, not loaded.

    Raises `UserError` if they cannot be had.
    """
    if config.model == EMBEDDED_MODEL:
        return _embedded_folder()
    if is_local(config):
        return Path(config.model).expanduser()
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {"revision": revision or config.revision, "allow_patterns": WANTED}
    try:
        return Path(snapshot_download(config.model, local_files_only=not reachable(), **options))
    except (OSError, ValueError) as error:
        raise _not_there(config, error, revision) from None


def _not_there(config: Config, error: Exception, revision: str | None = None) -> UserError:
    why = str(error).strip().splitlines()[0].rstrip(".")
    at = f" at revision {revision}" if revision else ""
    return UserError(
        f"model: '{config.model}'{at} is neither a model folder nor to be had from the hub ({why}). Fix: check the "
        f"name and the connection, or pass model=FOLDER, or model={EMBEDDED_MODEL}."
    )


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
    return bundled.fetch()


def load_tokenizer(config: Config) -> Any:
    """The model's own tokenizer. Its padding token only fills: labels and attention mask leave padding out."""
    from transformers import AutoTokenizer

    tokenizer = from_pretrained(AutoTokenizer, config)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def saved_tokenizer(folder: Path) -> Any:
    """The tokenizer that was saved into a folder, beside an adapter or a merged model. No code of it is run."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
