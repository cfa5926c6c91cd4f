# SPDX-License-Identifier: Apache-2.0
"""Greedy choice of a set with a large determinant: relevant tokens that differ."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops.batch import check_fits, check_shape, rows_at, times, together
from vtc.ops.coverage import EQUAL

_LEAST = 1e-6
"""What is left of a token that others span already; more would be rounding."""

_TOGETHER_UP_TO = 2**21
"""Numbers of kernels that a CPU works on in lockstep; each step reads one row of each."""


def dpp_greedy(kernel: Tensor, k: int) -> Tensor:
    """Greedy MAP of a determinantal point process (Chen et al., 2018).

    Adds, again and again, the token that most enlarges the determinant of the kernel of those
    chosen, by one step of a Cholesky factorisation each. Once the kernel's rank is used up, what
    is left are ties, which go to the lowest index; no token is chosen twice.

    Args:
        kernel: (n, n) symmetric, positive semi-definite, or (b, n, n) of b images.
        k: how many of the n to choose, 0 <= k <= n.

    Returns:
        (k,) or (b, k) indices in order of choice; ties, up to `EQUAL`, to the lowest index.

    Raises:
        ValueError: `k` out of range, or a kernel that is not square.
    """
    check_shape("kernel", kernel, "n", "n")
    n = kernel.shape[-1]
    check_fits("kernel", kernel, (*kernel.shape[:-2], n, n))
    if not 0 <= k <= n:
        raise ValueError(f"k: expected a whole number from 0 to the {n} tokens given, got {k}")
    if not together(kernel, _TOGETHER_UP_TO):
        return torch.stack([dpp_greedy(one, k) for one in kernel])
    wide = kernel if kernel.dtype == torch.float64 else kernel.float()
    left = wide.diagonal(dim1=-2, dim2=-1).clone()
    chosen = torch.empty(*left.shape[:-1], k, dtype=torch.long, device=kernel.device)
    if not k:
        return chosen
    least = _LEAST * left.amax(-1, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)
    columns = wide.new_zeros(*left.shape, k)
    for step in range(k):
        left = left.clamp_min(least)
        left.scatter_(-1, chosen[..., :step], -torch.inf)
        # Not argmax: without relevance all tokens begin equal, up to rounding.
        best = left.amax(-1, keepdim=True)
        index = (left >= (1 - EQUAL) * best).to(torch.uint8).argmax(-1, keepdim=True)
        chosen[..., step : step + 1] = index
        before = columns[..., :step]
        spanned = times(before, rows_at(before, index).squeeze(-2))
        added = (rows_at(wide, index).squeeze(-2) - spanned) / left.gather(-1, index).sqrt()
        columns[..., step] = added
        left = left - added**2
    return chosen
