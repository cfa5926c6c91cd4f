# SPDX-License-Identifier: Apache-2.0
"""The registered methods by name: those of vtc and of other packages.

A package provides methods through an entry point of the group `vtc.methods` that names a module;
importing the module registers the methods it defines.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from .errors import ArgumentError
from .plugins import load_group

if TYPE_CHECKING:
    from .method import Method

_REGISTRY: dict[str, type[Method]] = {}
_WRAPPERS: dict[str, type[Method]] = {}


def register(cls: type[Method], name: str) -> None:
    """Register `cls` under `name`; wrappers around another method go in a separate list.

    Raises:
        ArgumentError: an invalid name, or one that another method has.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ArgumentError(
            "name", f"expected lower-case letters and digits for {cls.__name__}, got {name!r}"
        )
    if not cls.__module__.startswith("vtc.methods."):
        import_module("vtc.methods")  # vtc's names are taken even before the first look-up
    known = _REGISTRY.get(name) or _WRAPPERS.get(name)
    # A reloaded module replaces its own class.
    if known is not None and _place(known) != _place(cls):
        raise ArgumentError("name", f"{'.'.join(_place(known))} is named {name!r} already")
    (_REGISTRY if cls.listed else _WRAPPERS)[name] = cls


def _place(cls: type[Method]) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def find(name: str) -> type[Method] | None:
    """The method or wrapper of this name, or `None`."""
    _load()
    return _REGISTRY.get(name) or _WRAPPERS.get(name)


def methods() -> dict[str, type[Method]]:
    """All registered methods by name, in alphabetical order."""
    _load()
    return dict(sorted(_REGISTRY.items()))


def wrappers() -> dict[str, type[Method]]:
    """Wrappers that apply a method to each part of an image, by what follows "@" in text."""
    _load()
    return {cls.each: cls for cls in _WRAPPERS.values() if cls.each}


@cache
def _load() -> None:
    import_module("vtc.methods")
    load_group("vtc.methods")
