# SPDX-License-Identifier: Apache-2.0
"""Hashes of everything that a cell's answers depend on: files, code, versions.

A cell counts as finished if a cell on disk has the same key, so the key must cover everything that
can change answers, and nothing else: anything superfluous discards hours of work.

Code is hashed in two parts. The code that asks, runs and scores is shared by all cells: all of vtc
except `_APART`, which does not affect answers (a new module counts until it is listed there).
A method's own files are hashed only for its cells, with their imports among methods.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import hashlib
import inspect
import json
import marshal
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import vtc
from vtc.core import Method

__all__ = [
    "FileHashes",
    "code_of_files",
    "code_of_functions",
    "code_of_method",
    "digest",
    "fingerprint",
    "installed_versions",
    "named_files",
    "shared_code",
]

_PACKAGE = Path(str(vtc.__file__)).parent
_APART = (
    "__init__.py", "cli", "core/names.py", "core/spec.py", "eval",
    "integrations", "methods", "models/page.py", "presets", "training", "viz/plots.py",
    "viz/record.py", "viz/trace.py", "viz/views.py",
)  # fmt: skip
"""Parts of vtc that do not affect answers; methods are hashed separately (`code_of_method`)."""
_EVAL = Path(__file__).parents[1]
_OF_EVAL = (
    *(f"harness/{name}.py" for name in ("cell", "journal", "loading", "prefills", "scoring")),
    "analysis/stats.py",
)

_LARGE = 1 << 24
_UNSETTLED = 2 * 10**9
"""Nanoseconds within which a file could be rewritten with the same time stamp."""


def digest(value: Any) -> str:
    """Hash of anything that JSON can represent."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


# ---- files --------------------------------------------------------------------------------------
class FileHashes:
    """SHA-256 of whole files; for large ones cached by size, times and inode.

    Args:
        memory: JSON file for the cache; without it nothing is cached.
    """

    def __init__(self, memory: Path | None = None) -> None:
        self.memory = memory
        self.known: dict[str, list[Any]] = {}
        if memory is not None:
            with contextlib.suppress(OSError, ValueError):
                self.known = dict(json.loads(memory.read_text("utf-8")))

    def of(self, file: Path) -> str:
        """The hash of `file` in hexadecimal.

        Raises:
            OSError: the file cannot be read.
        """
        found = file.stat()
        # A modification time can be set back, that of the inode's last change cannot.
        stamp = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
        name = str(file.resolve())
        known = self.known.get(name)
        if known is not None and known[:-1] == stamp:
            return str(known[-1])
        with file.open("rb") as stream:
            made = hashlib.file_digest(stream, "sha256").hexdigest()
        settled = time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) > _UNSETTLED
        if found.st_size >= _LARGE and settled:
            self.known[name] = [*stamp, made]
            self._remember()
        return made

    def _remember(self) -> None:
        if self.memory is None:
            return
        temporary = self.memory.with_name(f".{self.memory.name}.{os.getpid()}")
        with contextlib.suppress(OSError):  # a full disk: read the file again next time
            temporary.write_text(json.dumps(self.known), "utf-8")
            os.replace(temporary, self.memory)


def fingerprint(path: Path, hashes: FileHashes | None = None) -> str:
    """Hash of every byte of a file or of a folder's files, with their names.

    Left out are what is hidden (the hub's client keeps its own files so) and pages of Markdown.
    """
    hashes = hashes or FileHashes()
    if path.is_file():
        return hashes.of(path)[:20]
    files = (p for p in path.rglob("*") if p.is_file())
    found = {}
    for file in files:
        name = file.relative_to(path)
        if name.suffix.lower() != ".md" and not any(part.startswith(".") for part in name.parts):
            found[name.as_posix()] = hashes.of(file)
    return digest(found)


def named_files(value: Any, hashes: FileHashes, base: Path | None = None) -> dict[str, str]:
    """Fingerprints of the files and folders that strings anywhere in `value` name.

    Args:
        value: nested mappings and lists.
        hashes: hashes of files.
        base: base of relative paths; by default the working directory.
    """
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        found: dict[str, str] = {}
        for each in value:
            found |= named_files(each, hashes, base)
        return found
    if not isinstance(value, (str, Path)) or not str(value):
        return {}
    try:
        path = (base or Path()) / Path(value).expanduser()
        if path.exists():
            return {str(value): fingerprint(path, hashes)}
    except (OSError, ValueError, RuntimeError):  # not a path
        pass
    return {}


# ---- code ---------------------------------------------------------------------------------------
def _hashed(files: Iterable[Path], base: Path) -> str:
    named = {os.path.relpath(f, base): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    return digest({name.replace(os.sep, "/"): value for name, value in named.items()})


def shared_code() -> str:
    """Hash of the code that affects every answer, without the methods' own files."""
    from vtc.integrations import lmms_eval

    own = []
    for file in _PACKAGE.rglob("*.py"):
        name = file.relative_to(_PACKAGE).as_posix()
        if not any(name == part or name.startswith(f"{part}/") for part in _APART):
            own.append(file)
    asks = sorted(Path(str(lmms_eval.__file__)).parent.rglob("*.py"))
    return digest(
        [
            _hashed(own, _PACKAGE),
            _hashed((_EVAL / name for name in _OF_EVAL), _EVAL),
            _hashed(asks, Path(str(lmms_eval.__file__)).parent),
            *([code_of_files(foreign)] if (foreign := _foreign_families()) else ()),
        ]
    )


def _foreign_families() -> list[Path]:
    """Files of model families from other packages."""
    from vtc.models import families

    foreign = (cls for cls in families() if not cls.__module__.startswith("vtc.models."))
    files = (Path(str(sys.modules[cls.__module__].__file__)) for cls in foreign)
    return [file for file in files if file.is_file()]


def code_of_method(method: Method) -> str:
    """Hash of the files that define a method's classes, and of their imports: among vtc's methods,
    and from the package or folder of a user-defined method."""
    files: set[Path] = set()
    loose: list[str] = []
    for cls in _classes(method):
        try:
            files |= _closure(Path(inspect.getfile(cls)).resolve())
        except (TypeError, OSError):  # defined in an interactive session
            functions = [f for f in vars(cls).values() if hasattr(f, "__code__")]
            code = [marshal.dumps(f.__code__) for f in functions]
            loose.append(hashlib.sha256(b"".join([cls.__qualname__.encode(), *code])).hexdigest())
    named = {f.name + hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    return digest([sorted(named), sorted(loose)])


def _classes(method: Method) -> set[type]:
    """The classes of a method and of the methods in it, without the common base."""
    found = {
        cls
        for cls in type(method).__mro__
        if issubclass(cls, Method) and cls.__module__ != Method.__module__
    }
    inner: list[Any] = [part for part in method.parts if part is not method]
    for f in dataclasses.fields(method):  # type: ignore[arg-type]
        value = getattr(method, f.name)
        inner += value if isinstance(value, (list, tuple)) else [value]
    for each in inner:
        if isinstance(each, Method):
            found |= _classes(each)
    return found


def code_of_functions(functions: Iterable[Callable[..., Any]]) -> str:
    """Hash of the files that define functions, and of their imports next to them."""
    codes = (getattr(inspect.unwrap(function), "__code__", None) for function in functions)
    files = {Path(code.co_filename) for code in codes if code is not None}
    return code_of_files(f for f in files if f.is_file())


def code_of_files(files: Iterable[Path]) -> str:
    """Hash of modules, and of their imports next to them."""
    found: set[Path] = set()
    for file in files:
        found |= _closure(file.resolve())
    return digest(sorted({f.name + hashlib.sha256(f.read_bytes()).hexdigest() for f in found}))


def _closure(first: Path) -> set[Path]:
    """A module's file, and its direct and indirect imports from the same package or folder."""
    top = first.parent
    while (top / "__init__.py").is_file():
        top = top.parent
    package = top / first.relative_to(top).parts[0]
    found: set[Path] = set()
    todo = [first]
    while todo:
        file = todo.pop()
        if file in found:
            continue
        found.add(file)
        for name in _imported(file, top):
            for base in dict.fromkeys((top, _PACKAGE.parent)):
                path = base.joinpath(*name)
                for candidate in (path.with_suffix(".py"), path / "__init__.py"):
                    if candidate.is_file() and _alike(candidate, first, package):
                        todo.append(candidate)
    return found


def _alike(file: Path, first: Path, package: Path) -> bool:
    """Whether to hash `file` with `first`, a module of `package` that imports it."""
    if file.is_relative_to(_PACKAGE / "methods"):
        return True
    if first.is_relative_to(_EVAL):
        return file.is_relative_to(_EVAL)
    if file.is_relative_to(_PACKAGE):
        return False
    if package.is_dir():
        return file.is_relative_to(package)
    # A module without a package: its neighbours, unless these are all installed packages.
    return file.is_relative_to(package.parent) and "site-packages" not in package.parts


def _imported(file: Path, top: Path) -> Iterator[tuple[str, ...]]:
    """Names of modules that a file imports, from its source text."""
    here = file.relative_to(top).parts[:-1] if file.is_relative_to(top) else ()
    if file.is_relative_to(_PACKAGE):
        here = file.relative_to(_PACKAGE.parent).parts[:-1]
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            start = here[: len(here) - node.level + 1] if node.level else ()
            module = (*start, *((node.module or "").split(".") if node.module else ()))
            if module:
                yield module
            for alias in node.names:  # a module of a package
                yield (*module, alias.name)


# ---- versions -----------------------------------------------------------------------------------
_COUNT = (
    "lmms-eval", "transformers", "tokenizers", "torch", "torchvision", "numpy", "pillow",
)  # fmt: skip
_COUNT_IF_USED = {
    "flash": "flash-attn",
    "quantization": "bitsandbytes",
    "bit": "bitsandbytes",
}


def installed_versions(arguments: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Installed versions of vtc and of the packages that affect answers.

    Args:
        arguments: arguments of the model; packages that they use are included.
    """
    text = json.dumps(dict(arguments or {}), default=str)
    names = [*_COUNT, *{name for word, name in _COUNT_IF_USED.items() if word in text}]
    found = {"vtc": vtc.__version__}
    for name in sorted(names):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name).partition("+")[0]
    return found
