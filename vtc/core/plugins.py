# SPDX-License-Identifier: Apache-2.0
"""Methods of one's own for programs that take methods as text.

A subclass of `vtc.Method` is known by its name as soon as its module is imported; here is how a
command comes to import it.
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
    """Import what packages offer by entry points of `group`; one that fails is warned of, and the
    others are there."""
    for point in entry_points(group=group):
        try:
            point.load()
        except Exception as error:  # of a package that is not ours
            warnings.warn(
                f"{group}: {point.name} of {point.value} cannot be loaded: "
                f"{type(error).__name__}: {error}",
                stacklevel=5,
            )


def import_modules(names: Iterable[str]) -> None:
    """Import modules, each a dotted name or the path of a .py file.

    Names are also looked for in the working directory, as `python -m` does. A module that is
    imported already is left as it is.

    Raises:
        ArgumentError: no such module or file, or it fails at import; says which and why.
    """
    for name in names:
        try:
            if name.endswith(".py"):
                _import_file(Path(name).expanduser().resolve())
            else:
                _import_name(name)
        except Exception as error:  # whatever a module of others may raise
            raise ArgumentError("import", f"{name}: {type(error).__name__}: {error}") from error


def _import_name(name: str) -> None:
    here = str(Path.cwd())
    if name in sys.modules:
        return
    if here in sys.path or "" in sys.path:
        importlib.import_module(name)
        return
    # Kept, as the module may import its neighbours later; last, so that it hides nothing.
    sys.path.append(here)
    importlib.import_module(name)


def _import_file(file: Path) -> None:
    # Files of one name in two folders are two modules.
    name = f"{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}")
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no module of Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
