# SPDX-License-Identifier: Apache-2.0
"""Greedy selection of tokens that cover others, as in facility location."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops.batch import check_count, check_fits, check_shape, rows_at, together

_ROWS_AT_ONCE = 512

_TOGETHER_UP_TO = 2**16
"""Limit of similarities, over all images, that a CPU processes in lockstep, always on all rows."""

EQUAL = 1e-6
"""Gains within this fraction of the best count as equal: rounding must not choose between
two tokens that cover each other best, whose gains are the same in exact arithmetic."""

SPENT = 1e-9
"""A gain below this fraction of the candidate's first gain counts as 0."""


def coverage_greedy(
    similarity: Tensor, k: int, factor: Tensor | None = None, bonus: Tensor | None = None
) -> Tensor:
    """Choose columns one by one by how much they add to the coverage of the rows.

    The coverage c_r of row r is its largest similarity with a chosen column, at least 0.
    The gain of column j is factor_j * sum_r max(0, S_rj - c_r) + bonus_j. Without factor and bonus
    this is greedy facility location, within 1 - 1/e of the optimum.

    Args:
        similarity: (m, n) similarity of row r with candidate j, or (b, m, n) for b images. Negative
            values never count.
        k: how many of the n to choose, 0 <= k <= n.
        factor: (n,) or (b, n) factors of the gains.
        bonus: (n,) or (b, n) terms added to the gains.

    Returns:
        (k,) or (b, k) indices in order of selection; ties, up to rounding (`EQUAL`), go to the
        lowest index.

    Raises:
        ArgumentError: `k` out of range, or other shapes.
    """
    check_shape("similarity", similarity, "m", "n")
    *images, m, n = similarity.shape
    for name, given in (("factor", factor), ("bonus", bonus)):
        check_fits(name, given, (*images, n))
    check_count("k", k, 0, n)
    if not together(similarity, _TOGETHER_UP_TO):
        none = [None] * len(similarity)
        each = zip(
            similarity,
            none if factor is None else factor,
            none if bonus is None else bonus,
            strict=True,
        )
        return torch.stack([coverage_greedy(one, k, *more) for one, *more in each])
    wide = similarity if similarity.dtype == torch.float64 else similarity.float()
    covered = wide.new_zeros(*images, m)
    # What each candidate would add, updated in fp64: only rows that the last choice covers
    # better change it, few after the first choices. They are searched for only where reading
    # values is free.
    few = wide.ndim == 2 and wide.device.type == "cpu"
    added = wide.clamp_min(0).sum(-2, dtype=torch.float64)
    taken, spent = torch.zeros_like(added), SPENT * added
    chosen = [torch.empty(*images, 0, dtype=torch.long, device=similarity.device)]
    for _ in range(k):
        gain = added if factor is None else added * factor
        if bonus is not None:
            gain = gain + bonus
        gain = gain + taken
        best = gain.amax(-1, keepdim=True)
        index = (gain >= best - EQUAL * best.abs()).to(torch.uint8).argmax(-1, keepdim=True)
        chosen.append(index)
        taken.scatter_(-1, index, -torch.inf)
        now = torch.maximum(covered, rows_at(wide.mT, index).squeeze(-2))
        if few:
            for some in (now > covered).nonzero().squeeze(1).split(_ROWS_AT_ONCE):
                added -= _gained(wide.index_select(0, some), covered[some], now[some])
        else:
            added -= _gained(wide, covered, now)
        added.masked_fill_(added < spent, 0)
        covered = now
    return torch.cat(chosen, -1)


def _gained(similarity: Tensor, before: Tensor, now: Tensor) -> Tensor:
    """(..., n) sums over the (..., m, n) rows of max(0, S - before) - max(0, S - now); before and
    now are (..., m), now the larger."""
    before, now = before[..., None], now[..., None]
    return similarity.clamp(before, now).sub_(before).sum(-2, dtype=torch.float64)
