r"""Quote text for the languages that it is pasted into, so that it is shown there and has no effect.

Names of runs, versions, answers and chat templates come from files that anyone may have written. Each language has one
function here, except those for which a library has it: HTML is quoted by `html.escape`, YAML is written by
`huggingface_hub`, and figures draw `$` as it is (`text.parse_math` in `plots.py`).
"""

import re

# Control characters of a terminal, and marks that reverse the direction of the text after them.
STEERING = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069"
# What Markdown reads as markup, or renderers turn into a link or a formula.
ACTIVE = re.compile(rf"[\\`*\[\]<>|!&#~${STEERING}]|[^\S ]|\b_|_\b|^[ +=-]|^\d+[.)] |://|\S@\S|\bwww\.", re.IGNORECASE)


def terminal(text: str) -> str:
    """Return `text` without the characters that steer a terminal. Line breaks and tabs are kept."""
    return re.sub(f"[{STEERING}]", "\N{REPLACEMENT CHARACTER}", text)


def one_line(text: str) -> str:
    """Return `text` on one line, with single blanks and without characters that are not printable."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))


def markdown(text: str) -> str:
    """Return a text on one line for Markdown, also inside a table. It stays as it is if it holds no markup or address.

    Any other text becomes code, in which a vertical bar would still end a cell of a table: it is drawn as `¦`.
    """
    return markdown_code(text).replace("|", "¦") if ACTIVE.search(text) else text


def markdown_code(text: str) -> str:
    """Return a text on one line as code: Markdown and HTML in it have no effect."""
    flat = " ".join(terminal(text).split()).replace("`", "'")
    return f"`{flat}`" if flat else "(empty)"


def go_template(text: str) -> str:
    """Return a Go template that writes `text`. Braces, which may begin an action, and double quotes become actions.

    Without double quotes, the template can stand in a Modelfile's `\"\"\"` string, which has no escapes.
    """
    return re.sub(r'[{"]', lambda found: "{{`" + found[0] + "`}}", text)


def modelfile(text: str) -> str:
    """Return `text` as a string of an Ollama Modelfile. Raises `ValueError` if no such string can hold it.

    A string ends where a line ends with its closing quotes, and has no escapes (ollama/ollama, parser/parser.go).
    """
    if '"' not in text and "\n" not in text and "\r" not in text:
        return f'"{text}"'
    if '"""' in text:
        raise ValueError("three double quotes in a row")
    return f'"""{text}"""'
