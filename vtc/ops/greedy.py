# SPDX-License-Identifier: Apache-2.0
"""Greedy choice of k tokens that differ from one another, by cosine similarity.

Both functions keep one running value per token and update it with the similarities to the token
just chosen: O(n k d) time and O(n d) memory. Where a sixth of the tokens or more are chosen, one
product of all pairs, read row by row, is faster than k products that each read all features again,
and is made instead (`_all_pairs`). Nothing leaves the device inside the loop. For many tokens on a
CPU, rows are made some at a time (`vtc.ops.ahead`). The order of choice is returned, so the first j
of k choices are, up to rounding, the choice of j; sort them to put tokens back in sequence order.

Ties go to the lowest index. Equal tokens tie only as far as the matrix product gives equal rows
equal results, which BLAS does up to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vtc.ops.ahead import greedy_ahead, search_isolated
from vtc.ops.similarity import unit_rows

_AHEAD_FROM = 1024
"""Tokens from which on a CPU makes rows some at a time."""

_PAIRS_UP_TO = 4096
"""Tokens of which all pairs are kept in memory: 64 MiB."""


def max_sum(features: Tensor, k: int, pivot: int | Tensor = 0) -> Tensor:
    """Greedy max-sum diversification (ToDRE v2, arXiv 2505.18757, eqs. 4-7, Algorithm 1).

    Starts from `pivot` and adds, again and again, the token whose cosines with all tokens chosen
    so far have the smallest sum.

    Args:
        features: (n, d) tokens; the length of a row does not matter.
        k: how many tokens to choose, 1 <= k <= n.
        pivot: index of the first choice; a 0-d tensor avoids waiting for the device.

    Returns:
        (k,) indices in order of choice, the pivot first.

    Raises:
        ValueError: `k` or `pivot` out of range, features that are no matrix or not finite.
    """
    return _greedy(features, k, pivot, torch.add)


def farthest_first(features: Tensor, k: int, pivot: int | Tensor = 0) -> Tensor:
    """Greedy k-center, or farthest-first traversal (Gonzalez 1985), over cosine similarity.

    Starts from `pivot` and adds, again and again, the token whose largest cosine with a chosen
    token is smallest. In a metric distance such as sqrt(2 - 2 cos), every token then lies within
    twice the best possible covering radius of a chosen one; for 1 - cos, which is no metric, the
    bound is four times.

    Args, returns and raises as `max_sum`.
    """
    return _greedy(features, k, pivot, torch.maximum)


def max_min(features: Tensor, k: int) -> Tensor:
    """Max-min diversity (DivPrune, arXiv 2503.02175): `farthest_first` from the `most_isolated`.

    Args, returns and raises as `max_sum`, which has a pivot.
    """
    rows = unit_rows(features)
    n = rows.shape[0]
    if _many_on_cpu(rows):
        isolated, made = search_isolated(rows)
        return _greedy(rows, k, isolated, torch.maximum, made=made)
    if n > _PAIRS_UP_TO:
        return farthest_first(rows, k, most_isolated(rows))
    pairs = rows @ rows.T
    first = pairs.fill_diagonal_(-torch.inf).amax(1).argmin()
    # A chosen token is out of the running, so that its similarity to itself is never looked at.
    return _greedy(rows, k, first, torch.maximum, pairs)


def most_isolated(features: Tensor, rows_at_once: int = 512) -> Tensor:
    """The token whose most similar other token is least similar to it, by cosine.

    Args:
        features: (n, d) tokens, n at least 1.
        rows_at_once: rows of the similarity matrix that are held at a time.

    Returns:
        0-d index, ties to the lowest.

    Raises:
        ValueError: features that are no matrix or not finite.
    """
    rows = unit_rows(features)
    nearest = []
    for start in range(0, rows.shape[0], rows_at_once):
        block = rows[start : start + rows_at_once] @ rows.T
        itself = torch.arange(block.shape[0], device=rows.device)
        block[itself, itself + start] = -torch.inf
        nearest.append(block.amax(1))
    return torch.cat(nearest).argmin()


def _all_pairs(n: int, k: int) -> bool:
    """Whether all n x n similarities are cheaper than k rows of them (`vtc.eval.bench_ops`).

    Measured at 576 to 2880 tokens of width 1024 and 4096, the two break even between an eighth
    (features that leave the cache, a busy memory) and a quarter (features that stay in it).
    """
    return 6 * k >= n and n <= _PAIRS_UP_TO


def _many_on_cpu(rows: Tensor) -> bool:
    """Whether rows of similarities are best made some at a time. With few tokens there is little to
    gain, and exact duplicates tie to the lowest index in the other ways only."""
    return rows.device.type == "cpu" and rows.shape[0] >= _AHEAD_FROM


def _greedy(
    features: Tensor,
    k: int,
    pivot: int | Tensor,
    combine: Callable[[Tensor, Tensor], Tensor],
    pairs: Tensor | None = None,
    made: dict[int, Tensor] | None = None,
) -> Tensor:
    rows = unit_rows(features)
    n = rows.shape[0]
    if not 1 <= k <= n:
        raise ValueError(f"k: expected a whole number from 1 to the {n} tokens given, got {k}")
    if isinstance(pivot, int) and not 0 <= pivot < n:
        raise ValueError(f"pivot: expected an index from 0 to {n - 1}, got {pivot}")
    if pairs is None and _many_on_cpu(rows):
        return greedy_ahead(rows, k, int(pivot), combine, made)
    chosen = torch.empty(k, dtype=torch.long, device=rows.device)
    chosen[0] = pivot
    if pairs is None and _all_pairs(n, k):
        pairs = rows @ rows.T

    def similar_to(index: Tensor) -> Tensor:
        if pairs is not None:
            return pairs.index_select(0, index).squeeze(0)
        return rows.mv(rows.index_select(0, index).squeeze(0))

    running = similar_to(chosen[:1])
    running.index_fill_(0, chosen[:1], torch.inf)
    for step in range(1, k):
        # argmin returns the first of several minima, which is the tie rule. Indexing with a
        # vector of one, not with a scalar, is what keeps the index on the device.
        index = running.argmin(0, keepdim=True)
        chosen[step : step + 1] = index
        # Infinity stays infinity under + and max, so a chosen token never returns.
        running = combine(running, similar_to(index))
        running.index_fill_(0, index, torch.inf)
    return chosen
