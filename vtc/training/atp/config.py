# SPDX-License-Identifier: Apache-2.0
"""The settings of a training of ATP."""

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
    """How to train.

    Args:
        out: folder for `config.json` and `model.safetensors` of the heads, `log.json`, and
            `checkpoint.pt`, which only resuming needs.
        target: vision tokens of an image, averaged over all decoder layers.
        steps: updates in all.
        rate: learning rate of the heads, warmed up over the first 5 % and then down to a tenth.
        lambda_atp, lambda_target: weights of the losses. The re-implementations have 0.05 or 0.01,
            and 0.2.
        target_over: whether the average count is that of each "image" (as the paper writes) or of
            the "batch", which lets one image have what another saves.
        smoothing: in [0, 1); with "batch", the share of the batches before in the average count.
        temperature: of the mask's sigmoids, 10 or 100 in the re-implementations.
        temperature_end: approached geometrically over the steps; `None` for no change.
        normalise, sampling, layers: as in `vtc.methods.atp.ATP`.
        width: of the heads' hidden layer.
        start_r, start_s: thresholds at the start; low ones keep nearly all.
        standardise: batches from which the scale of the statistics is taken first.
        clip: largest norm of the gradient.
        train_model: train the decoder too, at `model_rate`, and save the model in `out`/model.
        precision: of `accelerate.Accelerator`: "no" or "bf16"; losses are not scaled for fp16.
        save_every: steps between checkpoints.
        seed: of the heads' first weights.
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
        """What a checkpoint must have been made with: all but where and how often to save."""
        found = dataclasses.asdict(self)
        for name in ("out", "save_every"):
            del found[name]
        if found["layers"] is not None:
            found["layers"] = list(found["layers"])
        return found
