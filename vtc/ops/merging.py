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
    wide = rows.new_ones(n, 1) if weights is None else weights.to(rows.dtype)[:, None]
    wide = torch.where(_sums(wide, group, len(kept))[group] > 0, wide, torch.ones_like(wide))
    summed = _sums(contents.to(rows.dtype) * wide, group, len(kept))
    return (summed / _sums(wide, group, len(kept))).to(contents.dtype)


def _sums(values: Tensor, group: Tensor, k: int) -> Tensor:
    """(k, d) sums of the (n, d) rows of each group."""
    if values.device.type == "cpu":
        return values.new_zeros(k, values.shape[1]).index_add_(0, group, values)
    return _product_sums(values, group, k)


def _product_sums(values: Tensor, group: Tensor, k: int) -> Tensor:
    """The same as a matrix product: the order of scattered additions is not fixed on a GPU."""
    return torch.nn.functional.one_hot(group, k).T.to(values.dtype) @ values
