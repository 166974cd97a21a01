"""From an adapter to a model that other programs load."""

from qlora_helpers._lazy import lazy

__all__ = [
    "prepare",  # what a push to a model hub would send
    "ship",  # merge, convert and verify
    "source",  # what is exported: a run with its 16-bit base
    "upload",  # send it
    "verify",  # compare exports with the adapter
]

__getattr__ = lazy(
    __name__, {"ship": "pipeline", "verify": "pipeline", "source": "merge", "prepare": "push", "upload": "push"}
)
