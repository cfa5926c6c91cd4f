# SPDX-License-Identifier: Apache-2.0
"""The losses of ATP, of the tokens that are left after each cut.

L = L_ntp + lambda_atp * L_atp + lambda_target * L_target (eq. 14), where L_atp (eq. 12) is the sum
over cuts of the share of tokens left after a cut times the cut's layer, and L_target (eq. 13) the
distance of the average count to its target. The average is over **all** decoder layers, as in the
paper's tables.
"""

from __future__ import annotations

import torch
from torch import Tensor


def atp_loss(counts: Tensor, totals: Tensor, layers: tuple[int, ...]) -> Tensor:
    """Eq. 12, mean over images: the share of tokens left after each cut times the cut's layer,
    counted from 1 (the layer after which it comes).

    Args:
        counts: (images, cuts). totals: (images,). layers: 0-based layers before which cuts are.
    """
    weights = torch.tensor(layers, device=counts.device, dtype=counts.dtype)
    return ((counts / totals[:, None]) * weights).sum(1).mean()


def average_count(
    counts: Tensor, totals: Tensor, layers: tuple[int, ...], num_layers: int
) -> Tensor:
    """(images,) vision tokens averaged over all decoder layers."""
    ends = [*layers[1:], num_layers]
    lengths = torch.tensor(
        [end - start for start, end in zip(layers, ends, strict=True)],
        device=counts.device,
        dtype=counts.dtype,
    )
    return (totals * layers[0] + (counts * lengths).sum(1)) / num_layers


def target_loss(
    average: Tensor, target: float, over: str = "image", past: float | None = None, share: float = 0
) -> Tensor:
    """Eq. 13: the distance of the average count to its target, in tokens.

    Args:
        average: (images,).
        over: of each "image", then averaged, or of the "batch" average.
        past: with "batch", the average of the batches before, which counts `share`.
    """
    if over == "image":
        return (average - target).abs().mean()
    mean = average.mean()
    if past is not None:
        # The value is that of the running average, the gradient that of this batch.
        running = share * past + (1 - share) * mean.detach()
        mean = running + mean - mean.detach()
    return (mean - target).abs()
