"""A run's adapter, or an exported folder, onto a model hub: shown first, and sent if that is asked for.

Files are named one by one: a run folder also holds rows, checkpoints, logs and locks, and these stay here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_helpers import files
from qlora_helpers.data import chat_template
from qlora_helpers.errors import UserError
from qlora_helpers.evaluation import model_card
from qlora_helpers.export.pipeline import GGUF, MERGED
from qlora_helpers.models import hub, qlora
from qlora_helpers.runs import RunFolder

TOKENIZER = ("tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json")
VOCABULARY = ("vocab.json", "merges.txt", "chat_template.jinja")
OF_ADAPTER = ("adapter_model.safetensors", *TOKENIZER, *VOCABULARY)
OF_MERGED = (
    "model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", *TOKENIZER,
    *VOCABULARY, "README.md", "LICENSE*", "NOTICE*",
)  # fmt: skip
OF_GGUF = ("model-*.gguf", "Modelfile")
UNREAD = (".safetensors", ".gguf", "tokenizer.json", "tokenizer.model", *VOCABULARY)  # weights, and the base's words

Content = Path | bytes


@dataclass(frozen=True)
class Push:
    """What goes where: each file's name there, and what it holds. Printed, it is the dry run."""

    repository: str
    public: bool
    files: Mapping[str, Content]

    def __str__(self) -> str:
        seen = "public" if self.public else "private"
        sizes = {name: len(c) if isinstance(c, bytes) else c.stat().st_size for name, c in self.files.items()}
        lines = [f"{size:>15,}  {name}" for name, size in sizes.items()]
        total = f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files, to {self.repository} ({seen})"
        return "\n".join([*lines, total, "", "README.md:", "", _read(self.files["README.md"])])


def prepare(source: Path, repository: str, public: bool = False) -> Push:
    """What a push of a run folder or an exported one would send to `repository`, such as NAME/MODEL. Nothing is sent.

    Raises `UserError` for a folder that is neither, an unsound export, a name that no hub takes, and a file that names
    a folder of this machine or holds a token.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError:
        repository = ""
    if repository.count("/") != 1:
        raise UserError("push: a repository is called NAME/MODEL. Fix: pass your name on the hub and the model's.")
    if (source / "manifest.json").exists():
        files = _of_run(RunFolder(source))
    elif (source / "parity.json").exists():
        files = _of_export(source)
    else:
        raise UserError(f"push: {source} is neither a run folder nor an exported one. Fix: pass one of these.")
    _check_clean(files, source)
    return Push(repository, public, files)


def upload(push: Push) -> str:
    """Send it as one commit; the repository is made, private unless `public`. Returns the commit's address.

    The token comes from `HF_TOKEN`, Colab's secrets or `hf auth login`, by the hub's own library. Raises `UserError`
    without one, for a repository that is public unasked, and for whatever the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if not get_token():
        raise UserError("push: there is no token. Fix: put one that may write into HF_TOKEN, or into Colab's secrets.")
    api = HfApi()
    try:
        api.create_repo(push.repository, private=not push.public, exist_ok=True)
        if not push.public and not api.model_info(push.repository).private:
            raise UserError(
                f"push: {push.repository} is there already, and public. Fix: choose another name, or ask for public."
            )
        files = [CommitOperationAdd(name, content) for name, content in push.files.items()]
        return api.create_commit(push.repository, files, commit_message="Push from qlora_helpers").commit_url
    except UserError:
        raise
    except Exception as error:  # of many kinds: those of a lost connection change with the client below the library
        why = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"push: {push.repository} could not be written ({why}). Fix: check the name, the connection, and that the "
            "token may write there."
        ) from None


def _of_run(run: RunFolder) -> dict[str, Content]:
    """The adapter and its tokenizer, with the card, the base's name and the chat template written for others."""
    config, metrics = run.config(), run.read("metrics.json")
    qlora.check_saved(run.adapter)
    settings: dict[str, Any] = run.read("adapter/adapter_config.json")
    settings["base_model_name_or_path"] = hub.public_name(config)
    template = chat_template.chat_template(config, hub.saved_tokenizer(run.adapter))
    files = _named(run.adapter, OF_ADAPTER)
    files["adapter_config.json"] = json.dumps(settings, indent=1).encode()
    files["chat_template.jinja"] = template.encode()
    files["README.md"] = model_card.render(run, config, metrics).encode()
    return files


def _of_export(folder: Path) -> dict[str, Content]:
    """The merged model as it lies there, the GGUF file below it, and what the comparison with the adapter said."""
    compared = RunFolder(folder).read("parity.json")["exports"]
    if broken := [found["name"] for found in compared if found["problems"]]:
        raise UserError(f"push: the {broken[0]} model in {folder} is not sound. Fix: export the run again.")
    files = _named(folder / MERGED, OF_MERGED)
    files |= {f"{GGUF}/{name}": content for name, content in _named(folder / GGUF, OF_GGUF).items()}
    missing = {"README.md", "config.json"} - files.keys()
    if missing:
        raise UserError(f"push: {folder / MERGED} has no {min(missing)}. Fix: export the run again.")
    return {**files, "parity.json": folder / "parity.json"}


def _named(folder: Path, patterns: tuple[str, ...]) -> dict[str, Content]:
    found = {path.name: path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return dict(sorted(found.items()))


def _check_clean(contents: Mapping[str, Content], source: Path) -> None:
    """Raise `UserError` for a file that tells of this machine, or holds the token."""
    from huggingface_hub import get_token

    folders = {path for path in (Path.home(), source.resolve(), source.resolve().parent, files.ROOT) if path.parts[1:]}
    for name, content in contents.items():
        if name.endswith(UNREAD):
            continue
        text = _read(content)
        if (token := get_token()) and token in text:
            raise UserError(f"push: {name} holds the token. Fix: take it out, and revoke it: a file has seen it.")
        if told := [str(folder) for folder in folders if str(folder) in text]:
            raise UserError(f"push: {name} names {told[0]}, a folder of this machine. Fix: take that line out.")


def _read(content: Content) -> str:
    raw = content if isinstance(content, bytes) else content.read_bytes()
    return raw.decode("utf-8", "replace")
