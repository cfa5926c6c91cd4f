# SPDX-License-Identifier: Apache-2.0
"""Greedy choice of a set with a large determinant: relevant tokens that differ."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops.coverage import EQUAL

_LEAST = 1e-6
"""What is left of a token that others span already; more would be rounding."""


def dpp_greedy(kernel: Tensor, k: int) -> Tensor:
    """Greedy MAP of a determinantal point process (Chen et al., 2018).

    Adds, again and again, the token that most enlarges the determinant of the kernel of those
    chosen, by one step of a Cholesky factorisation each. Once the kernel's rank is used up, what
    is left are ties, which go to the lowest index; no token is chosen twice.

    Args:
        kernel: (n, n) symmetric, positive semi-definite.
        k: how many of the n to choose, 0 <= k <= n.

    Returns:
        (k,) indices in order of choice; ties, up to `EQUAL`, to the lowest index.

    Raises:
        ValueError: `k` out of range, or a kernel that is not square.
    """
    if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1]:
        raise ValueError(f"kernel: expected shape (n, n), got {tuple(kernel.shape)}")
    n = kernel.shape[0]
    if not 0 <= k <= n:
        raise ValueError(f"k: expected a whole number from 0 to the {n} tokens given, got {k}")
    wide = kernel if kernel.dtype == torch.float64 else kernel.float()
    left = wide.diagonal().clone()
    least = _LEAST * left.amax().clamp_min(torch.finfo(wide.dtype).tiny) if n else left.sum()
    columns = wide.new_zeros(n, k)
    chosen = torch.empty(k, dtype=torch.long, device=kernel.device)
    for step in range(k):
        left = left.clamp_min(least)
        left[chosen[:step]] = -torch.inf
        # Not argmax: without relevance all tokens begin equal, up to rounding.
        best = left.amax(0, keepdim=True)
        index = (left >= (1 - EQUAL) * best).to(torch.uint8).argmax(0, keepdim=True)
        chosen[step : step + 1] = index
        spanned = columns[:, :step] @ columns.index_select(0, index)[0, :step]
        root = left.index_select(0, index).sqrt()
        columns[:, step] = (wide.index_select(0, index)[0] - spanned) / root
        left = left - columns[:, step] ** 2
    return chosen
