"""Serve an exported model over OpenAI's protocol: folders with `transformers serve`, GGUF files with llama.cpp.

Servers in Python run inside `guarded_server.py`, which checks where a request comes from and what it asks for.
"""

import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from qlora_helpers import device, quoting
from qlora_helpers.errors import UserError
from qlora_helpers.export import guarded_server
from qlora_helpers.export.guarded_server import LOOPBACK
from qlora_helpers.runs import GGUF, MERGED

TRANSFORMERS = ("fastapi", "uvicorn", "openai", "pydantic")  # packages that transformers serve needs
LLAMA_CPP = ("llama_cpp", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings")
CORS = ["--cors-origins", "localhost"]  # since July 2026; before, llama-server lets the pages of any site query it
PENALTY_NOTE = "This server penalizes repeated words unless the request sends repeat_penalty=1.0, as below.\n"


@dataclass(frozen=True)
class Server:
    """A program that serves a model: its command line, its URL, and its name for the model."""

    command: list[str]
    url: str
    model: str
    open: bool  # to other machines

    def help(self) -> str:
        """Describe the server and how to query it with the `openai` client."""
        penalty = "llama_cpp.server" in self.command  # its default is 1.1
        extra = ', extra_body={"repeat_penalty": 1.0}' if penalty else ""
        return (
            f"model:   {quoting.terminal(self.model)}\naddress: {self.url}  (Ctrl+C stops it)\n"
            f"{'Anyone who can reach this machine can query it: no key is needed.' if self.open else ''}\n"
            f"{PENALTY_NOTE if penalty else ''}"
            "    from openai import OpenAI\n"
            f'    client = OpenAI(base_url="{self.url}", api_key="none")\n'
            '    question = [{"role": "user", "content": "How do computers store data?"}]\n'
            f"    response = client.chat.completions.create(model={self.model!r}, messages=question{extra})\n"
            "    print(response.choices[0].message.content)\n"
        )


def plan(path: Path, host: str = LOOPBACK[0], port: int = 8000) -> Server:
    """Choose the server for an exported folder, its `merged` or `gguf` folder, or a GGUF file.

    Raises `UserError` if there is no model, if no program that serves it is installed, or if the port is not free.
    """
    model = find(path.expanduser().resolve())
    _check_port(host, port)
    listen = ["--host", host, "--port", str(port)]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    command, name = (
        (_transformers(model, host), str(model)) if model.is_dir() else (_llama_cpp(model, host), model.stem)
    )
    return Server([*command, *listen], url, name, host not in LOOPBACK)


def start(server: Server) -> None:
    """Replace this process with the server."""
    sys.stdout.flush()
    os.execv(server.command[0], server.command)


def find(path: Path) -> Path:
    """Return the merged folder or GGUF file in `path`, or `path` itself. A merged folder is preferred.

    Raises `UserError` if there is no model, or more than one GGUF file.
    """
    for folder in (path, path / MERGED):
        if (folder / "config.json").exists() and any(folder.glob("*.safetensors")):
            return folder
    if path.suffix == ".gguf" and path.is_file():
        return path
    files = sorted(file for folder in (path, path / GGUF) for file in folder.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(f"serve: {path} contains {len(files)} GGUF files. Fix: pass one of them, such as {files[0]}.")
    if not files:
        raise UserError(
            f"serve: {path} contains no model. Fix: pass a folder that the export command wrote, or a .gguf file."
        )
    return files[0]


def _transformers(folder: Path, host: str) -> list[str]:
    if missing := _missing_package(TRANSFORMERS):
        raise UserError(f"serve: {missing} is not installed. Fix: pip install 'transformers[serving]'.")
    dtype = device.detect().dtype  # a T4 would emulate bf16
    return [*_guarded(host, "transformers.cli.transformers"), "serve", str(folder), "--dtype", dtype]


def _llama_cpp(file: Path, host: str) -> list[str]:
    """Command of llama-cpp-python's server, or of llama.cpp's own. Both use the file's context and chat template."""
    if not _missing_package(LLAMA_CPP):
        command = [*_guarded(host, "llama_cpp.server"), "--model", str(file), "--model_alias", file.stem]
        return [*command, "--n_ctx", "0"]
    if program := shutil.which("llama-server"):
        command = [program, "--model", str(file), "--alias", file.stem, "--jinja"]
        options = subprocess.run([program, "--help"], capture_output=True, text=True).stdout
        return [*command, *(CORS if CORS[0] in options else [])]
    raise UserError(
        "serve: no server for GGUF files is installed. Fix: pip install 'llama-cpp-python[server]', put llama.cpp's "
        "llama-server on PATH, or serve the merged folder."
    )


def _guarded(host: str, module: str) -> list[str]:
    """Command that runs a server's module inside the guard. -P: the guard's folder is not searched for modules."""
    return [sys.executable, "-P", guarded_server.__file__, host, module]


def _missing_package(packages: tuple[str, ...]) -> str | None:
    return next((name for name in packages if find_spec(name) is None), None)


def _check_port(host: str, port: int) -> None:
    if not 0 < port < 2**16:
        raise UserError(f"port: {port} is out of range. Fix: --port with a number from 1024 to 65535.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]
        raise UserError(
            f"port: {port} on {host} is not available ({reason}). Fix: stop the program that uses it, or choose "
            "another port with --port."
        ) from None
