# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a vision-language model while a method compresses its vision tokens.

    python -m vtc.training.finetune MODEL --data train.jsonl --method divprune --keep 0.1 \\
        --tune projector --minutes 5 --out runs/projector

`finetune` does so in Python, `load` loads what it saved. `parts` says what is tuned,
`conversations` makes batches of a file of questions on pictures, and `trainer` combines both for
`vtc.training.loop`. `vtc/training/README.md` is the guide, with a plain loop and transformers'
Trainer as well.
"""

from vtc.training.finetune.config import Config
from vtc.training.finetune.conversations import Conversations
from vtc.training.finetune.parts import load
from vtc.training.finetune.trainer import Finetuned, finetune

__all__ = ["Config", "Conversations", "Finetuned", "finetune", "load"]
