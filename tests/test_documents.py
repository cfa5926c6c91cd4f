# SPDX-License-Identifier: Apache-2.0
"""What documents and docstrings name is there: files, modules, their attributes, `python -m`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.imports import ROOT, read

pytest.importorskip("lmms_eval")  # some of the modules named import it

MODULES = read()
DOCUMENTS = [
    file
    for file in sorted(ROOT.rglob("*.md"))
    if not any(part.startswith(".") or part == "results" for part in file.relative_to(ROOT).parts)
]

PATH = re.compile(r"(?<![\w./-])(?:vtc|eval|integrations|tests|notebooks|\.ci)/[\w./*-]*+(?!<)")
"""From the root; without those that go on with a place holder, `test_<name>.py`."""

MODULE = re.compile(r"(?<![\w./-])vtc(?:\.[A-Za-z_]\w*)+")
RUN = re.compile(r"(?:python|launch\b.*) -m ((?:vtc|tests|lmms_eval)[\w.]*)")
"""One that ends with a point is the beginning of several."""

LINK = re.compile(r"\]\(([^)#:]+)\)")
"""Links to files; those with a colon are to pages elsewhere."""


def texts() -> Iterator[tuple[str, str]]:
    """(where, text) of every document, and of every docstring and text below a constant."""
    for file in DOCUMENTS:
        yield str(file.relative_to(ROOT)), file.read_text("utf-8")
    for module in MODULES.values():
        for node in ast.walk(module.tree):
            match node:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield f"{module.name}:{node.lineno}", text


TEXTS = list(texts())
GROUPS = {
    node.args[0].value
    for module in MODULES.values()
    for node in ast.walk(module.tree)
    if isinstance(node, ast.Call)
    and isinstance(node.func, ast.Name)
    and node.func.id == "load_group"
    and isinstance(node.args[0], ast.Constant)
}
"""Entry points that vtc looks for: `load_group("vtc.methods")`."""

MADE = {"eval/embedded/training/runs"}
"""What is not in the repository: a command makes it."""


def exists(path: str, beside: Path) -> bool:
    """Whether a path, or a pattern, is there, from the root or beside the document."""
    return any(any(folder.glob(path.rstrip("/."))) for folder in (ROOT, beside))


def is_there(name: str) -> bool:
    """Whether a dotted name is a module, a group of entry points, or something in a module."""
    parts = name.split(".")
    count = next(n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in MODULES)
    found: Any = import_module(".".join(parts[:count]))
    for part in parts[count:]:
        if part in getattr(found, "__dataclass_fields__", {}):
            return True
        if not hasattr(found, part):
            return name in GROUPS
        found = getattr(found, part)
    return True


def test_paths_are_there() -> None:
    wrong = []
    for where, text in TEXTS:
        beside = (ROOT / where).parent if where.endswith(".md") else ROOT
        named = PATH.findall(text)
        if where.endswith(".md"):
            named += [path for path in LINK.findall(text) if not path.startswith("<")]
        wrong += [
            f"{where}: {path}" for path in named if path not in MADE and not exists(path, beside)
        ]
    assert not wrong, "\n".join(wrong)


def test_modules_and_their_attributes_are_there() -> None:
    wrong = []
    for where, text in TEXTS:
        wrong += [f"{where}: {name}" for name in MODULE.findall(text) if not is_there(name)]
    assert not wrong, "\n".join(wrong)


def test_what_is_run_as_a_module_can_be() -> None:
    wrong = []
    for where, text in TEXTS:
        for name in RUN.findall(text):
            found = find_spec(name.rstrip("."))
            if found is not None and found.submodule_search_locations and name[-1] != ".":
                found = find_spec(f"{name}.__main__")
            if found is None:
                wrong.append(f"{where}: python -m {name}")
    assert not wrong, "\n".join(wrong)
