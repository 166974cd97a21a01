"""What the generated pages have in common."""

import re
import textwrap
from typing import Any

WIDTH = 120
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes")


def join(*parts: str) -> str:
    """Blocks of Markdown with their prose wrapped; headings, tables, lists, figures and code stay as they are."""
    return "\n\n".join(part if part.startswith(("#", "|", "- ", "!", "```")) else wrap(part) for part in parts)


def wrap(text: str) -> str:
    """No line breaks inside code: a reader searches for it."""
    held = re.sub(r"`[^`]+`", lambda code: code[0].replace(" ", "\N{NO-BREAK SPACE}"), text)
    return textwrap.fill(held, WIDTH, break_long_words=False, break_on_hyphens=False).replace("\N{NO-BREAK SPACE}", " ")


def figure(name: str) -> str:
    """A figure as pages in docs/ name it."""
    return f"../figures/{name}.png"


def packages(made: dict[str, Any]) -> str:
    """Versions of the libraries that made a result."""
    return ", ".join(f"{package} {made['versions'][package]}" for package in PACKAGES)
