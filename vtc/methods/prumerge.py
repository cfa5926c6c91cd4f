# SPDX-License-Identifier: Apache-2.0
"""LLaVA-PruMerge: outliers of [CLS] attention, each merged with the most similar patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from vtc.core import Method, Positions, Selection, VisionTokens
from vtc.core.settings import check_choice, check_flag, check_keep, check_positions, check_whole
from vtc.ops import top_k, unit_rows


@dataclass(frozen=True)
class PruMerge(Method):
    """Keep the outliers of [CLS] attention, add its nearest neighbours to each, sum up the rest.

    Attention a is a softmax over the patches and [CLS] itself in the tower's last layer, with all
    heads as one. Patches with a > Q3 + 1.5 (Q3 - Q1) are kept, at least one. With `plus` an even
    grid joins them: every s-th patch, s a third of n / outliers. Then x_i <- x_i + sum_j a_j x_j
    over the patches j with the most similar keys (including kept ones, excluding i), and one more
    token sum_j a_j x_j over all patches not kept. As in the code, weights are not normalised; the
    paper does not mention the last token. All of this uses states before the projector.

    The number kept depends on the image, so `keep` is `None` by default. A given `keep` counts all
    tokens, including the last one. The others are chosen by attention, or with `plus` one half by
    attention and the rest on an even grid, as in the code's training mode; if a grid patch is
    taken, the nearest free one replaces it, which the code lacks. The code's grid also does not
    reach the last patch. Towers without [CLS] use the attention a patch receives.

    Args:
        keep: `None`, a fraction of an image's tokens, or a whole number of tokens per image.
        plus: whether to add the even grid (PruMerge+).
        neighbours: number of patches added to each kept one, at least 1, at most all others.
        aggregate: whether to append the last token; not if the budget is a single token.
        order: with contiguous positions "published" (by attention, the grid, the last token) or
            "raster". Original positions are always in raster order, the last token at the last
            patch not kept.
        positions: "contiguous" (as in LLaVA) or "original".

    Raises:
        ArgumentError, ArgumentTypeError: a setting that is not accepted.
    """

    name = "prumerge"
    title = "LLaVA-PruMerge: adaptive pruning and merging"
    paper = "arXiv:2403.15388"
    year = 2024
    needs = frozenset({"cls_attention", "cls_query", "keys", "encoder"})
    vision_layer = -1

    keep: float | int | None = None
    plus: bool = False
    neighbours: int = 32
    aggregate: bool = True
    order: Literal["published", "raster"] = "published"
    positions: Positions = "contiguous"

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_keep(self.keep)
        check_flag("plus", self.plus)
        check_flag("aggregate", self.aggregate)
        check_whole("neighbours", self.neighbours, lowest=1)
        check_choice("order", self.order, ("published", "raster"))
        check_positions(self.positions)

    def select(self, tokens: VisionTokens) -> Selection:
        """(k,) ascending indices and (k, d) contents.

        Raises:
            ValueError: `tokens` comes without the signals in `needs`.
        """
        n, device = len(tokens), tokens.features.device
        total = n if self.keep is None else tokens.budget(self.keep)
        if n == 1 or (self.keep is not None and total >= n):
            return Selection(torch.arange(n, device=device))
        keys = tokens.keys
        if keys is None or tokens.encoder is None:
            raise ValueError("keys, encoder: PruMerge needs them, got tokens without")
        states, project = tokens.mergeable
        attention = _attention(tokens, keys)
        if self.keep is None:
            kept = self._adaptive(attention)
        else:
            kept = self._fixed(attention, total - (self.aggregate and total > 1))
        merged = self._merged(states, keys, attention, kept)
        slots = kept
        free = torch.ones(n, dtype=torch.bool, device=device)
        free[kept] = False
        if self.aggregate and len(kept) < n and total > 1:
            summed = (attention * free).to(merged.dtype) @ states.to(merged.dtype)
            merged = torch.cat([merged, summed[None]])
            slots = torch.cat([kept, free.nonzero()[-1]])
        contents = project(merged.to(states.dtype))
        order = slots.argsort()
        if self.order == "raster" or self.positions == "original":
            contents = contents[order]
        return Selection(slots[order], contents)

    def _adaptive(self, attention: Tensor) -> Tensor:
        """Indices of the outliers by descending attention, then of the grid."""
        n = len(attention)
        low, high = attention.quantile(attention.new_tensor([0.25, 0.75])).unbind()
        count = max(1, int((attention > high + 1.5 * (high - low)).sum()))
        kept = top_k(attention, count)
        if not self.plus:
            return kept
        grid = torch.arange(0, n, max(1, n // count // 3), device=kept.device)
        return torch.cat([kept, grid[~torch.isin(grid, kept)]])

    def _fixed(self, attention: Tensor, count: int) -> Tensor:
        """`count` indices by descending attention, then of the grid."""
        n, device = len(attention), attention.device
        even = count // 2 if self.plus else 0
        kept = top_k(attention, count - even)
        if not even:
            return kept
        grid = ((2 * torch.arange(even, device=device) + 1) * n) // (2 * even)
        place = torch.arange(n, device=device)
        barred = torch.zeros(n, dtype=torch.bool, device=device)
        barred[kept] = True
        # Free grid patches keep their places, so they choose first.
        grid = grid[barred[grid].to(torch.uint8).argsort(stable=True)]
        for step in range(even):
            distance = (place - grid[step]).abs().masked_fill(barred, n)
            nearest = distance.argmin(0, keepdim=True)
            grid[step : step + 1] = nearest
            barred.index_fill_(0, nearest, True)
        return torch.cat([kept, grid.sort().values])

    def _merged(self, states: Tensor, keys: Tensor, attention: Tensor, kept: Tensor) -> Tensor:
        """(m, d_v) states of the kept patches with their neighbours added."""
        rows = unit_rows(keys)
        alike = rows[kept] @ rows.T
        alike.scatter_(1, kept[:, None], -torch.inf)
        count = min(self.neighbours, len(attention) - 1)
        nearest = _highest(alike, count)
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        # Only a few neighbours each: a product of all weights and states would be mostly zeros.
        share = attention.to(wide.dtype)[nearest]
        return wide[kept] + embedding_bag(nearest, wide, mode="sum", per_sample_weights=share)


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge+: `PruMerge` with an even grid of patches added to the attention outliers.

    Args:
        keep: as in `PruMerge`, like all other settings.
        plus: whether to add the even grid; by default yes.
        neighbours: patches added to each kept one.
        aggregate: whether to append a sum of the patches not kept.
        order: "published" or "raster".
        positions: "contiguous" or "original".

    Raises:
        ArgumentError, ArgumentTypeError: a setting that is not accepted.
    """

    name = "prumerge_plus"
    title = "PruMerge+: outliers of attention and an even grid"

    plus: bool = True


def _highest(values: Tensor, count: int) -> Tensor:
    """(m, count) ascending columns of the highest values of each (m, n) row, count below n.

    Ties go to the lowest column, which `topk` does not guarantee; sorting takes ten times as long,
    and is only for rows that tie at the limit.
    """
    best, columns = values.topk(count + 1)
    columns = columns[:, :count]
    tied = (best[:, count - 1] == best[:, count]).nonzero().squeeze(1)
    if len(tied):
        ranked = values[tied].sort(dim=1, descending=True, stable=True).indices
        columns = columns.index_copy(0, tied, ranked[:, :count])
    return columns.sort(dim=1).values


def _attention(tokens: VisionTokens, keys: Tensor) -> Tensor:
    """(n,) attention to each patch: of [CLS] with all heads as one, or what it receives."""
    if tokens.cls_query is not None:
        if tokens.cls_key is None:
            raise ValueError("cls_key: PruMerge needs it with cls_query, got tokens without")
        query = tokens.cls_query.to(torch.promote_types(keys.dtype, torch.float32))
        every = torch.cat([tokens.cls_key[None], keys]).to(query.dtype)
        return (every @ query / keys.shape[1] ** 0.5).softmax(0)[1:]
    if tokens.cls_attention is None:
        raise ValueError("cls_query or cls_attention: PruMerge needs one, got tokens without")
    return tokens.cls_attention.to(torch.promote_types(tokens.cls_attention.dtype, torch.float32))
