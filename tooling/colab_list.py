"""Download Google Colab's list of packages to tests/colab/packages.txt, one per line.

usage: python tooling/colab_list.py [--source FOLDER_OR_URL] [--as-of DATE]     (make colab-list)
"""

import argparse
import datetime
import re
from pathlib import Path
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "https://raw.githubusercontent.com/googlecolab/backend-info/main"
TARGET = ROOT / "tests" / "colab" / "packages.txt"


def convert(freeze: str, system: str, as_of: str) -> str:
    """Combine the output of `pip freeze` and the description of the system into one list.

    A package that was installed from a URL gets the version in the URL. If there is none, it is listed without a
    version.
    """
    python = re.search(r"^Python (\d+\.\d+)", system, re.MULTILINE)
    if python is None:
        raise SystemExit("error: os-info-gpu.txt has no Python version. Fix: check that file at the source.")
    lines = [f"# Google Colab's GPU machines, from {SOURCE}", f"# as of {as_of}", f"# python {python[1]}"]
    for line in freeze.splitlines():
        name, _, address = line.partition(" @ ")
        if not line.strip() or line.startswith("#"):
            continue
        version = re.search(r"[-_](\d[\w.]*?)(?:-|\.tar|\.whl|$)", address.split("#")[0]) if address else None
        lines.append(f"{name}=={version[1]}" if version else name)
    return "\n".join(lines) + "\n"


def _read(source: str, name: str) -> str:
    folder = source if "://" in source else Path(source).resolve().as_uri()
    with urlopen(f"{folder}/{name}", timeout=60) as answer:
        return answer.read().decode()


def main() -> None:
    """Download both files and write the list."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default=SOURCE, help="folder or URL of both files")
    parser.add_argument("--as-of", default=datetime.date.today().isoformat(), help="date of the list (default today)")
    args = parser.parse_args()
    text = convert(_read(args.source, "pip-freeze.gpu.txt"), _read(args.source, "os-info-gpu.txt"), args.as_of)
    TARGET.write_text(text, "utf-8")
    print(f"{TARGET.relative_to(ROOT)}: {text.count('==')} packages")


if __name__ == "__main__":
    main()
