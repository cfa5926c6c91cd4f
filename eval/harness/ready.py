# SPDX-License-Identifier: Apache-2.0
"""Check that lmms-eval works before a run: a missing or incompatible dependency would make every
cell fail for the same reason."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from importlib import metadata
from types import ModuleType

from .plan import BadInput

__all__ = ["import_lmms_eval"]

_DISTRIBUTION = "vision-token-compression"


def import_lmms_eval() -> None:
    """Import lmms-eval, and what its evaluator imports at run time.

    Raises:
        BadInput: an import fails; names the package at fault and the remedy.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import lmms_eval.evaluator
            import lmms_eval.models
            import lmms_eval.tasks

            for name in _imported_later(lmms_eval.evaluator, ("simple_evaluate", "evaluate")):
                importlib.import_module(name)
    except Exception as error:  # incompatible packages may raise anything
        raise BadInput("vtc eval", _remedy(error)) from error


def _imported_later(module: ModuleType, functions: tuple[str, ...]) -> list[str]:
    """The modules that functions of `module` import when called, directly or in functions they
    call. Imports within `try` are left out, as they are optional.
    """
    source = inspect.getsource(module)
    defined = {n.name: n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)}
    found: dict[str, None] = {}
    seen: set[str] = set()
    todo = list(functions)
    while todo:
        name = todo.pop()
        if name in seen or name not in defined:
            continue
        seen.add(name)
        for node in _outside_try(defined[name]):
            if isinstance(node, ast.Import):
                found |= dict.fromkeys(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found[node.module] = None
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                todo.append(node.func.id)
    return list(found)


def _outside_try(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.Try):
            yield child
            yield from _outside_try(child)


def _remedy(error: Exception) -> str:
    """One message: the package at fault, its version, and what to do."""
    own = f'pip install "{_DISTRIBUTION}[eval]"'
    module = getattr(error, "name", None) or _last_module(error)
    package = None if module is None else module.partition(".")[0]
    said = str(error).splitlines()[0] if str(error) else "no reason given"
    lines = [f"lmms-eval cannot be imported: {type(error).__name__}: {said}."]
    names = metadata.packages_distributions().get(package or "", [])
    if package is not None and not names and not _there(package):
        lines.append(f"The package {package!r} is not installed.")
    elif package is not None:
        name = names[0] if names else package
        version = f" {metadata.version(name)}" if names else ""
        lines.append(f"The installed {name}{version} is incompatible.")
        bound = _bound(name)
        if bound is not None:
            return " ".join([*lines, f"`pip install '{bound}'` installs one that works."])
    return " ".join([*lines, f"`{own}` installs versions that work together."])


def _there(package: str) -> bool:
    try:
        return package in sys.modules or importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _last_module(error: Exception) -> str | None:
    """The module in which an error arose."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        name = frame.f_globals.get("__name__")
        if isinstance(name, str) and not name.startswith(("importlib", "vtc.", "_frozen")):
            return name
    return None


def _bound(distribution: str) -> str | None:
    """The requirement of a distribution in vtc's metadata, such as "filelock<4", or `None`."""
    try:
        demands = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return None
    plain = distribution.lower().replace("_", "-")
    for demand in demands:
        wanted = demand.partition(";")[0].replace(" ", "")
        found = re.fullmatch(r"([A-Za-z0-9._-]+)(\[[^]]*\])?([<>=!~].*)", wanted)
        if found and found[1].lower().replace("_", "-") == plain:
            return wanted
    return None
