# SPDX-License-Identifier: Apache-2.0
"""Compress the vision tokens of vision-language models.

Importing `vtc` imports neither PyTorch nor transformers; the first use of a name does.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtc.core import LayerState, Method, Selection, VisionTokens, make, methods
    from vtc.core.errors import UnsupportedModelError
    from vtc.methods import *  # noqa: F403
    from vtc.models import models
    from vtc.patching import Patch, patch, refusals, unpatch
    from vtc.presets import describe, preset, presets

__version__ = "0.1.0"

_HOMES = {
    "Patch": "patching",
    "UnsupportedModelError": "core.errors",
    "describe": "presets",
    "patch": "patching",
    "preset": "presets",
    "refusals": "patching",
    "unpatch": "patching",
}
"""Public names and the modules that define them; every other public name is from `vtc.methods`."""


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted({*_HOMES, "models", "presets", *import_module("vtc.methods").__all__})
    if name in ("methods", "models", "presets"):  # packages that can be called
        return import_module(f"vtc.{name}")
    if name in _HOMES:
        found = getattr(import_module(f"vtc.{_HOMES[name]}"), name)
    elif (
        name.startswith("_")
        or not name.isidentifier()
        # A module: `from vtc import doctor` asks here first.
        or find_spec(f"vtc.{name}") is not None
        or name not in (home := import_module("vtc.methods")).__all__
    ):
        raise AttributeError(f"module 'vtc' has no attribute {name!r}")
    else:
        found = getattr(home, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
