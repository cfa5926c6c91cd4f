# SPDX-License-Identifier: Apache-2.0
"""The compression methods. Importing this package registers them all."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from vtc.core import (
    Compose,
    EncoderState,
    LayerState,
    Merging,
    Method,
    Positions,
    Rows,
    ScorerMethod,
    Selection,
    VisionTokens,
    make,
    methods,
)
from vtc.methods.atp import ATP
from vtc.methods.catp import CATP
from vtc.methods.cdpruner import CDPruner
from vtc.methods.correlation import Correlation
from vtc.methods.dart import DART
from vtc.methods.divprune import DivPrune
from vtc.methods.downsample import Downsample
from vtc.methods.fastv import FastV
from vtc.methods.flowcut import FlowCut
from vtc.methods.full import Full
from vtc.methods.holov import HoloV
from vtc.methods.mmtok import MMTok
from vtc.methods.pool import Pool
from vtc.methods.prumerge import PruMerge, PruMergePlus
from vtc.methods.pyramiddrop import PyramidDrop
from vtc.methods.random import Random
from vtc.methods.scope import SCOPE
from vtc.methods.sparsevlm import SparseVLM
from vtc.methods.split import PerFrame, PerTile
from vtc.methods.todre import ToDRE
from vtc.methods.tome import ToMe
from vtc.methods.transprune import TransPrune
from vtc.methods.v2drop import V2Drop
from vtc.methods.visionzip import VisionZip
from vtc.methods.vispruner import VisPruner
from vtc.methods.vscan import VScan

__all__ = [
    "ATP",
    "CATP",
    "DART",
    "SCOPE",
    "CDPruner",
    "Compose",
    "Correlation",
    "DivPrune",
    "Downsample",
    "EncoderState",
    "FastV",
    "FlowCut",
    "Full",
    "HoloV",
    "LayerState",
    "MMTok",
    "Merging",
    "Method",
    "PerFrame",
    "PerTile",
    "Pool",
    "Positions",
    "PruMerge",
    "PruMergePlus",
    "PyramidDrop",
    "Random",
    "Rows",
    "ScorerMethod",
    "Selection",
    "SparseVLM",
    "ToDRE",
    "ToMe",
    "TransPrune",
    "V2Drop",
    "VScan",
    "VisPruner",
    "VisionTokens",
    "VisionZip",
    "make",
    "methods",
]


class _Package(ModuleType):
    """`vtc.methods` is this package and also a function that lists the registered methods."""

    def __call__(self, model: Any = None) -> dict[str, type[Method]]:
        """The registered methods by name.

        Args:
            model: only those that this model takes; `vtc.refusals` tells why it takes no others.

        Raises:
            UnsupportedModelError: a model of no supported family.
        """
        if model is None:
            return methods()
        from vtc.patching import refusals

        refused = refusals(model)
        return {name: cls for name, cls in methods().items() if name not in refused}


sys.modules[__name__].__class__ = _Package
