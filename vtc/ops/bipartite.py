# SPDX-License-Identifier: Apache-2.0
"""Bipartite soft matching: merge the most similar pairs between two alternating sets."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.core.errors import ArgumentError
from vtc.ops.batch import check_shape
from vtc.ops.similarity import unit_rows


def bipartite_match(
    metric: Tensor, r: int, begins_with_a: bool = True, ranked: bool = False
) -> Tensor:
    """ToMe's matching (arXiv 2210.09461, section 3).

    Tokens are assigned alternately to two sets. Each token of A has one candidate, the token of B
    most similar by cosine; the r most similar pairs merge.

    Args:
        metric: (n, d) rows to compare tokens by, or (b, n, d) for b images.
        r: pairs to merge, from 0 to the size of A; 0 if B is empty.
        begins_with_a: whether the first token belongs to A.
        ranked: whether the tokens that A keeps are ordered by descending similarity to their
            candidates instead of in sequence order.

    Returns:
        (n,) or (b, n), for each token, the index of its token among the n - r after merging: first
        what A keeps, then B, in sequence order. Ties go to the first token, of A and of B.

    Raises:
        ArgumentError: `r` out of range, or a metric of another shape or not finite.
    """
    check_shape("metric", metric, "n", "d")
    rows = unit_rows(metric)
    *images, n, _ = rows.shape
    first, second = (0, 1) if begins_with_a else (1, 0)
    a, b = rows[..., first::2, :], rows[..., second::2, :]
    most = a.shape[-2] if b.shape[-2] else 0
    if not 0 <= r <= most:
        raise ArgumentError("r", f"expected 0 to {most} pairs of {n} tokens, got {r}")
    partner = torch.zeros(*images, a.shape[-2], dtype=torch.long, device=rows.device)
    merged = partner.bool()
    place = torch.arange(a.shape[-2], device=rows.device).expand_as(partner)
    if r:
        best, partner = (a @ b.mT).max(-1)
        order = best.argsort(descending=True, stable=True)
        merged.scatter_(-1, order[..., :r], True)
        place = order.argsort(-1) - r if ranked else (~merged).cumsum(-1) - 1
    rest = a.shape[-2] - r
    target = torch.empty(*images, n, dtype=torch.long, device=rows.device)
    target[..., first::2] = torch.where(merged, rest + partner, place)
    target[..., second::2] = torch.arange(rest, n - r, device=rows.device)
    return target
