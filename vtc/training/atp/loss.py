# SPDX-License-Identifier: Apache-2.0
"""The losses of ATP-LLaVA, from the tokens left after each cut.

L = L_ntp + lambda_atp * L_atp + lambda_target * L_target (eq. 14). L_atp (eq. 12) sums over cuts
the fraction of tokens left times the cut's layer; L_target (eq. 13) is the distance of the average
count from its target. The average is over **all** decoder layers, as in the paper's tables.
"""

from __future__ import annotations

import torch
from torch import Tensor


def atp_loss(counts: Tensor, totals: Tensor, layers: tuple[int, ...]) -> Tensor:
    """Eq. 12, mean over images: the fraction of tokens left after each cut times the cut's layer,
    counted from 1 (the last layer before the cut).

    Args:
        counts: (images, cuts) tokens left after each cut.
        totals: (images,) tokens before any cut.
        layers: (cuts,) 0-based layers before which the cuts are.

    Returns:
        Scalar.
    """
    weights = torch.tensor(layers, device=counts.device, dtype=counts.dtype)
    return ((counts / totals[:, None]) * weights).sum(1).mean()


def average_count(
    counts: Tensor, totals: Tensor, layers: tuple[int, ...], num_layers: int
) -> Tensor:
    """Vision tokens of each image, averaged over all decoder layers.

    Args:
        counts, totals, layers: as in `atp_loss`.
        num_layers: number of decoder layers.

    Returns:
        (images,) tokens.
    """
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
    """Eq. 13: the distance of the average count from its target, in tokens.

    Args:
        average: (images,) counts.
        target: the target, in tokens.
        over: "image" averages the distances of the images; "batch" is that of the mean count.
        past: with "batch", the running average of earlier batches, or `None`.
        share: weight of `past` in the running average.

    Returns:
        Scalar.
    """
    if over == "image":
        return (average - target).abs().mean()
    mean = average.mean()
    if past is not None:
        # Value of the running average, gradient of this batch.
        running = share * past + (1 - share) * mean.detach()
        mean = running + mean - mean.detach()
    return (mean - target).abs()
