# SPDX-License-Identifier: Apache-2.0
"""Times methods' selection against reimplementations of their released code.

    python -m vtc.eval.bench.ops --official --threads 1

Each function repeats the operations of a method's released code on the same tensors, with the same
products, precision and loops, and returns the kept tokens or their contents. The functions are for
timing only and reproduce defects (DivPrune and CDPruner do not exclude chosen tokens). No code was
released for ATP, CATP, ToDRE and TCC ("correlation").

If a method ranks by attention, one line times the selection, given the rows, and another also
computes them. "attending": both run the layer's attention; released code eagerly, reading its map,
vtc with the fused kernel, computing the needed rows separately. "looking ahead": both project the
hidden states for a layer that has not run. "with its rows": released code also runs fused
attention, and computes a full map separately.
"""

from __future__ import annotations

from .drawn import state_of, tokens_of
from .measure import Pairs, measure, pairs, show
from .sequence import SEQUENCE

__all__ = ["SEQUENCE", "Pairs", "measure", "pairs", "show", "state_of", "tokens_of"]
