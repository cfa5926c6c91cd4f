# SPDX-License-Identifier: Apache-2.0
"""Trained heads of ATP, shifted until hard pruning meets the target."""

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
    """Shift all theta_r alike until hard pruning meets the target, and write the heads anew.

    The soft count is not the hard one. One number, added to the logit of every theta_r, is found by
    bisection on data that were not trained on; what images get relative to each other is
    kept as it was learnt.

    Returns:
        The average count, over layers and images, that was reached.

    Raises:
        RuntimeError: no shift brings it within a tenth of the target; nothing is written then.
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
            "what is kept for its place alone may be more, or the heads need more training"
        )
    for bias, first in zip(biases, start, strict=True):
        bias.copy_(first + best[1])
    save_heads(
        heads,
        folder,
        {k: v for k, v in settings.items() if k not in ("method", "cuts", "width")},
    )
    return best[2]
