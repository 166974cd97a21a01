"""MkDocs hooks: what docs/ shows of the repository, since a site holds nothing that is outside docs/.

On GitHub, a page links to `../figures/NAME.png` or `../notebooks/NAME.ipynb`. For the site, figures are copied beside
the pages, and every other such link leads to the repository that the README's badge names. A link to a file that does
not exist is a warning, which `mkdocs build --strict` turns into an error.
"""

import logging
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()\.\./([^)#\s]+)")
BADGE = re.compile(r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob/")
log = logging.getLogger("mkdocs.hooks.repository")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Name the repository that the README's badge names."""
    badge = BADGE.search((ROOT / "README.md").read_text("utf-8"))
    if badge:
        config.repo_url, config.repo_name = f"https://github.com/{badge[1]}", badge[1]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the figures, which lie outside docs/."""
    for path in sorted((ROOT / "figures").glob("*.png")):
        files.append(File.generated(config, f"figures/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that leave docs/ to the copied figures, or to the repository."""

    def target(link: re.Match[str]) -> str:
        path = ROOT / link[1]
        if not path.exists():
            log.warning("%s links to %s, which does not exist", page.file.src_uri, link[1])
        if link[1].startswith("figures/"):
            return link[1]
        return f"{config.repo_url}/{'tree' if path.is_dir() else 'blob'}/main/{link[1].rstrip('/')}"

    return LINK.sub(target, markdown)
