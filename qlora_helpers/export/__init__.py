"""Merge an adapter into its base model, and convert, verify, serve or push the result."""

from qlora_helpers._lazy import lazy

__all__ = [
    "prepare",  # list what a push to a model hub would send
    "ship",  # merge, convert and verify
    "source",  # a run and the 16-bit base of its adapter
    "upload",  # push to a model hub
    "verify",  # compare exports with the adapter
]

__getattr__ = lazy(
    __name__, {"ship": "pipeline", "verify": "pipeline", "source": "merge", "prepare": "push", "upload": "push"}
)
