# SPDX-License-Identifier: Apache-2.0
"""Trains the heads of ATP-LLaVA on any Llama-shaped LLaVA of transformers.

    python -m vtc.training.atp --model eval/embedded/weights --out runs/atp --steps 300 --target 288
    python -m vtc.training.atp --model eval/embedded/weights --out runs/atp --measure 320

`mask` applies soft masks to the model, `loss` has the losses, `trainer` combines both for
`vtc.training.loop`; `calibration` and `measure` follow training. By default the command trains on
the generated scenes of vtc's evaluation; `--data` names another module.
"""

from vtc.training.atp.calibration import calibrate
from vtc.training.atp.config import Config
from vtc.training.atp.loss import atp_loss, average_count, target_loss
from vtc.training.atp.mask import ImageMask, SoftPruning
from vtc.training.atp.trainer import new_heads, train
from vtc.training.loop import Batch, Batches

__all__ = [
    "Batch",
    "Batches",
    "Config",
    "ImageMask",
    "SoftPruning",
    "atp_loss",
    "average_count",
    "calibrate",
    "new_heads",
    "target_loss",
    "train",
]
