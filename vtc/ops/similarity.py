# SPDX-License-Identifier: Apache-2.0
"""Cosine geometry shared by methods that compare tokens with one another."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.core.errors import ArgumentError
from vtc.ops.batch import check_shape


def unit_rows(features: Tensor) -> Tensor:
    """Scale each row to norm 1, so that inner products are cosines.

    Half precisions become fp32, as sums over hundreds of tokens drift in them; fp64
    stays fp64. An all-zero row stays zero: its cosine with anything is 0.

    Args:
        features: (n, d) tokens, or (b, n, d) for b images.

    Returns:
        Rows of norm 1 in the same shape, fp32 or fp64.

    Raises:
        ArgumentError: another shape, or values that are not finite (comparing with NaN would
            silently choose a wrong token).
    """
    check_shape("features", features, "n", "d")
    wide = features if features.dtype == torch.float64 else features.float()
    # A finite sum means finite values, and checking it first is far cheaper; it may overflow.
    if not torch.isfinite(wide.sum()) and not torch.isfinite(wide).all():
        raise ArgumentError("features", "expected finite values, got NaN or infinity")
    lengths = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(1e-12)
    if wide is features or wide.requires_grad:
        return wide / lengths
    # The copy is scaled in place: allocating memory costs more than the division.
    return wide.div_(lengths)
