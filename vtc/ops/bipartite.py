# SPDX-License-Identifier: Apache-2.0
"""Bipartite soft matching: merge the most similar pairs between every other token and the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops.similarity import unit_rows


def bipartite_match(metric: Tensor, r: int, begins_with_a: bool = True) -> Tensor:
    """ToMe's matching (arXiv 2210.09461, section 3).

    Tokens are dealt out alternately to two sets. Each of A has one candidate, the token of B that
    is most similar by cosine; the r most similar pairs merge.

    Args:
        metric: (n, d) what tokens are compared by.
        r: pairs to merge, from 0 to the size of A; of B there must be one if r is above 0.
        begins_with_a: whether the first token belongs to A.

    Returns:
        (n,) for each token, which of the n - r after merging it belongs to: first what A keeps,
        then B, both in the order they came. Ties go to the first token, of A and of B.

    Raises:
        ValueError: `r` out of range, or a metric that is no matrix or not finite.
    """
    rows = unit_rows(metric)
    n, device = rows.shape[0], rows.device
    in_a = torch.arange(n, device=device) % 2 == int(not begins_with_a)
    a, b = in_a.nonzero().squeeze(1), (~in_a).nonzero().squeeze(1)
    most = len(a) if len(b) else 0
    if not 0 <= r <= most:
        raise ValueError(f"r: expected 0 to {most} pairs of {n} tokens, got {r}")
    merged = torch.zeros_like(a, dtype=torch.bool)
    partner = torch.zeros_like(a)
    if r:
        best, partner = (rows[a] @ rows[b].T).max(1)
        merged[best.argsort(descending=True, stable=True)[:r]] = True
    target = torch.empty(n, dtype=torch.long, device=device)
    rest = a[~merged]
    target[rest] = torch.arange(len(rest), device=device)
    target[b] = len(rest) + torch.arange(len(b), device=device)
    target[a[merged]] = len(rest) + partner[merged]
    return target
