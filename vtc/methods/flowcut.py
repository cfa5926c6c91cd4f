# SPDX-License-Identifier: Apache-2.0
"""FlowCut: drop patches in the vision tower as its attention concentrates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.core import EncoderState, Merging, Method, Positions, budget, check_keep, check_positions
from vtc.ops import top_k


@dataclass(frozen=True)
class FlowCut(Method):
    """Drop patches in every second tower layer by a score averaged over the layers.

    A patch's score is (relation + semantic) * density. Relation is the attention from [CLS];
    semantic is the softmax of the unscaled products of [CLS]'s value with all values, mean over
    heads; both are divided by their sum over the patches. Density is the L1 norm of the patch's
    value, mean over heads. Scores accumulate as 0.5 old + 0.5 new.

    With `rem` layers left before the last but one layer whose output is used, and `rem` even, about
    (n - T) / sqrt(rem) * (1 - H^2) of n patches are dropped, where H in [0, 1] is the normalised
    entropy of the attention from [CLS]: concentrated attention drops more. At `rem` = 0 exactly T
    are left. This follows the official code for LLaVA-1.5, which applies the largest drop of a
    batch to all of it; here each image has its own. The stage between decoder layers that the code
    adds for LLaVA-NeXT is left out: `FlowCut(...) | FastV(...)` also cuts there, but by attention
    alone, softmax over all keys, while the code takes the softmax over the vision tokens only and
    weighs values in, as in the tower.

    Towers without [CLS] have no semantic term; relation is the attention a patch receives
    (the code averages the queries instead).

    Args:
        keep: T, as a fraction of an image's patches or a whole number.
        positions: "contiguous" (the language model sees a shorter image) or "original".

    Raises:
        ArgumentError, ArgumentTypeError: a setting that is not accepted.
    """

    name = "flowcut"
    title = "FlowCut: pruning along the information flow in the tower"
    paper = "arXiv:2505.19536"
    year = 2025
    by_tile = True

    keep: float | int = 0.25
    positions: Positions = "contiguous"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_positions(self.positions)

    def merge(self, state: EncoderState) -> Merging | None:
        """Targets of the n tokens, -1 for dropped ones, and the scores of the others; `None` if
        nothing is dropped."""
        n, wanted = len(state), budget(self.keep, state.original)
        last = max(state.num_layers - 2, 0)
        if n <= wanted or state.layer > last:
            return None
        score = _score(state)
        if state.memory is not None:
            score = 0.5 * state.memory + 0.5 * score
        leaving = self.leaving(state.attention, wanted, last - state.layer)
        stays = torch.zeros(n, dtype=torch.bool, device=score.device)
        stays[top_k(score, max(n - leaving, wanted))] = True
        target = torch.where(stays, stays.cumsum(0) - 1, -1)
        return Merging(target, score[stays])

    def leaving(self, attention: Tensor, wanted: int, rem: int) -> int:
        """Number of patches to drop, given their (n,) `attention`, `rem` layers before the last."""
        n = attention.shape[0]
        if rem == 0:
            return n - wanted
        if rem % 2 or n < 2:
            return 0
        share = attention.float() / attention.float().sum()
        entropy = float(torch.special.entr(share).sum()) / math.log(n)
        return round((n - wanted) / math.sqrt(rem) * max(1 - entropy**2, 0.0))


def _score(state: EncoderState) -> Tensor:
    """(n,) fp32."""
    values = state.values.float()
    relation = state.attention.float()
    relation = relation / relation.sum()
    density = values.mean(1).abs().sum(1)
    if state.cls_value is None:
        return relation * density
    cls = state.cls_value.float()
    products = torch.einsum("hd,nhd->hn", cls, values)
    itself = cls.square().sum(1, keepdim=True)
    semantic = torch.cat([itself, products], dim=1).softmax(1).mean(0)[1:]
    return (relation + semantic / semantic.sum()) * density
