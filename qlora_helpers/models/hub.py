"""Locate model files: the bundled model, a local folder, or a model hub at a pinned revision."""

import socket
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from qlora_helpers import parse
from qlora_helpers.config import BUNDLED_MODEL, Config
from qlora_helpers.errors import UserError, blame, reason
from qlora_helpers.models import bundled

# What an export reads: no code, no weight formats that can contain code, and no second copy of the weights, such as
# `consolidated.safetensors` or `original/`.
DOWNLOADED = [
    "model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*.json",
    "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja*", "LICENSE*", "NOTICE*",
]  # fmt: skip


def is_local(config: Config) -> bool:
    """Whether the model is the bundled one or a local folder. Such a model has no revision."""
    return config.model == BUNDLED_MODEL or parse.path(config.model, "model").is_dir()


def public_id(config: Config) -> str | None:
    """Return the model's hub id, or None for a local folder."""
    if config.model == BUNDLED_MODEL:
        return bundled.ORIGIN
    known = not is_local(config) and config.model.count("/") < 2 and not config.model.startswith(("~", ".", "/"))
    return config.model if known else None


def public_name(config: Config) -> str:
    """Return a name for the model that reveals no local path: its hub id, or the last part of its folder's path."""
    return public_id(config) or Path(config.model).name


def license(config: Config, revision: str | None = None) -> dict[str, str]:
    """Return the base model's license as stated in its model card.

    The keys are `license` and, for a license that is not one of the hub's common ones, `license_name` and
    `license_link`. Returns an empty dict if the card is unavailable, cannot be read, or states no license.
    """
    from huggingface_hub import hf_hub_download

    if config.model == BUNDLED_MODEL:
        return {"license": bundled.LICENSE}
    try:
        if is_local(config):
            path = parse.path(config.model, "model") / "README.md"
        else:
            options: dict[str, Any] = {"revision": revision or config.revision, "local_files_only": not reachable()}
            path = Path(hf_hub_download(config.model, "README.md", **options))
        texts = parse.header(path, "license", "license_name", "license_link")
    except (OSError, ValueError, UserError):
        return {}
    return texts if "license" in texts else {}


def from_pretrained(loader: Any, config: Config, **options: Any) -> Any:
    """Call `loader.from_pretrained` for the configured model. Raises `UserError` if the model cannot be loaded.

    A model's weights have to be complete: the library would fill in random numbers for missing tensors.

    Code that comes with a model is never run. `trust_remote_code=False` is passed explicitly because the libraries
    would otherwise prompt the user and run the code if the answer is yes. Tokens for gated models are left to
    `huggingface_hub`, which looks in `HF_TOKEN` and in Colab's secrets.
    """
    options["trust_remote_code"] = False
    weights = "use_safetensors" in options
    source: str | Path = config.model
    if config.model == BUNDLED_MODEL:
        source = _bundled_folder()
    elif is_local(config):
        source = parse.path(config.model, "model")
        parse.model_folder(source, weights)
    else:
        options |= {"revision": config.revision, "local_files_only": not reachable()}
    with blame("model", config.model):
        try:
            loaded = loader.from_pretrained(source, **options, **({"output_loading_info": True} if weights else {}))
        except (OSError, ValueError) as error:  # ValueError: the folder contains no model
            raise _load_error(config, error) from None
    if not weights:
        return loaded
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"model: the weights of {config.model} lack {missing[0]} ({len(missing)} missing). Fix: download it again."
        )
    return model


def model_folder(config: Config, revision: str | None = None) -> Path:
    """Return the local folder that contains the model's files. Downloads them if necessary, but does not load them.

    `revision` applies to hub models only and defaults to the configured one. Raises `UserError` if the files are
    unavailable.
    """
    if config.model == BUNDLED_MODEL:
        return _bundled_folder()
    if is_local(config):
        folder = parse.path(config.model, "model")
        parse.model_folder(folder, weights=True)
        return folder
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {"revision": revision or config.revision, "allow_patterns": DOWNLOADED}
    try:
        return Path(snapshot_download(config.model, local_files_only=not reachable(), **options))
    except (OSError, ValueError) as error:
        raise _load_error(config, error, revision) from None


def _load_error(config: Config, error: Exception, revision: str | None = None) -> UserError:
    if _gated(error):
        return UserError(
            f"model: '{config.model}' is gated or private, and the hub did not accept the token. Fix: accept the "
            f"model's terms on its page, then set HF_TOKEN, in Colab as a secret, or pass model={BUNDLED_MODEL}."
        )
    why = reason(error).partition(": ")[2] or reason(error)
    at = f" at revision {revision}" if revision else ""
    return UserError(
        f"model: '{config.model}'{at} is neither a model folder nor available on the hub ({why}). Fix: check the "
        f"name and the connection, or pass model=FOLDER, or model={BUNDLED_MODEL}."
    )


def _gated(error: BaseException | None) -> bool:
    """Whether the hub refused access. The libraries wrap its answer in other errors."""
    from huggingface_hub.errors import GatedRepoError

    while error is not None:
        if isinstance(error, GatedRepoError) or getattr(getattr(error, "response", None), "status_code", 0) == 403:
            return True
        error = error.__cause__ or error.__context__
    return False


@cache
def reachable() -> bool:
    """Whether the hub answers within 5 s. Without this check, the libraries retry for most of a minute."""
    from huggingface_hub import constants

    if getproxies():  # the proxy resolves host names
        return True
    endpoint = urlsplit(constants.ENDPOINT)
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((endpoint.hostname, port), timeout=5).close()
    except OSError:
        return False
    return True


@cache
def _bundled_folder() -> Path:
    """Return the bundled model's folder. Verified once per process, because that hashes 270 MB."""
    return bundled.fetch()


@cache
def generation_ends(config: Config) -> tuple[int, ...]:
    """Return the ids of the tokens at which the model's generation config stops; none if the model has no such file."""
    from transformers import GenerationConfig

    try:
        ends = from_pretrained(GenerationConfig, config).eos_token_id
    except UserError:
        return ()
    return tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)


def load_tokenizer(config: Config) -> Any:
    """Load the tokenizer of the configured model.

    A tokenizer without a padding token pads with its end token, or with its first token if it has neither. This is
    safe because the labels and the attention mask exclude padding. Raises `UserError` if the tokenizer does not tell
    where its tokens are in a text.
    """
    from transformers import AutoTokenizer

    tokenizer = from_pretrained(AutoTokenizer, config)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer: {config.model} has no fast tokenizer. Fix: use a model with a tokenizer.json.")
    return tokenizer


def saved_tokenizer(folder: Path) -> Any:
    """Load the tokenizer saved next to an adapter or a merged model. Code in the folder is not run."""
    from transformers import AutoTokenizer

    parse.model_folder(folder, weights=False)
    with blame("tokenizer", folder):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
