"""Fingerprints: short hashes of what decides a result. A change makes a finished run stale."""

import ast
import hashlib
import json
from functools import cache
from importlib.metadata import version
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def digest(value) -> str:
    """A short fingerprint of anything JSON can write."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of the packages that decide a result."""
    names = ("torch", "transformers", "accelerate", "peft", "datasets")
    return {name: version(name) for name in names}


def module_file(module: str) -> Path | None:
    """The source file of one of our modules or packages, or None where the name is neither."""
    path = _ROOT.joinpath(*module.split("."))
    found = [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]
    return found[0] if found else None


def imported_modules(module: str) -> list[str]:
    """The modules of `common` that a module names in its import statements, in order of name."""
    names = set()
    for node in ast.walk(ast.parse(module_file(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from common import models` names a module; `from common.data import collate` does
            # not.
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return sorted(name for name in names if name.split(".")[0] == "common" and module_file(name))


def modules_behind(module: str) -> list[str]:
    """A module and all modules of `common` that it imports, directly or not, in order of name."""
    found, waiting = set(), [module]
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            waiting += imported_modules(name)
    return sorted(found)


def code_of(module: str) -> str:
    """The code of a module without comments and docstrings, in one normal form."""
    tree = ast.parse(module_file(module).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


@cache
def source_digest(module: str = "common.training") -> str:
    """Fingerprint of a module and of all that it imports of `common`, as they were when first asked
    for.

    It covers code and the data files beside it, not comments, docstrings or formatting.
    """
    found = []
    for name in modules_behind(module):
        data = module_file(name).with_suffix(".toml")
        words = data.read_text(encoding="utf-8") if data.is_file() else ""
        found.append([name, code_of(name), words])
    return digest(found)
