# SPDX-License-Identifier: Apache-2.0
"""Ranking by score, the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops.batch import check_shape


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the k highest scores, ties to the lowest index.

    `torch.topk` leaves the order of ties open, and attention in half precision ties often. Here
    scores are compared in fp32 (fp64 if given so), and a stable sort decides wherever some tie.

    Args:
        scores: (n,) scores, or (b, n) of b images.
        k: how many, 0 <= k <= n.

    Returns:
        (k,) or (b, k) indices, the highest score first; sort them to put tokens back in sequence
        order.

    Raises:
        ValueError: `k` out of range, scores of another shape, or NaN, which has no rank.
    """
    check_shape("scores", scores, "n")
    n = scores.shape[-1]
    if not 0 <= k <= n:
        raise ValueError(f"k: expected a whole number from 0 to the {n} scores given, got {k}")
    wide = scores if scores.dtype == torch.float64 else scores.float()
    if torch.isnan(wide).any():
        raise ValueError("scores: NaN has no rank")
    if wide is scores and wide.device.type == "cpu" and k < n:
        # Without ties there is one order. Half precisions do tie, and a GPU would be waited for.
        best, indices = wide.topk(k + 1)
        if not (best[..., 1:] == best[..., :-1]).any():
            return indices[..., :k]
    return torch.sort(wide, descending=True, stable=True).indices[..., :k]
