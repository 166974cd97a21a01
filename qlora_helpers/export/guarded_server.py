"""Run a Python server behind checks that it lacks: `python -P guarded_server.py HOST MODULE ARGUMENTS…`.

The servers of transformers and llama-cpp-python answer any page that a browser shows. A page can reach a server on this
machine by cross-origin requests, which llama-cpp-python's server allows, or by a name that resolves to 127.0.0.1 (DNS
rebinding). That of transformers also loads any other model on request. Here, each request must name this server as its
host, must not come from another site's page, and gets OpenAI's protocol only.
"""

import os
import runpy
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

LOOPBACK = ("127.0.0.1", "localhost", "::1")
EVERYWHERE = ("0.0.0.0", "::")
SERVED = ("/health", "/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/responses")
IGNORED = ("HOST", "PORT", "CONFIG_FILE")  # environment variables by which llama-cpp-python overrides its options

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]


class Guard:
    """An ASGI application that passes requests to `app`, or answers with status 400, 403 or 404.

    `hosts` are the names of this server; None allows any, for a server that other machines reach under names of theirs.
    """

    def __init__(self, app: App, hosts: tuple[str, ...] | None) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Answer one request."""
        status = 200 if scope["type"] == "lifespan" else self.status(scope)
        if status == 200:
            await self.app(scope, receive, send)
        else:
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    def status(self, scope: Scope) -> int:
        """Return 200 for a request that may pass."""
        headers = dict(scope["headers"])
        host = _name(headers.get(b"host", b""))
        if self.hosts is not None and host not in self.hosts:
            return 400
        if b"origin" in headers and _name(headers[b"origin"].partition(b"://")[2]) != host:
            return 403
        return 200 if scope["type"] == "http" and scope["path"] in SERVED else 404


def _name(address: bytes) -> str:
    """Return the host of `host:port` or `[host]:port`."""
    text = address.decode("latin-1").lower()
    return text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]


def main(host: str, module: str) -> None:
    """Run `module` as a program whose application is guarded, whichever way it is handed to uvicorn."""
    from uvicorn.config import Config

    create: Any = Config.__init__
    hosts = None if host in EVERYWHERE else (*LOOPBACK, host.lower())

    def guarded(self: Config, app: App, *args: Any, **options: Any) -> None:
        create(self, Guard(app, hosts), *args, **options)

    Config.__init__ = guarded  # type: ignore[assignment,method-assign]
    for name in IGNORED:
        os.environ.pop(name, None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _, server_host, server_module, *sys.argv[1:] = sys.argv
    main(server_host, server_module)
