"""Merge an adapter into its base model, and convert, verify, serve or push the result."""

from qlora_helpers._lazy import lazy

MODULES = {
    "prepare": "push",  # list what a push to a model hub would send
    "ship": "pipeline",  # merge, convert and verify
    "source": "merge",  # a run and the 16-bit base of its adapter
    "upload": "push",  # push to a model hub
    "verify": "pipeline",  # compare exports with the adapter
}
__all__ = list(MODULES)
__getattr__ = lazy(__name__, MODULES)
