# SPDX-License-Identifier: Apache-2.0
"""What the modules of vtc, eval and integrations import, read from their source with `ast`."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"vtc": "vtc", "eval": "vtc.eval", "integrations": "vtc.integrations"}
"""The packages' names by their folders."""


@dataclass(frozen=True)
class Import:
    """One name that a module imports.

    Attributes:
        source: the module that imports.
        target: the module that is imported, or that the name is from.
        name: what is taken from `target`; `None` for the module itself.
        bound: what the importing module calls it.
        when: "import" (while the module is imported), "call" (in a function) or "types" (for type
            checkers only).
        line: where.
    """

    source: str
    target: str
    name: str | None
    bound: str
    when: str
    line: int

    @property
    def place(self) -> str:
        return f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Module:
    """A source file."""

    name: str
    file: Path
    tree: ast.Module

    @property
    def package(self) -> str:
        """What its relative imports start from."""
        return self.name if self.file.name == "__init__.py" else self.name.rpartition(".")[0]


def read(root: Path = ROOT) -> dict[str, Module]:
    """All modules under `root`, by name."""
    found = {}
    for folder, package in PACKAGES.items():
        for file in sorted((root / folder).rglob("*.py")):
            parts = [package, *file.relative_to(root / folder).with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = Module(name, file, ast.parse(file.read_text("utf-8")))
    return found


def imports(module: Module, known: Mapping[str, Module]) -> list[Import]:
    """All imports of a module, those by `import_module("name")` included.

    Args:
        known: modules by name; what is imported from a package is one of them, or in the package.
    """
    found: list[Import] = []

    def add(target: str, name: str | None, bound: str, when: str, line: int) -> None:
        if name is not None and f"{target}.{name}" in known:
            target, name = f"{target}.{name}", None
        found.append(Import(module.name, target, name, bound, when, line))

    for node, when in _walk(module.tree, "import"):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.partition(".")[0]
                add(alias.name, None, bound, when, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.package.split(".")
                above = above[: len(above) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                add(base, alias.name, alias.asname or alias.name, when, node.lineno)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            match node.args:
                case [ast.Constant(value=str(name)), *_]:
                    add(name, None, "", when, node.lineno)
    return found


def _walk(node: ast.AST, when: str) -> Iterator[tuple[ast.AST, str]]:
    """All nodes, each with when it runs."""
    yield node, when
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and when == "import":
        when = "call"
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        for child in node.body:
            yield from _walk(child, "types")
        for child in node.orelse:
            yield from _walk(child, when)
        return
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, when)


def private_attributes(module: Module) -> set[str]:
    """Names with one underscore that the module defines: functions, classes, attributes of self."""
    names: set[str] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                names.add(node.attr)
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if is_private(name)}


def private_reads(module: Module) -> Iterator[tuple[str, str, int]]:
    """(of what, name, line) of each private attribute of something else than `self` or `cls`."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            base = ast.unparse(node.value)
            if base not in ("self", "cls"):
                yield base, node.attr, node.lineno


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def cycles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(edges.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            group = stack[at:]
            del stack[at:]
            if len(group) > 1 or node in edges.get(node, ()):
                found.append(sorted(group))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return found
