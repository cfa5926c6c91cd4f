# SPDX-License-Identifier: Apache-2.0
"""Cosine geometry shared by methods that compare tokens with one another."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops.batch import check_shape


def unit_rows(features: Tensor) -> Tensor:
    """Scale each row to length 1, so that inner products are cosines.

    Half precisions are raised to fp32, because sums over hundreds of tokens drift in them; fp64
    stays fp64. An all-zero row stays zero: its cosine with anything is 0.

    Args:
        features: (n, d) tokens, or (b, n, d) of b images.

    Returns:
        Rows of length 1 in the same shape, fp32 or fp64.

    Raises:
        ValueError: another shape, or values that are not finite (a comparison with NaN would
            silently choose a wrong token).
    """
    check_shape("features", features, "n", "d")
    wide = features if features.dtype == torch.float64 else features.float()
    # The sum is finite if all values are, but for overflow; looking at it is far cheaper.
    if not torch.isfinite(wide.sum()) and not torch.isfinite(wide).all():
        raise ValueError("features: expected finite values, got NaN or infinity")
    lengths = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(1e-12)
    if wide is features or wide.requires_grad:
        return wide / lengths
    # A copy is scaled where it lies: fresh memory costs more than the division.
    return wide.div_(lengths)
