# SPDX-License-Identifier: Apache-2.0
"""DART: vision tokens least similar to a few pivots."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.core import LayerState, Method, Positions, Record, Selection
from vtc.core.settings import (
    budget,
    check_flag,
    check_keep,
    check_positions,
    check_whole,
    scale_layers,
)
from vtc.ops import top_k, unit_rows


@dataclass(frozen=True)
class DART(Method):
    """Before decoder layer K, keep pivots and the tokens least similar to them.

    Pivots are the vision tokens and the text tokens after the image with the largest keys (L1 norm
    over all heads, after rotation) in layer K - 1. For each pivot in turn, vision pivots
    first, by descending norm, the tokens not yet kept with the lowest cosine to it are kept, by the
    layer's output after the model's final norm. Text pivots are not part of the budget.

    The paper drops tokens more similar to a pivot than a threshold; its code keeps a fixed number
    per pivot, in addition to the pivots, and so 4 tokens more than its tables say. Here exactly
    the budget is kept, pivots included; if it does not divide evenly, the numbers per pivot differ
    by one. The code's order of pivots is that of a Python set; here it is defined. All vision
    tokens of a sample compete for the sum of its images' budgets.

    Args:
        keep: fraction of an image's tokens, or a whole number of tokens per image, after layer
            K - 1 (published: 192, 128 and 64 of 576).
        layer: K, at least 1.
        image_pivots: number of vision pivots, at least 1.
        text_pivots: number of text pivots, at least 0.
        count_pivots: whether vision pivots count towards `keep`; `False` is the code.
        positions: "original" (as in the code) or "contiguous".

    Raises:
        ArgumentError, ArgumentTypeError: a setting that is not accepted.
    """

    name = "dart"
    title = "DART: duplication matters more than importance"
    paper = "arXiv:2502.11494"
    year = 2025

    keep: float | int = 0.222
    layer: int = 2
    image_pivots: int = 4
    text_pivots: int = 4
    count_pivots: bool = True
    positions: Positions = "original"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_whole("layer", self.layer, lowest=1)
        check_whole("image_pivots", self.image_pivots, lowest=1)
        check_whole("text_pivots", self.text_pivots)
        check_flag("count_pivots", self.count_pivots)
        check_positions(self.positions)

    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        """(K,).

        Raises:
            ArgumentError: the model has no layer K.
        """
        return scale_layers(self.layer, (), num_layers)

    def records(self, num_layers: int) -> dict[int, frozenset[Record]]:
        """Keys and normed output of layer K - 1."""
        return {self.layer - 1: frozenset({"keys", "normed"})}

    def leaves(self, sizes: tuple[int, ...], held: int, cut: int, cuts: int) -> int:
        """`keep` of each image, plus the vision pivots if they do not count."""
        k = sum(budget(self.keep, n) for n in sizes)
        return k if self.count_pivots else k + min(self.image_pivots, k)

    def prune(self, state: LayerState) -> Selection | None:
        """Ascending indices among the sample's vision tokens, or `None` if all fit the budget."""
        vision = state.vision
        k = sum(budget(self.keep, n) for n in state.original)
        if k >= vision.shape[0]:
            return None
        norms = state.recorded[self.layer - 1, "keys"].float().abs().sum(1)
        rows = unit_rows(state.recorded[self.layer - 1, "normed"])
        text = state.text.nonzero().squeeze(1)
        pivots = top_k(norms[vision], min(self.image_pivots, k))
        if not self.count_pivots:
            k = min(k + len(pivots), vision.shape[0])
        guides = text[top_k(norms[text], min(self.text_pivots, text.shape[0]))]
        cosines = rows[torch.cat([vision[pivots], guides])] @ state.of_vision(rows).T
        return Selection(_least_alike(cosines, pivots, k).sort().values)


def _least_alike(cosines: Tensor, pivots: Tensor, k: int) -> Tensor:
    """(k,) the `pivots` and, for each row of the (p, n) `cosines`, the lowest not yet kept."""
    kept = torch.zeros(cosines.shape[1], dtype=torch.bool, device=cosines.device)
    kept[pivots] = True
    rest = k - pivots.shape[0]
    share, over = divmod(rest, cosines.shape[0])
    for i, row in enumerate(cosines):
        chosen = top_k((-row).masked_fill(kept, -torch.inf), share + (i < over))
        kept[chosen] = True
    return kept.nonzero().squeeze(1)
