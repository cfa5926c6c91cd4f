# SPDX-License-Identifier: Apache-2.0
"""Greedy choice of k tokens that differ from one another, by cosine similarity.

Both functions keep one running value per token and update it with the similarities to the token
just chosen: O(n k d) time and O(n d) memory. Where a sixth of the tokens or more are chosen, one
product of all pairs, read row by row, is faster than k products that each read all features again,
and is made instead (`_all_pairs`). Nothing leaves the device inside the loop. For many tokens on a
CPU, most similarities are never made, image by image (`vtc.ops.ahead`). The order of choice is
returned, so the first j of k choices are, up to rounding, the choice of j; sort them to put tokens
back in sequence order.

Ties go to the lowest index. Equal tokens tie only as far as the matrix product gives equal rows
equal results, which BLAS does up to the last bit; on a CPU from 1024 tokens on, where similarities
are made in blocks, equal tokens may come in either order.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

import torch
from torch import Tensor

from vtc.ops import ahead
from vtc.ops.batch import check_fits, check_shape, rows_at, times, together
from vtc.ops.similarity import unit_rows

PLAINLY: ContextVar[bool] = ContextVar("plainly", default=False)
"""Whether to compare what the algorithms compare and nothing beyond, however long it takes: what
`vtc.cost.selector_flops` counts."""

_AHEAD_FROM = 1024
"""Tokens from which on `vtc.ops.ahead` is faster on a CPU."""

_PAIRS_UP_TO = 4096
"""Tokens of which all pairs are kept in memory: 64 MiB an image."""


def max_sum(features: Tensor, k: int, pivot: int | Tensor = 0) -> Tensor:
    """Greedy max-sum diversification (ToDRE v2, arXiv 2505.18757, eqs. 4-7, Algorithm 1).

    Starts from `pivot` and adds, again and again, the token whose cosines with all tokens chosen
    so far have the smallest sum.

    Args:
        features: (n, d) tokens, or (b, n, d) of b images; the length of a row does not matter.
        k: how many tokens to choose of each image, 1 <= k <= n.
        pivot: index of the first choice; a 0-d tensor avoids waiting for the device. For b images
            one for all, or (b,).

    Returns:
        (k,) or (b, k) indices in order of choice, the pivot first.

    Raises:
        ValueError: `k` or `pivot` out of range, features of another shape or not finite.
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
    check_shape("features", features, "n", "d")
    _check_k(k, features.shape[-2])
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
    # A chosen token is out of the running, so that its similarity to itself is never looked at.
    return _greedy(rows, k, first, torch.maximum, pairs)


def most_isolated(features: Tensor, rows_at_once: int = 512) -> Tensor:
    """The token whose most similar other token is least similar to it, by cosine.

    Args:
        features: (n, d) tokens, n at least 1, or (b, n, d) of b images.
        rows_at_once: rows of an image's similarity matrix that are held at a time.

    Returns:
        0-d or (b,) index, ties to the lowest.

    Raises:
        ValueError: features of another shape or not finite.
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

    Measured at 576 to 2880 tokens of width 1024 and 4096, the two break even between an eighth
    (features that leave the cache, a busy memory) and a quarter (features that stay in it).
    """
    return 6 * k >= n and n <= _PAIRS_UP_TO and not PLAINLY.get()


def _many_on_cpu(rows: Tensor) -> bool:
    """Whether `vtc.ops.ahead` is for these rows. With few tokens there is little to
    gain, and exact duplicates tie to the lowest index in the other ways only."""
    many = rows.device.type == "cpu" and rows.shape[-2] >= _AHEAD_FROM
    return many and not PLAINLY.get()


def _in_lockstep(features: Tensor) -> bool:
    """Whether one loop is for all images; of one, (n, d), it is."""
    return features.ndim < 3 or (together(features) and not _many_on_cpu(features))


def _check_k(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k: expected a whole number from 1 to the {n} tokens given, got {k}")


def _greedy(
    features: Tensor,
    k: int,
    pivot: int | Tensor,
    combine: Callable[[Tensor, Tensor], Tensor],
    pairs: Tensor | None = None,
) -> Tensor:
    check_shape("features", features, "n", "d")
    *images, n, _ = features.shape
    _check_k(k, n)
    if isinstance(pivot, int) and not 0 <= pivot < n:
        raise ValueError(f"pivot: expected an index from 0 to {n - 1}, got {pivot}")
    if isinstance(pivot, Tensor) and pivot.numel() > 1:
        check_fits("pivot", pivot, tuple(images))
    if pairs is None and not _in_lockstep(features):
        pivots = torch.as_tensor(pivot).expand(images).tolist()
        each = zip(features, pivots, strict=True)
        return torch.stack([_greedy(one, k, first, combine) for one, first in each])
    rows = unit_rows(features.detach())  # an index has no gradient
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
        # vector of one, not with a scalar, is what keeps the index on the device.
        index = running.argmin(-1, keepdim=True)
        chosen.append(index)
        # Infinity stays infinity under + and max, so a chosen token never returns.
        running = combine(running, similar_to(index)).scatter_(-1, index, torch.inf)
    return torch.cat(chosen, -1)
