# SPDX-License-Identifier: Apache-2.0
"""Settings for training ATP."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vtc.core import check_choice
from vtc.core.settings import check_number, check_whole
from vtc.methods.atp import NORMALISE, Normalise


@dataclass(frozen=True)
class Config:
    """Settings for training ATP.

    Args:
        out: folder for `config.json` and `model.safetensors` of the heads, `log.json`, and
            `checkpoint.pt`, which only resuming needs.
        target: vision tokens of an image, averaged over all decoder layers.
        steps: number of updates.
        rate: peak learning rate of the heads; see `vtc.training.loop.Group`.
        lambda_atp, lambda_target: weights of the losses; re-implementations use 0.05 or 0.01, and
            0.2.
        target_over: average the count over each "image" (as in the paper) or over the "batch", so
            that images may differ.
        smoothing: with "batch", weight of earlier batches in the running average count, in [0, 1).
        temperature: temperature of the mask's sigmoids; re-implementations use 10 or 100.
        temperature_end: final temperature, approached geometrically; `None` for no change.
        normalise, sampling, layers: as in `vtc.methods.atp.ATP`.
        width: width of the heads' hidden layer.
        start_r, start_s: initial thresholds, in (0, 1); low ones keep nearly all tokens.
        standardise: initial batches that give the mean and deviation of the statistics.
        clip: maximum gradient norm.
        train_model: also train the decoder, at `model_rate`, and save the model to `out`/model.
        precision: of `accelerate.Accelerator`: "no" or "bf16"; there is no loss scaling for fp16.
        save_every: steps between checkpoints.
        seed: seed of the heads' initial weights.

    Raises:
        ValueError: a setting out of range.
    """

    out: str | Path
    target: float
    steps: int
    rate: float = 1e-4
    lambda_atp: float = 0.05
    lambda_target: float = 0.2
    target_over: Literal["image", "batch"] = "image"
    smoothing: float = 0.0
    temperature: float = 10.0
    temperature_end: float | None = None
    normalise: Normalise = "minmax"
    sampling: float = 3.0
    layers: tuple[int, ...] | None = None
    width: int = 64
    start_r: float = 0.02
    start_s: float = 0.5
    standardise: int = 4
    clip: float = 1.0
    train_model: bool = False
    model_rate: float = 2e-5
    precision: str = "no"
    save_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("target", "rate", "temperature", "sampling", "clip", "model_rate"):
            check_number(name, getattr(self, name), "(0, inf)")
        for name in ("steps", "width", "standardise", "save_every"):
            check_whole(name, getattr(self, name), lowest=1)
        for name in ("lambda_atp", "lambda_target"):
            check_number(name, getattr(self, name), "[0, inf)")
        for name in ("start_r", "start_s"):
            check_number(name, getattr(self, name), "(0, 1)")
        check_number("smoothing", self.smoothing, "[0, 1)")
        if self.temperature_end is not None:
            check_number("temperature_end", self.temperature_end, "(0, inf)")
        check_choice("target_over", self.target_over, ("image", "batch"))
        check_choice("normalise", self.normalise, NORMALISE)
        check_choice("precision", self.precision, ("no", "bf16"))

    @property
    def described(self) -> dict[str, Any]:
        """The settings that a checkpoint must match: all but `out` and `save_every`."""
        found = dataclasses.asdict(self)
        for name in ("out", "save_every"):
            del found[name]
        if found["layers"] is not None:
            found["layers"] = list(found["layers"])
        return found
