# SPDX-License-Identifier: Apache-2.0
"""Greedy selection of k diverse tokens by cosine similarity.

The functions keep one running value per token and update it with the similarities to the token
just chosen: O(n k d) time and O(n d) memory. If at least a sixth of the tokens is chosen, one
product of all pairs, read row by row, is faster than k products that each read all features,
and is used instead (`_all_pairs`). Nothing leaves the device inside the loop. For many tokens on a
CPU, image by image, most similarities are never computed (`vtc.ops.ahead`). Indices are in order of
selection, so the first j of k are, up to rounding, the selection for j; sort them for sequence
order.

Ties go to the lowest index. Equal tokens tie only if the matrix product gives equal rows
equal results, which BLAS does up to the last bit; on a CPU with 1024 tokens or more, where
similarities are computed in blocks, equal tokens may come in either order.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

import torch
from torch import Tensor

from vtc.core.errors import ArgumentError
from vtc.ops import ahead
from vtc.ops.batch import check_count, check_fits, check_shape, rows_at, times, together
from vtc.ops.similarity import unit_rows

PLAINLY: ContextVar[bool] = ContextVar("plainly", default=False)
"""Whether to compute only what the algorithms need, however slow: what `vtc.cost.selector_flops`
counts."""

_AHEAD_FROM = 1024
"""Number of tokens from which `vtc.ops.ahead` is faster on a CPU."""

_PAIRS_UP_TO = 4096
"""Limit of tokens whose pairs are all kept in memory: 64 MiB per image."""


def max_sum(features: Tensor, k: int, pivot: int | Tensor = 0) -> Tensor:
    """Greedy max-sum diversification (ToDRE v2, arXiv 2505.18757, eqs. 4-7, Algorithm 1).

    Starts from `pivot` and repeatedly adds the token whose cosines with all chosen tokens
    have the smallest sum.

    Args:
        features: (n, d) tokens, or (b, n, d) for b images; norms do not matter.
        k: how many tokens to choose per image, 1 <= k <= n.
        pivot: index of the first choice; a 0-d tensor avoids waiting for the device. For b images
            one for all, or (b,).

    Returns:
        (k,) or (b, k) indices in order of selection, the pivot first.

    Raises:
        ArgumentError: `k` or `pivot` out of range, features of another shape or not finite.
    """
    return _greedy(features, k, pivot, torch.add)


def farthest_first(features: Tensor, k: int, pivot: int | Tensor = 0) -> Tensor:
    """Greedy k-center, or farthest-first traversal (Gonzalez 1985), over cosine similarity.

    Starts from `pivot` and repeatedly adds the token whose largest cosine with a chosen
    token is smallest. In a metric such as sqrt(2 - 2 cos), every token then lies within
    twice the optimal covering radius of a chosen one; for 1 - cos, which is not a metric, the
    bound is four times.

    Args:
        features, k, pivot: as in `max_sum`.

    Returns:
        (k,) or (b, k) indices in order of selection, the pivot first.

    Raises:
        ArgumentError: as in `max_sum`.
    """
    return _greedy(features, k, pivot, torch.maximum)


def max_min(features: Tensor, k: int) -> Tensor:
    """Max-min diversity (DivPrune, arXiv 2503.02175, Algorithm 1): `farthest_first` from the
    `most_isolated` token.

    Args:
        features, k: as in `max_sum`.

    Returns:
        (k,) or (b, k) indices in order of selection.

    Raises:
        ArgumentError: `k` out of range, features of another shape or not finite.
    """
    check_shape("features", features, "n", "d")
    check_count("k", k, 1, features.shape[-2])
    if not _in_lockstep(features):
        return torch.stack([max_min(one, k) for one in features])
    rows = unit_rows(features.detach())
    if _many_on_cpu(rows):
        return ahead.farthest(rows, k, ahead.most_isolated(rows))
    if rows.shape[-2] > _PAIRS_UP_TO:
        return farthest_first(rows, k, most_isolated(rows))
    pairs = rows @ rows.mT
    pairs.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
    first = pairs.amax(-1).argmin(-1)
    # A chosen token is excluded, so that its similarity to itself is never read.
    return _greedy(rows, k, first, torch.maximum, pairs)


def most_isolated(features: Tensor, rows_at_once: int = 512) -> Tensor:
    """The token whose most similar other token is least similar to it, by cosine.

    Args:
        features: (n, d) tokens, n at least 1, or (b, n, d) for b images.
        rows_at_once: rows of an image's similarity matrix in memory at a time.

    Returns:
        0-d or (b,) index, ties to the lowest.

    Raises:
        ArgumentError: features of another shape or not finite.
    """
    rows = unit_rows(features.detach())
    nearest = []
    for start in range(0, rows.shape[-2], rows_at_once):
        block = rows[..., start : start + rows_at_once, :] @ rows.mT
        block.diagonal(start, -2, -1).fill_(-torch.inf)  # itself
        nearest.append(block.amax(-1))
    return torch.cat(nearest, -1).argmin(-1)


def _all_pairs(n: int, k: int) -> bool:
    """Whether all n x n similarities are cheaper than k rows of them (`vtc.eval.bench.ops`).

    Measured with 576 to 2880 tokens of width 1024 and 4096, the two break even between an eighth
    (features do not fit the cache, busy memory) and a quarter (features fit it).
    """
    return 6 * k >= n and n <= _PAIRS_UP_TO and not PLAINLY.get()


def _many_on_cpu(rows: Tensor) -> bool:
    """Whether to use `vtc.ops.ahead`. With few tokens there is little to gain, and only the other
    algorithms break ties of exact duplicates by the lowest index."""
    many = rows.device.type == "cpu" and rows.shape[-2] >= _AHEAD_FROM
    return many and not PLAINLY.get()


def _in_lockstep(features: Tensor) -> bool:
    """Whether one loop handles all images; always for one, (n, d)."""
    return features.ndim < 3 or (together(features) and not _many_on_cpu(features))


def _greedy(
    features: Tensor,
    k: int,
    pivot: int | Tensor,
    combine: Callable[[Tensor, Tensor], Tensor],
    pairs: Tensor | None = None,
) -> Tensor:
    check_shape("features", features, "n", "d")
    *images, n, _ = features.shape
    check_count("k", k, 1, n)
    if isinstance(pivot, int) and not 0 <= pivot < n:
        raise ArgumentError("pivot", f"expected an index from 0 to {n - 1}, got {pivot}")
    if isinstance(pivot, Tensor) and pivot.numel() > 1:
        check_fits("pivot", pivot, tuple(images))
    if pairs is None and not _in_lockstep(features):
        pivots = torch.as_tensor(pivot).expand(images).tolist()
        each = zip(features, pivots, strict=True)
        return torch.stack([_greedy(one, k, first, combine) for one, first in each])
    rows = unit_rows(features.detach())  # indices have no gradient
    if pairs is None and _many_on_cpu(rows) and not (2 * k > n and _all_pairs(n, k)):
        choose = ahead.smallest_sum if combine is torch.add else ahead.farthest
        return choose(rows, k, int(pivot))
    index = torch.empty(*images, 1, dtype=torch.long, device=rows.device)
    index[..., 0] = pivot
    if pairs is None and _all_pairs(n, k):
        pairs = rows @ rows.mT

    def similar_to(index: Tensor) -> Tensor:
        row = rows_at(rows if pairs is None else pairs, index).squeeze(-2)
        return times(rows, row) if pairs is None else row

    chosen = [index]
    running = similar_to(index).scatter_(-1, index, torch.inf)
    for _ in range(1, k):
        # argmin returns the first of several minima, which is the tie rule. Indexing with a
        # vector of one element, not a scalar, keeps the index on the device.
        index = running.argmin(-1, keepdim=True)
        chosen.append(index)
        # Infinity stays infinity under + and max, so a chosen token never returns.
        running = combine(running, similar_to(index)).scatter_(-1, index, torch.inf)
    return torch.cat(chosen, -1)
