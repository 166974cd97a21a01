"""The one exception that is meant for the user's eyes, and the words it is made of."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Something the user can mend: one line that says what is wrong, where, and how to mend it.

    The command line prints it and exits with code 2. In a notebook it shows without a wall of frames, because
    IPython asks an exception for `_render_traceback_` before it draws one.
    """

    def __init__(self, message: str) -> None:
        words = " ".join(message.split())  # what it quotes may hold newlines, or codes that steer a terminal
        super().__init__("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words))

    def _render_traceback_(self) -> list[str]:
        return [f"UserError: {self}"]


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which known name is meant, or list them all: ` Did you mean 'epochs'?`."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else f" Known: {', '.join(known)}."
