# SPDX-License-Identifier: Apache-2.0
"""Trains the heads of ATP-LLaVA on any Llama-shaped LLaVA of transformers.

    python -m vtc.training.atp --model eval/embedded/weights --out runs/atp --steps 300 --target 288
    python -m vtc.training.atp --model eval/embedded/weights --out runs/atp --measure 320

`mask` is the model's side, `loss` what is learnt, `trainer` both as `vtc.training.loop` takes them;
`calibration` and `measure` come after. The command line's data are the generated scenes of vtc's
evaluation, or those of the module that `--data` names.
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
