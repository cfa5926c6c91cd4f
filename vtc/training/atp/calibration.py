# SPDX-License-Identifier: Apache-2.0
"""Calibrates trained ATP heads: shifts their thresholds until hard pruning meets the target."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vtc.methods.atp import ATPHeads, atp_layers, load_heads, save_heads
from vtc.models import find
from vtc.training.atp.loss import average_count
from vtc.training.atp.mask import SoftPruning
from vtc.training.loop import Batch


@torch.no_grad()
def calibrate(
    model: nn.Module, folder: str | Path, batches: Iterable[Batch], target: float, rounds: int = 10
) -> float:
    """Shift all theta_r equally until hard pruning meets the target, and save the heads.

    The soft count differs from the hard one. Bisection on held-out data finds one offset for the
    logits of all theta_r, which preserves the learnt differences between images.

    Args:
        model: the model that the heads were trained for.
        folder: folder of the heads, as for `ATP.from_pretrained`; overwritten.
        batches: held-out batches.
        target: vision tokens of an image, averaged over the decoder layers.
        rounds: steps of the bisection, from offsets of -2 and 2.

    Returns:
        The count reached, averaged over layers and images.

    Raises:
        RuntimeError: no offset comes within a tenth of the target; nothing is written.
    """
    shared, settings = load_heads(str(folder))
    device = next(model.parameters()).device
    heads = ATPHeads(shared.cuts, shared.width).to(device)
    heads.load_state_dict(shared.state_dict())
    layers = atp_layers(tuple(settings["layers"]), len(find(model).layers))
    biases: list[Any] = [head.bias for head in heads.head_r]
    start = [bias.clone() for bias in biases]
    held = [{name: t.to(device) for name, t in batch.items()} for batch in batches]
    soft = SoftPruning(model, heads, layers, settings["normalise"], settings["sampling"], hard=True)

    def reached(shift: float) -> float:
        for bias, first in zip(biases, start, strict=True):
            bias.copy_(first + shift)
        averages = []
        for batch in held:
            soft.begin(batch)
            model(**batch, use_cache=False)
            averages.append(average_count(soft.counts, soft.totals, layers, soft.num_layers))
        return float(torch.cat(averages).mean())

    low, high, best = -2.0, 2.0, (math.inf, 0.0, 0.0)
    with soft:
        for _ in range(rounds):
            middle = (low + high) / 2
            count = reached(middle)
            best = min(best, (abs(count - target), middle, count))
            low, high = (middle, high) if count > target else (low, middle)
    if best[0] > 0.1 * target:
        raise RuntimeError(
            f"target: no shift of theta_r reaches {target:g} tokens, the nearest is {best[2]:.1f}; "
            "spatial scores alone may keep more tokens, or the heads need more training"
        )
    for bias, first in zip(biases, start, strict=True):
        bias.copy_(first + best[1])
    save_heads(
        heads,
        folder,
        {k: v for k, v in settings.items() if k not in ("method", "cuts", "width")},
    )
    return best[2]
