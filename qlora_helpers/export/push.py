"""Push a run's adapter or an exported folder to a model hub. The push is listed first, and sent only on request.

Files are selected by name: a run folder also holds rows, checkpoints, logs and locks, which are never sent. Each file
is searched for secrets and local paths.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_helpers import files, quoting
from qlora_helpers.data import chat_template
from qlora_helpers.errors import UserError
from qlora_helpers.evaluation import model_card
from qlora_helpers.export import scan
from qlora_helpers.models import hub, links, qlora
from qlora_helpers.runs import GGUF, MERGED, RunFolder
from qlora_helpers.wording import counted

TOKENIZER = ("tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json")
VOCABULARY = ("vocab.json", "merges.txt", "chat_template.jinja")
OF_ADAPTER = ("adapter_model.safetensors", *TOKENIZER, *VOCABULARY)
OF_MERGED = (
    "model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", *TOKENIZER,
    *VOCABULARY, "README.md", "LICENSE*", "NOTICE*",
)  # fmt: skip
OF_GGUF = ("model-*.gguf", "Modelfile")

Content = Path | bytes


@dataclass(frozen=True)
class Push:
    """Files to push and where: `files` maps each name on the hub to its content. `str` is the dry run."""

    repository: str
    public: bool
    files: Mapping[str, Content]

    def __str__(self) -> str:
        visibility = "public" if self.public else "private"
        sizes = {name: len(c) if isinstance(c, bytes) else c.stat().st_size for name, c in self.files.items()}
        lines = [f"{size:>15,}  {name}" for name, size in sizes.items()]
        number = counted(len(sizes), "file")
        total = f"{sum(sizes.values()):>15,}  bytes in {number}, to {self.repository} ({visibility})"
        card = scan.text("README.md", self.files["README.md"])
        return "\n".join([*lines, total, "", "README.md:", "", quoting.terminal(card)])


def prepare(source: Path, repository: str, public: bool = False) -> Push:
    """List what a push of a run folder or an exported folder would send to `repository`, such as NAME/MODEL.

    Nothing is sent. Raises `UserError` if `source` is neither, if an export failed its comparison, if the hub does not
    allow the name, if a file is a link out of `source`, or if one contains a secret or names a folder of a machine.
    """
    _check_name(repository)
    if (source / "manifest.json").exists():
        files = _of_run(RunFolder(source))
    elif (source / "parity.json").exists():
        files = _of_export(source)
    else:
        raise UserError(
            f"push: {source} is neither a run folder nor an exported folder. Fix: pass a finished run, or a folder "
            "that the export command wrote."
        )
    links.check((content for content in files.values() if isinstance(content, Path)), source)
    _check_clean(files, source)
    return Push(repository, public, files)


def upload(push: Push) -> str:
    """Send a push as one commit and return the commit's URL. The repository is created if it does not exist.

    The token comes from `HF_TOKEN`, Colab's secrets or `hf auth login`, and is read by the hub's own library. Raises
    `UserError` if there is no token, if the repository is public although `public` is false, and for every error of
    the hub.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if not get_token():
        raise UserError("push: no token found. Fix: store a token with write access in HF_TOKEN or in Colab's secrets.")
    api = HfApi()
    try:
        api.create_repo(push.repository, private=not push.public, exist_ok=True)
        if not push.public and not api.model_info(push.repository).private:
            raise UserError(
                f"push: {push.repository} already exists and is public. Fix: choose another name, or push with "
                "public=True (--public)."
            )
        files = [CommitOperationAdd(name, content) for name, content in push.files.items()]
        return api.create_commit(push.repository, files, commit_message="Push from qlora_helpers").commit_url
    except UserError:
        raise
    except Exception as error:  # of many types: those of a lost connection depend on the library's HTTP client
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"push: {push.repository} could not be written ({reason}). Fix: check the name, the connection, and that "
            "the token has write access."
        ) from None


def _check_name(repository: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    with suppress(HFValidationError):
        validate_repo_id(repository)
        if repository.count("/") == 1:
            return
    raise UserError(
        f"push: '{repository}' is not a repository name. Fix: pass NAME/MODEL: your name on the hub, and the model's."
    )


def _of_run(run: RunFolder) -> dict[str, Content]:
    """Adapter and tokenizer, with a model card, the base model's public name and the chat template of training."""
    config, metrics = run.config(), run.read("metrics.json")
    qlora.check_adapter(run.adapter)
    settings: dict[str, Any] = run.read("adapter/adapter_config.json")
    settings["base_model_name_or_path"] = hub.public_name(config)
    template = chat_template.chat_template(config, hub.saved_tokenizer(run.adapter))
    files = _matching(run.adapter, OF_ADAPTER)
    files["adapter_config.json"] = json.dumps(settings, indent=1).encode()
    files["chat_template.jinja"] = template.encode()
    files["README.md"] = model_card.card(run, config, metrics).encode()
    return files


def _of_export(folder: Path) -> dict[str, Content]:
    """The merged model, its GGUF file if there is one, and the comparison with the adapter."""
    compared = RunFolder(folder).read("parity.json")["exports"]
    if failed := [export["name"] for export in compared if export["problems"]]:
        raise UserError(
            f"push: the {failed[0]} model in {folder} does not answer like its adapter. Fix: export the run again."
        )
    files = _matching(folder / MERGED, OF_MERGED)
    files |= {f"{GGUF}/{name}": content for name, content in _matching(folder / GGUF, OF_GGUF).items()}
    missing = {"README.md", "config.json"} - files.keys()
    if missing:
        raise UserError(f"push: {folder / MERGED} has no {min(missing)}. Fix: export the run again.")
    return {**files, "parity.json": folder / "parity.json"}


def _matching(folder: Path, patterns: tuple[str, ...]) -> dict[str, Content]:
    matches = {path.name: path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return dict(sorted(matches.items()))


def _check_clean(contents: Mapping[str, Content], source: Path) -> None:
    """Raise `UserError` if a file contains a secret or names a folder of a machine."""
    from huggingface_hub import get_token

    folders = [path for path in (Path.home(), source.resolve(), source.resolve().parent, files.ROOT) if path.parts[1:]]
    for name, content in contents.items():
        scan.check(name, content, get_token(), folders)
