# SPDX-License-Identifier: Apache-2.0
"""Ranking by score, the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.core.errors import ArgumentError
from vtc.ops.batch import check_count, check_shape


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the k highest scores, ties to the lowest index.

    `torch.topk` does not define the order of ties, and attention in half precision ties often. Here
    scores are compared in fp32 (fp64 stays fp64), and a stable sort breaks ties.

    Args:
        scores: (n,) scores, or (b, n) for b images.
        k: how many, 0 <= k <= n.

    Returns:
        (k,) or (b, k) indices by descending score; sort them for sequence order.

    Raises:
        ArgumentError: `k` out of range, scores of another shape, or NaN.
    """
    check_shape("scores", scores, "n")
    n = scores.shape[-1]
    check_count("k", k, 0, n, "scores")
    wide = scores if scores.dtype == torch.float64 else scores.float()
    if torch.isnan(wide).any():
        raise ArgumentError("scores", "NaN has no rank")
    if wide is scores and wide.device.type == "cpu" and k < n:
        # Without ties the order is unique. Half precisions do tie, and a GPU would have to sync.
        best, indices = wide.topk(k + 1)
        if not (best[..., 1:] == best[..., :-1]).any():
            return indices[..., :k]
    return torch.sort(wide, descending=True, stable=True).indices[..., :k]
