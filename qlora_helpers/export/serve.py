"""An exported model over OpenAI's protocol: `transformers serve` for a folder, llama.cpp's server for a GGUF file."""

import os
import shutil
import socket
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from qlora_helpers import device
from qlora_helpers.errors import UserError
from qlora_helpers.runs import GGUF, MERGED

HERE = ("127.0.0.1", "localhost", "::1")
TRANSFORMERS = ("fastapi", "uvicorn", "openai", "pydantic")  # what transformers serve asks for
LLAMA_CPP = ("llama_cpp", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings")
OWN_PENALTY = "This server makes words that were used less likely, unless it is sent repeat_penalty=1.0, as below.\n"


@dataclass(frozen=True)
class Server:
    """A program that serves a model: its command line, its address, and what it calls the model."""

    command: list[str]
    url: str
    model: str
    open: bool  # to other machines

    def help(self) -> str:
        """Where it is, and how the `openai` client asks it."""
        penalty = "llama_cpp.server" in self.command  # its default is 1.1
        own = ', extra_body={"repeat_penalty": 1.0}' if penalty else ""
        return (
            f"model:   {self.model}\naddress: {self.url}  (Ctrl+C ends it)\n"
            f"{'Whoever reaches this machine can ask it: no key is needed.' if self.open else ''}\n"
            f"{OWN_PENALTY if penalty else ''}"
            "    from openai import OpenAI\n"
            f'    client = OpenAI(base_url="{self.url}", api_key="none")\n'
            '    question = [{"role": "user", "content": "How do computers store data?"}]\n'
            f'    said = client.chat.completions.create(model="{self.model}", messages=question{own})\n'
            "    print(said.choices[0].message.content)\n"
        )


def plan(path: Path, host: str = HERE[0], port: int = 8000) -> Server:
    """The server for an exported folder, its `merged` or `gguf` folder, or a GGUF file.

    Raises `UserError` if there is no model, no program that serves it, or no such port to be had.
    """
    model = find(path.expanduser().resolve())
    _check_port(host, port)
    where = ["--host", host, "--port", str(port)]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    command, name = (_transformers(model), str(model)) if model.is_dir() else (_llama_cpp(model), model.stem)
    return Server([*command, *where], url, name, host not in HERE)


def start(server: Server) -> None:
    """Become the server: this process ends when it does."""
    sys.stdout.flush()
    os.execv(server.command[0], server.command)


def find(path: Path) -> Path:
    """The merged folder or the GGUF file that is meant; the merged one where there are both."""
    for folder in (path, path / MERGED):
        if (folder / "config.json").exists() and any(folder.glob("*.safetensors")):
            return folder
    if path.suffix == ".gguf" and path.is_file():
        return path
    files = sorted(file for folder in (path, path / GGUF) for file in folder.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(f"serve: {path} holds {len(files)} GGUF files. Fix: name one, such as {files[0]}.")
    if not files:
        raise UserError(
            f"serve: {path} holds no model. Fix: name a folder that the export command wrote, or a .gguf file."
        )
    return files[0]


def _transformers(folder: Path) -> list[str]:
    if lacking := _lacking(TRANSFORMERS):
        raise UserError(f"serve: {lacking} is not installed. Fix: pip install 'transformers[serving]'.")
    dtype = device.detect().dtype  # a T4 would emulate bf16
    return [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--dtype", dtype]


def _llama_cpp(file: Path) -> list[str]:
    """The server of llama-cpp-python, or llama.cpp's own; either with the context and the chat template of the file."""
    if not _lacking(LLAMA_CPP):
        words = [sys.executable, "-m", "llama_cpp.server", "--model", str(file), "--model_alias", file.stem]
        return [*words, "--n_ctx", "0"]
    if program := shutil.which("llama-server"):
        return [program, "--model", str(file), "--alias", file.stem, "--jinja"]
    raise UserError(
        "serve: no server for GGUF files is installed. Fix: pip install 'llama-cpp-python[server]', put llama.cpp's "
        "llama-server on PATH, or serve the merged folder."
    )


def _lacking(packages: tuple[str, ...]) -> str | None:
    return next((name for name in packages if find_spec(name) is None), None)


def _check_port(host: str, port: int) -> None:
    if not 0 < port < 2**16:
        raise UserError(f"port: there is no {port}. Fix: --port with a number from 1024 to 65535.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        why = str(error.strerror).partition(" (")[0]
        raise UserError(
            f"port: {port} on {host} cannot be had ({why}). Fix: end the program that uses it, or choose another with "
            "--port."
        ) from None
