# SPDX-License-Identifier: Apache-2.0
"""Compress the vision tokens of vision-language models."""

from .families import UnsupportedModelError, models
from .methods import *  # noqa: F403
from .methods import __all__ as _methods
from .methods.base import LayerState, Method, Selection, VisionTokens, make, methods
from .patching import Patch, patch, unpatch
from .presets import describe, preset, presets

__version__ = "0.1.0"
__all__ = [
    "LayerState",
    "Method",
    "Patch",
    "Selection",
    "UnsupportedModelError",
    "VisionTokens",
    "describe",
    "make",
    "methods",
    "models",
    "patch",
    "preset",
    "presets",
    "unpatch",
    *_methods,
]
