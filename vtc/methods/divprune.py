# SPDX-License-Identifier: Apache-2.0
"""DivPrune: the most diverse vision tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtc.core import Method, Positions, Selection, VisionTokens, check_keep, check_positions
from vtc.ops import max_min


@dataclass(frozen=True)
class DivPrune(Method):
    """Greedy max-min diversity of the embeddings that would enter the language model.

    Starts with the token whose nearest other token is farthest (cosine distance), then repeatedly
    adds the token farthest from all chosen ones (Algorithm 1 of the paper). It uses neither
    the question nor the vision tower's attention. The official code does not exclude
    chosen tokens, and so returns fewer than k if tokens repeat; here k are always kept.

    The published setting keeps 9.8 % of the tokens.

    Args:
        keep: fraction of an image's tokens, or a whole number of tokens per image.
        positions: "contiguous" (as in LLaVA, which renumbers the sequence) or "original".

    Raises:
        ArgumentError, ArgumentTypeError: a setting that is not accepted.
    """

    name = "divprune"
    title = "DivPrune: diversity-based pruning"
    paper = "arXiv:2503.02175"
    year = 2025

    keep: float | int = 0.098
    positions: Positions = "contiguous"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_positions(self.positions)

    def select(self, tokens: VisionTokens) -> Selection:
        """Ascending indices, (k,)."""
        n = len(tokens)
        k = tokens.budget(self.keep)
        if k >= n:
            return Selection(torch.arange(n, device=tokens.features.device))
        return Selection(max_min(tokens.features, k).sort().values)
