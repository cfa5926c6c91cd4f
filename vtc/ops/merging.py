# SPDX-License-Identifier: Apache-2.0
"""Merging tokens that go into the most similar ones that stay."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops.similarity import unit_rows


def merge_into_nearest(
    contents: Tensor, metric: Tensor, kept: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Weighted means of each kept token and those that are most similar to it.

    Args:
        contents: (n, d) what is averaged.
        metric: (n, d_m) rows whose cosines say who joins whom; ties to the first kept token.
        kept: (k,) indices of the tokens that stay, k at least 1.
        weights: (n,) weights, not negative; all equal if `None`. A group whose weights are all 0
            counts evenly.

    Returns:
        (k, d) in the order of `kept`, in the dtype of `contents`.
    """
    n, device = contents.shape[0], contents.device
    rows = unit_rows(metric)
    group = (rows @ rows[kept].T).argmax(1)
    group[kept] = torch.arange(len(kept), device=device)
    # A matrix product, not scattered additions, whose order is not fixed on a GPU.
    member = torch.nn.functional.one_hot(group, len(kept)).T.to(rows.dtype)
    wide = rows.new_ones(n) if weights is None else weights.to(rows.dtype)
    wide = torch.where((member @ wide)[group] > 0, wide, torch.ones_like(wide))
    shares = member * wide
    summed = shares @ contents.to(rows.dtype)
    return (summed / shares.sum(1, keepdim=True)).to(contents.dtype)
