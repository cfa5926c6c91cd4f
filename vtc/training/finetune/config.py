# SPDX-License-Identifier: Apache-2.0
"""Settings for fine-tuning."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtc.core import check_choice
from vtc.core.errors import ArgumentError
from vtc.core.settings import check_flag, check_number, check_whole


@dataclass(frozen=True)
class Config:
    """Settings for fine-tuning.

    Args:
        out: folder for what `vtc.training.finetune.load` reads, `log.jsonl`, and `checkpoint.pt`,
            which only resuming needs.
        tune: what is tuned: "projector"; "decoder", the language model with its head; "full", all
            of the model; "lora", adapters of peft on the linear layers of the decoder; or a
            regular expression that is searched in the names of parameters.
        steps: number of updates; `None` for as many as `minutes` allow.
        minutes: of training; `None` for no limit. Needed without `steps`.
        rate: peak learning rate, with warm-up over the first 5 % of the run and cosine decay to a
            tenth.
        accumulate: batches per update; the loss is the mean over the labels of all of them.
        clip: maximum gradient norm.
        label_smoothing: probability given to all tokens alike, in [0, 1).
        lora_rank, lora_alpha, lora_dropout: of the adapters.
        gradient_checkpointing: recompute activations in the backward pass.
        precision: of `accelerate.Accelerator`: "no", or "bf16" for autocast. What is tuned is kept
            in float32 with it.
        save_every: steps between checkpoints.
        seed: seed of the adapters' initial weights and of dropout.

    Raises:
        ArgumentError, ArgumentTypeError: a setting out of range, or neither `steps` nor `minutes`.
    """

    out: str | Path
    tune: str = "projector"
    steps: int | None = None
    minutes: float | None = None
    rate: float = 2e-4
    accumulate: int = 1
    clip: float = 1.0
    label_smoothing: float = 0.0
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    gradient_checkpointing: bool = False
    precision: str = "no"
    save_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ArgumentError("steps", "expected steps, minutes or both, got neither")
        if not isinstance(self.tune, str) or not self.tune:
            raise ArgumentError(
                "tune",
                "expected 'projector', 'decoder', 'full', 'lora' or a regular expression of "
                f"parameters' names, got {self.tune!r}",
            )
        for name in ("accumulate", "lora_rank", "save_every"):
            check_whole(name, getattr(self, name), lowest=1)
        if self.steps is not None:
            check_whole("steps", self.steps, lowest=1)
        if self.minutes is not None:
            check_number("minutes", self.minutes, "(0, inf)")
        for name in ("rate", "clip", "lora_alpha"):
            check_number(name, getattr(self, name), "(0, inf)")
        for name in ("label_smoothing", "lora_dropout"):
            check_number(name, getattr(self, name), "[0, 1)")
        check_whole("seed", self.seed)
        check_flag("gradient_checkpointing", self.gradient_checkpointing)
        check_choice("precision", self.precision, ("no", "bf16"))

    @property
    def described(self) -> dict[str, Any]:
        """The settings that a checkpoint must match: all but `out` and `save_every`."""
        found = dataclasses.asdict(self)
        for name in ("out", "save_every"):
            del found[name]
        return found
