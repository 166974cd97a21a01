"""Markdown that the texts in it cannot break, and the report as one HTML page."""

import base64
import re
from pathlib import Path

_STYLE = """body{max-width:60em;margin:2em auto;padding:0 1em;font:16px/1.5 sans-serif}
table{border-collapse:collapse;display:block;overflow-x:auto}td,th{padding:.3em .7em;border-bottom:1px solid #8886}
td+td{min-width:4em}
img{max-width:100%;background:#fff}code{overflow-wrap:anywhere}
@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}a{color:#8bf}}"""


def markdown_table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table of texts."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows])


def bullets(lines: list[str]) -> str:
    """Sentences as a Markdown list."""
    return "\n".join(f"- {line}." for line in lines)


def html(text: str, folder: Path) -> str:
    """The Markdown report as one page with the figures of `folder`. HTML in the text is shown, not rendered."""
    import mistune

    body = str(mistune.create_markdown(escape=True, plugins=["table"])(text))

    def inline(match: re.Match[str]) -> str:
        data = base64.b64encode((folder / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    body = re.sub(r'src="(figures/[\w.-]+\.png)"', inline, body)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Comparison</title>'
    return f"<!doctype html>{head}<style>{_STYLE}</style>{body}\n"
