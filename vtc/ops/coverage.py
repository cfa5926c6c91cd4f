# SPDX-License-Identifier: Apache-2.0
"""Greedy choice of tokens that cover others, as in facility location."""

from __future__ import annotations

import torch
from torch import Tensor

EQUAL = 1e-4
"""Gains this close to the best, as a share of it, count as equal. Two tokens that cover each other
best have the same gain in exact arithmetic, and rounding must not choose between them."""


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
    # Candidates as rows, so that one candidate's similarities lie side by side.
    by_candidate = wide.T.contiguous()
    covered = by_candidate.new_zeros(by_candidate.shape[1])
    taken = by_candidate.new_zeros(n)
    chosen = torch.empty(k, dtype=torch.long, device=similarity.device)
    for step in range(k):
        gain = (by_candidate - covered).clamp_min_(0).sum(1)
        if factor is not None:
            gain = gain * factor
        if bonus is not None:
            gain = gain + bonus
        gain = gain + taken
        best = gain.amax(0, keepdim=True)
        index = (gain >= best - EQUAL * best.abs()).to(torch.uint8).argmax(0, keepdim=True)
        chosen[step : step + 1] = index
        covered = torch.maximum(covered, by_candidate.index_select(0, index).squeeze(0))
        taken.index_fill_(0, index, -torch.inf)
    return chosen
