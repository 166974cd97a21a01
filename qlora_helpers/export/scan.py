"""Search files for secrets and local paths before they are pushed.

The table holds the kinds of secrets that have a recognizable form, as their providers describe them. detect-secrets,
whose last release is of 2024, also looks for random-looking text, of which vocabularies are full.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from qlora_helpers.errors import UserError

SECRETS = {
    "a Hugging Face token": r"hf_[A-Za-z0-9]{30,}",
    "a GitHub token": r"gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}",
    "a GitLab token": r"glpat-[\w-]{20,}",
    "an AWS access key": r"A[KS]IA[A-Z0-9]{16}",
    "a Google API key": r"AIza[\w-]{35}",
    "an OpenAI or Anthropic key": r"sk-(?<!\wsk-)[\w-]{32,}",
    "a Slack token": r"xox[abeoprs]-[\w-]{20,}",
    "a Weights & Biases key": r"wandb_v1_\w{30,}",
    "a PyPI token": r"pypi-[\w-]{50,}",
    "an npm token": r"npm_[A-Za-z0-9]{36}",
    "a JSON web token": r"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.",
    "a private key": r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY",
    "a password in an address": r"://[^\s/:@\"']+:[^\s/:@\"']+@[\w-]",
}
# Home folders of any machine: a file may have been written on another one. Not part of a web address.
HOME = re.compile(r"(?<![\w.])(?:/home/|/Users/|/root/|/content/drive/|[A-Z]:\\{1,2}Users\\{1,2})[^\s\"'`<>|:;,)]+")
# Not searched for paths: some of a vocabulary's tokens look like one.
VOCABULARY = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", ".gguf")
LARGEST_HEADER = 10**8  # bytes: that of the safetensors format


def secrets(text: str) -> str | None:
    """Return the kind of secret that `text` contains, or None."""
    return next((kind for kind, pattern in SECRETS.items() if re.search(pattern, text)), None)


def check(name: str, content: Path | bytes, token: str | None, folders: Iterable[Path]) -> None:
    """Raise `UserError` if a file contains a secret or names a folder of a machine. The error does not repeat a secret.

    `token` is the user's own, and `folders` are searched for whatever their form.
    """
    searched = text(name, content)
    what = "the token" if token and token in searched else secrets(searched)
    if what:
        raise UserError(f"push: {name} contains {what}. Fix: remove it, and revoke it: it has been written to a file.")
    if name.endswith(VOCABULARY):
        return
    found = [str(folder) for folder in folders if str(folder) in searched] + HOME.findall(searched)
    if found:
        raise UserError(f"push: {name} names {found[0]}, a folder of a machine. Fix: remove that line.")


def text(name: str, content: Path | bytes) -> str:
    """Return the text of a file. Of weight files, it is what precedes the numbers: names, metadata, the vocabulary."""
    return _bytes(name, content).decode("utf-8", "replace")


def _bytes(name: str, content: Path | bytes) -> bytes:
    if isinstance(content, bytes):
        return content
    if name.endswith(".safetensors"):
        with content.open("rb") as file:
            return file.read(min(int.from_bytes(file.read(8), "little"), LARGEST_HEADER))
    if name.endswith(".gguf"):
        import gguf

        try:
            header = gguf.GGUFReader(content).data_offset
        except (ValueError, IndexError, OSError) as error:
            raise UserError(f"push: {name} is not a GGUF file ({error}). Fix: export the run again.") from None
        with content.open("rb") as file:
            return file.read(header)
    return content.read_bytes()
