"""A coding data set that needs no download: the docstrings of Python's standard library.

Source files are parsed, not imported, so their code does not run. Only a few built-in modules, which have no Python
source, are imported and inspected. Duplicates and outliers are not removed here: that is left to cleaning.
"""

import ast
import importlib
import inspect
import platform
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_helpers.config import PYTHON_DOCS

BUILT_IN = ("builtins", "math", "cmath", "itertools", "time", "zlib", "binascii", "unicodedata", "array", "select")
# Modules that are programs, tests or jokes rather than libraries.
SKIPPED = {"antigravity", "this", "idlelib", "lib2to3", "turtledemo", "test", "tests", "ensurepip", "site-packages"}


def source_name() -> str:
    """Return the source's name with the Python implementation and version, because rows differ between versions."""
    return f"{PYTHON_DOCS} of {platform.python_implementation()} {platform.python_version()}"


def records() -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the qualified name and the record of every public function, class and method that has a docstring.

    A record has the keys `instruction`, `input` (the signature), `output` (the docstring) and `module`.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names - SKIPPED):
        if name in BUILT_IN:
            yield from _built_in(name)
        elif (folder / f"{name}.py").is_file():
            yield from _from_source(folder / f"{name}.py", name)
        elif (folder / name / "__init__.py").is_file():
            for file in sorted((folder / name).rglob("*.py")):
                parts = file.relative_to(folder).with_suffix("").parts
                if not any(part in SKIPPED or _is_private(part) for part in parts[:-1]):
                    yield from _from_source(file, ".".join(parts).removesuffix(".__init__"))


def _from_source(file: Path, module: str) -> Iterator[tuple[str, dict[str, str]]]:
    if _is_private(module.rsplit(".", 1)[-1]):
        return
    tree = ast.parse(file.read_bytes())
    for node, name in _public(tree, module):
        docstring = ast.get_docstring(node)
        if docstring:
            yield _record(module, name, _signature(node), docstring)


def _public(tree: Any, prefix: str) -> Iterator[tuple[Any, str]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not _is_private(node.name):
            yield node, f"{prefix}.{node.name}"
            if isinstance(node, ast.ClassDef):
                yield from _public(node, f"{prefix}.{node.name}")


def _signature(node: Any) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({ast.unparse(node.args)}){returns}"


def _built_in(module: str) -> Iterator[tuple[str, dict[str, str]]]:
    for name, value in sorted(vars(importlib.import_module(module)).items()):
        if _is_private(name) or not (inspect.isroutine(value) or inspect.isclass(value)):
            continue
        if (value.__module__ or module).split(".")[0] not in sys.stdlib_module_names:
            continue  # added to `builtins` by IPython
        members = sorted(vars(value).items()) if inspect.isclass(value) else []
        methods = [(f"{name}.{m}", v) for m, v in members if inspect.isroutine(v) and not _is_private(m)]
        for path, part in [(name, value), *methods]:
            docstring = inspect.getdoc(part)
            if docstring:
                text = getattr(part, "__text_signature__", None) or "(...)"
                named = path if module == "builtins" else f"{module}.{path}"
                yield _record(module, named, f"{path}{text}", docstring)


def _is_private(name: str) -> bool:
    return name.startswith("_") and name != "__init__"


def _record(module: str, name: str, signature: str, docstring: str) -> tuple[str, dict[str, str]]:
    question = f"What does {name} do in Python?"
    return name, {"instruction": question, "input": signature, "output": docstring, "module": module}
