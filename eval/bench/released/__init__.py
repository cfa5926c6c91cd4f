# SPDX-License-Identifier: Apache-2.0
"""How long methods take to choose, beside the algorithms of their released code, stated anew.

    python -m vtc.eval.bench.ops --official --threads 1

Each function does, with the same products in the same precision and the same loops, what the
method's released code does to the same tensors, and returns which tokens it keeps, or what these
hold. They are for timing: where that code has a defect (DivPrune and CDPruner do not bar chosen
tokens), so have they. No code was released for ATP, CATP, ToDRE and TCC ("correlation").

Where a method ranks by attention, two lines tell apart the choice, given the rows, and all that it
takes to have them. "attending": the layer's attention runs in both, eagerly in released code, which
reads the map that this makes; by the fused function in vtc, which makes the rows that it needs
beside. "looking ahead": both project the hidden states for a layer that has not run. "with its
rows": released code runs fused attention too, and makes a map beside it.
"""

from __future__ import annotations

from .drawn import state_of, tokens_of
from .measure import Pairs, measure, pairs, show
from .sequence import SEQUENCE

__all__ = ["SEQUENCE", "Pairs", "measure", "pairs", "show", "state_of", "tokens_of"]
