# SPDX-License-Identifier: Apache-2.0
"""Greedy choice of tokens that cover others, as in facility location."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS_AT_ONCE = 512

EQUAL = 1e-4
"""Gains this close to the best, as a share of it, count as equal. Two tokens that cover each other
best have the same gain in exact arithmetic, and rounding must not choose between them."""

SPENT = 1e-9
"""As a share of a candidate's first gain, what rounding leaves of a gain that is 0."""


def coverage_greedy(
    similarity: Tensor, k: int, factor: Tensor | None = None, bonus: Tensor | None = None
) -> Tensor:
    """Choose columns, one by one, by how much they add to what each row is covered by.

    A row r is covered by c_r, the largest of its similarities with the chosen columns, from 0 on.
    The gain of column j is factor_j * sum_r max(0, S_rj - c_r) + bonus_j. Without factor and bonus
    this is greedy facility location, within 1 - 1/e of the best choice.

    Args:
        similarity: (m, n), row r's similarity with candidate j. Negative ones never count.
        k: how many of the n to choose, 0 <= k <= n.
        factor: (n,) multiplies gains.
        bonus: (n,) is added to them.

    Returns:
        (k,) indices in order of choice; ties, up to `EQUAL`, to the lowest index.

    Raises:
        ValueError: `k` out of range, or similarities that are no matrix.
    """
    if similarity.ndim != 2:
        raise ValueError(f"similarity: expected shape (m, n), got {tuple(similarity.shape)}")
    n = similarity.shape[1]
    if not 0 <= k <= n:
        raise ValueError(f"k: expected a whole number from 0 to the {n} tokens given, got {k}")
    wide = similarity if similarity.dtype == torch.float64 else similarity.float()
    covered = wide.new_zeros(wide.shape[0])
    # What each candidate would add, kept up to date in fp64: only rows that the last choice covers
    # better change it, which are few after the first choices.
    added = wide.clamp_min(0).sum(0, dtype=torch.float64)
    taken, spent = torch.zeros_like(added), SPENT * added
    chosen = torch.empty(k, dtype=torch.long, device=similarity.device)
    for step in range(k):
        gain = added if factor is None else added * factor
        if bonus is not None:
            gain = gain + bonus
        gain = gain + taken
        best = gain.amax(0, keepdim=True)
        index = (gain >= best - EQUAL * best.abs()).to(torch.uint8).argmax(0, keepdim=True)
        chosen[step : step + 1] = index
        taken.index_fill_(0, index, -torch.inf)
        column = wide.index_select(1, index).squeeze(1)
        rows = (column > covered).nonzero().squeeze(1)
        for some in rows.split(_ROWS_AT_ONCE):
            here = wide.index_select(0, some)
            before, now = covered[some, None], column[some, None]
            # max(0, S - before) - max(0, S - now), where now is the larger.
            added -= here.clamp(before, now).sub_(before).sum(0, dtype=torch.float64)
        added.masked_fill_(added < spent, 0)
        covered[rows] = column[rows]
    return chosen
