"""Run a script that would run code of a model folder, without that: `python -P untrusting.py SCRIPT ARGUMENTS…`.

llama.cpp's converter loads the tokenizers of many families with code of the model allowed. That runs Python files of
the folder, which its own config names.
"""

import runpy
import sys
from pathlib import Path
from typing import Any


def main(script: str) -> None:
    """Run `script` as a program in which transformers' automatic classes never run code of a model."""
    import transformers

    for auto in (transformers.AutoConfig, transformers.AutoTokenizer):
        auto.from_pretrained = _without_code(auto.from_pretrained)  # type: ignore[method-assign]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def _without_code(load: Any) -> Any:
    return lambda *args, **options: load(*args, **(options | {"trust_remote_code": False}))


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    main(sys.argv[0])
