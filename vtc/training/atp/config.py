# SPDX-License-Identifier: Apache-2.0
"""Settings for training ATP."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vtc.core import check_choice
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
        positive = ("target", "rate", "temperature", "sampling", "clip", "model_rate")
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)!r}")
        for name in ("steps", "width", "standardise", "save_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
        for name in ("lambda_atp", "lambda_target"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)!r}")
        for name in ("start_r", "start_s"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(
                    f"{name}: expected a number in (0, 1), got {getattr(self, name)!r}"
                )
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing: expected a number in [0, 1), got {self.smoothing!r}")
        if self.temperature_end is not None and not 0 < self.temperature_end < math.inf:
            raise ValueError(
                f"temperature_end: expected a number above 0, got {self.temperature_end!r}"
            )
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
