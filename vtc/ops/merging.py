# SPDX-License-Identifier: Apache-2.0
"""Merging dropped tokens into the most similar kept ones."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops.batch import check_fits, check_shape, rows_at, together
from vtc.ops.similarity import unit_rows


def merge_into_nearest(
    contents: Tensor, metric: Tensor, kept: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Weighted means of each kept token and the dropped tokens most similar to it.

    Args:
        contents: (n, d) values to average, or (b, n, d) for b images, likewise for the others.
        metric: (n, d_m) rows whose cosines assign dropped tokens; ties go to the first kept token.
        kept: (k,) indices of the tokens that stay, k at least 1.
        weights: (n,) non-negative weights; all equal if `None`. A group whose weights are all 0
            is averaged evenly.

    Returns:
        (k, d) or (b, k, d) means in the order of `kept` and the dtype of `contents`.

    Raises:
        ArgumentError: mismatched shapes, or a metric that is not finite.
    """
    check_shape("contents", contents, "n", "d")
    images, n = contents.shape[:-2], contents.shape[-2]
    check_shape("metric", metric, "n", "d_m")
    check_fits("metric", metric, (*images, n, metric.shape[-1]))
    check_shape("kept", kept, "k")
    k = kept.shape[-1]
    check_fits("kept", kept, (*images, k))
    check_fits("weights", weights, (*images, n))
    if not together(contents):
        shares = [None] * len(contents) if weights is None else weights
        each = zip(contents, metric, kept, shares, strict=True)
        return torch.stack([merge_into_nearest(*one) for one in each])
    rows = unit_rows(metric)
    group = (rows @ rows_at(rows, kept).mT).argmax(-1)
    group.scatter_(-1, kept, torch.arange(k, device=kept.device).expand_as(kept))
    wide = rows.new_ones(*images, n, 1) if weights is None else weights.to(rows.dtype)[..., None]
    wide = torch.where(rows_at(sums(wide, group, k), group) > 0, wide, torch.ones_like(wide))
    summed = sums(contents.to(rows.dtype) * wide, group, k)
    return (summed / sums(wide, group, k)).to(contents.dtype)


def sums(values: Tensor, group: Tensor, k: int) -> Tensor:
    """(..., k, d) sums of the (..., n, d) rows of each group."""
    if values.device.type != "cpu":
        return _product_sums(values, group, k)
    if values.ndim > 2:
        return torch.stack([sums(*one, k) for one in zip(values, group, strict=True)])
    return values.new_zeros(k, values.shape[1]).index_add_(0, group, values)


def _product_sums(values: Tensor, group: Tensor, k: int) -> Tensor:
    """The same by a matrix product, as the order of scattered additions is not fixed on a GPU."""
    return torch.nn.functional.one_hot(group, k).mT.to(values.dtype) @ values
