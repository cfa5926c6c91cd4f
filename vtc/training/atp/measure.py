# SPDX-License-Identifier: Apache-2.0
"""Evaluates trained ATP heads: right answers, compared with Random at equally many tokens."""

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
    """Which answers are right, one entry per question, each on one image.

    Attributes:
        target: average tokens that the heads were trained for.
        per_image: tokens of each image by decoder layer, with the heads.
        full: of the unpatched model.
        mine: with the heads.
        drawn: of Random with equally many tokens on average, by seed.
    """

    target: float
    per_image: list[Any]
    full: list[bool]
    mine: list[bool]
    drawn: list[list[bool]]


def measure(
    model: nn.Module, folder: str | Path, judge: Callable[[], list[bool]], seeds: int = 3
) -> Measured:
    """Evaluate with hard pruning, through `vtc.patch`.

    Args:
        model: the model that the heads were trained for; unpatched before and after.
        folder: folder of the heads.
        judge: asks `model` questions, each on one image, and returns which answers are right.
        seeds: number of runs of Random.

    Returns:
        Right answers and token counts.
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
