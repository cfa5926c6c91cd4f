# SPDX-License-Identifier: Apache-2.0
"""DivPrune: the vision tokens that are least like one another."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtc.core import Method, Positions, Selection, VisionTokens, check_choice, check_keep
from vtc.ops import max_min


@dataclass(frozen=True)
class DivPrune(Method):
    """Greedy max-min diversity of the embeddings that would enter the language model.

    Starts with the token whose nearest other token is farthest (cosine distance), then adds, again
    and again, the token that is farthest from all chosen ones (Algorithm 1 of the paper). Neither
    the question nor the vision tower's attention is looked at. The official code does not exclude
    chosen tokens, and so returns fewer than asked for where tokens repeat; here k are k.

    The published setting keeps 9.8 % of the tokens.

    Args:
        keep: fraction of an image's tokens, or a whole number of tokens per image.
        positions: "contiguous" (as in LLaVA, whose sequence is numbered anew) or "original".
    """

    name = "divprune"
    title = "DivPrune: diversity-based pruning"
    paper = "arXiv:2503.02175"
    year = 2025

    keep: float | int = 0.098
    positions: Positions = "contiguous"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_choice("positions", self.positions, ("original", "contiguous"))

    def select(self, tokens: VisionTokens) -> Selection:
        """Ascending indices, (k,)."""
        n = len(tokens)
        k = tokens.budget(self.keep)
        if k >= n:
            return Selection(torch.arange(n, device=tokens.features.device))
        return Selection(max_min(tokens.features, k).sort().values)
