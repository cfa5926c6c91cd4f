# SPDX-License-Identifier: Apache-2.0
"""SCOPE: salient tokens that cover what is not covered yet."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtc.core import Method, Positions, Selection, VisionTokens
from vtc.core.settings import check_keep, check_number, check_positions
from vtc.ops import coverage_greedy, unit_rows


@dataclass(frozen=True)
class SCOPE(Method):
    """Greedy coverage of all patches, each candidate's gain weighted by its saliency.

    Token j raises the coverage of token i by how much its cosine with i exceeds that of the best
    chosen token, at least 0; the sum over i is multiplied by a_j ** alpha, where a_j is the
    attention from [CLS] to j in the tower layer whose output is used. Cosines use the states before
    the projector. [CLS] is not kept. Towers without [CLS] use the attention a patch receives.

    Args:
        keep: fraction of an image's tokens, or a whole number of tokens per image.
        alpha: weight of saliency, at least 0; 0 is plain facility location.
        positions: "contiguous" (as in LLaVA) or "original".

    Raises:
        ArgumentError, ArgumentTypeError: a setting that is not accepted.
    """

    name = "scope"
    title = "SCOPE: saliency and coverage"
    paper = "arXiv:2510.24214"
    year = 2025
    needs = frozenset({"cls_attention", "encoder"})
    vision_layer = -2

    keep: float | int = 0.1111
    alpha: float = 1.0
    positions: Positions = "contiguous"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_number("alpha", self.alpha, "[0, inf)")
        check_positions(self.positions)

    def select(self, tokens: VisionTokens) -> Selection:
        """Ascending indices, (k,).

        Raises:
            ValueError: `tokens` comes without `cls_attention` or `encoder`.
        """
        n = len(tokens)
        k = tokens.budget(self.keep)
        if k >= n:
            return Selection(torch.arange(n, device=tokens.features.device))
        if tokens.cls_attention is None or tokens.encoder is None:
            raise ValueError("cls_attention, encoder: needed, got tokens without")
        rows = unit_rows(tokens.encoder)
        saliency = tokens.cls_attention.to(rows.dtype) ** self.alpha
        return Selection(coverage_greedy(rows @ rows.T, k, factor=saliency).sort().values)
