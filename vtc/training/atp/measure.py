# SPDX-License-Identifier: Apache-2.0
"""What trained heads of ATP are worth: right answers beside those of Random at as many tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vtc.methods import Random
from vtc.methods.atp import ATP, load_heads
from vtc.patching import patch


@dataclass(frozen=True)
class Measured:
    """Right answers, one entry a question on one image each.

    Attributes:
        target: tokens that the heads were trained for.
        per_image: tokens of each image by decoder layer, with the heads.
        full: of the model as it is.
        mine: with the heads.
        drawn: of Random with as many tokens on average, by seed.
    """

    target: float
    per_image: list[Any]
    full: list[bool]
    mine: list[bool]
    drawn: list[list[bool]]


def measure(
    model: nn.Module, folder: str | Path, judge: Callable[[], list[bool]], seeds: int = 3
) -> Measured:
    """Prune hard, through `vtc.patch`.

    Args:
        model: that the heads in `folder` were trained for; patched in turn and left as it was.
        judge: asks `model` questions on one image each, and says which answers are right.
        seeds: how often Random is run.
    """
    full = judge()
    with patch(model, ATP.from_pretrained(folder)) as patched:
        mine = judge()
        per_image = [image.per_layer for image in patched.report.images]
    mean = sum(sum(counts) / len(counts) for counts in per_image) / len(full)
    drawn = []
    for seed in range(seeds):
        with patch(model, Random(keep=round(mean), seed=seed)):
            drawn.append(judge())
    target = load_heads(str(folder))[1]["target"]
    return Measured(target, per_image, full, mine, drawn)
