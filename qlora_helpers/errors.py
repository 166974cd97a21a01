"""The exception for errors that the user can fix, and suggestions for misspelled names."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """An error that the user can fix: one line that says what is wrong, where, and how to fix it.

    The command line prints it and exits with code 2. A notebook shows it without a traceback, because IPython calls
    `_render_traceback_` if an exception has it.
    """

    def __init__(self, message: str) -> None:
        words = " ".join(message.split())  # quoted input may contain newlines or terminal control codes
        super().__init__("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words))

    def _render_traceback_(self) -> list[str]:
        return [f"UserError: {self}"]


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a suggestion for an unknown name, such as ` Did you mean 'epochs'?`, else a list of all known names."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else f" Known: {', '.join(known)}."
