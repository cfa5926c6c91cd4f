# SPDX-License-Identifier: Apache-2.0
"""User-defined methods for programs that take methods as text.

A subclass of `vtc.Method` is registered as soon as its module is imported; commands import it
here.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path

from .errors import ArgumentError

__all__ = ["import_modules", "load_group"]


def load_group(group: str) -> None:
    """Import what packages provide through entry points of `group`; a failing one gives a warning,
    the others still load.

    Args:
        group: "vtc.methods", "vtc.families" or "vtc.executors".
    """
    for point in entry_points(group=group):
        try:
            point.load()
        except Exception as error:  # from another package
            warnings.warn(
                f"{group}: {point.name} of {point.value} cannot be loaded: "
                f"{type(error).__name__}: {error}",
                stacklevel=5,
            )


def import_modules(names: Iterable[str]) -> None:
    """Import modules, each a dotted name or the path of a .py file.

    The working directory is searched too, as by `python -m`. Modules already imported are left as
    they are.

    Raises:
        ArgumentError: no such module or file, or its import fails; names it and the reason.
    """
    for name in names:
        try:
            if name.endswith(".py"):
                _import_file(Path(name).expanduser().resolve())
            else:
                _import_name(name)
        except Exception as error:  # a user's module may raise anything
            raise ArgumentError("import", f"{name}: {type(error).__name__}: {error}") from error


def _import_name(name: str) -> None:
    here = str(Path.cwd())
    if name in sys.modules:
        return
    if here in sys.path or "" in sys.path:
        importlib.import_module(name)
        return
    # Kept, as the module may later import modules next to it; last, so that it shadows nothing.
    sys.path.append(here)
    importlib.import_module(name)


def _import_file(file: Path) -> None:
    # Files of the same name in two folders are two modules.
    name = f"{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}")
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
