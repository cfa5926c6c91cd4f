# SPDX-License-Identifier: Apache-2.0
"""VisPruner: patches with the most [CLS] attention, and non-duplicates among the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.core import Method, Positions, Selection, VisionTokens
from vtc.core.settings import check_keep, check_number, check_positions, check_whole
from vtc.ops import top_k, unit_rows

_NEAREST: int = 32
"""Number of most similar tokens stored for each. The selection does not depend on it."""


@dataclass(frozen=True)
class VisPruner(Method):
    """Important tokens by attention from [CLS], diverse ones by removing near-duplicates.

    Of T tokens, int(T * important) are those with the most attention from [CLS] in the tower layer
    whose output is used. The others, by descending attention, are assigned alternately to two
    sets; the up to 8 of the first set that are most similar to any of the second (cosine of the
    states before the projector) are removed, the rest of the first by descending similarity and the
    second are joined, and so on until T are left. The code fails if the number of others is odd;
    here the first set is then one larger. The result depends on the last bits of the
    similarities, so they are computed in fp64.

    Towers without [CLS] use the attention a patch receives, in the same layer (the code takes the
    last one for SigLIP).

    Args:
        keep: T, as a fraction of an image's tokens or a whole number of tokens per image.
        important: fraction of T chosen by attention, in [0, 1]; 1 is FasterVLM.
        at_once: duplicates removed per step, at least 1.
        positions: "contiguous" (as in LLaVA) or "original".

    Raises:
        ArgumentError, ArgumentTypeError: a setting that is not accepted.
    """

    name = "vispruner"
    title = "VisPruner: visual importance and diversity"
    paper = "arXiv:2412.01818"
    year = 2024
    needs = frozenset({"cls_attention", "encoder"})
    vision_layer = -2

    keep: float | int = 0.1111
    important: float = 0.5
    at_once: int = 8
    positions: Positions = "contiguous"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_number("important", self.important, "[0, 1]")
        check_whole("at_once", self.at_once, lowest=1)
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
        ranked = top_k(tokens.cls_attention, n)
        first = int(k * self.important)
        rows = unit_rows(tokens.encoder.double())
        others = self.without_doubles(rows @ rows.T, ranked[first:], k - first)
        return Selection(torch.cat([ranked[:first], others]).sort().values)

    def without_doubles(self, cosines: Tensor, left: Tensor, wanted: int) -> Tensor:
        """(wanted,) indices that remain after removing near-duplicates.

        Args:
            cosines: (n, n) similarities of all tokens.
            left: (m,) candidate indices, by descending attention.
            wanted: number of indices to keep, at most m.
        """
        if wanted == 0:
            return left[:0]
        # A token's most similar one in a set is the first of its nearest in the set; only
        # if none of them is, all similarities are searched.
        near = cosines.topk(min(_NEAREST, len(cosines)), dim=1)
        inside = torch.zeros(len(cosines), dtype=torch.bool, device=cosines.device)
        while len(left) > wanted:
            a, b = left[::2], left[1::2]
            count = min(self.at_once, len(left) - wanted, len(a))
            if len(b):
                inside.zero_()[b] = True
                found = near.values[a].masked_fill(~inside[near.indices[a]], -torch.inf)
                double = found.amax(1)
                far = double.isinf().nonzero().squeeze(1)
                double[far] = cosines[a[far, None], b].amax(1)
            else:
                double = cosines.new_zeros(len(a))
            left = torch.cat([a[top_k(double, len(a))[count:]], b])
        return left
