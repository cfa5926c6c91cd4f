# SPDX-License-Identifier: Apache-2.0
"""Exports a checkpoint of the joint stage as the model folder that users load.

python -m vtc.eval.embedded.training.export --out eval/embedded/weights
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoProcessor

from ..vlm import build_model, embedded_path
from .common import RUNS


def export(checkpoint: Path, out: Path) -> None:
    """Write bf16 weights in shards below 20 MiB, tokenizer, processor and generation settings."""
    processor = AutoProcessor.from_pretrained(RUNS / "processor")
    model = build_model(len(processor.tokenizer)).to(torch.bfloat16)
    state = torch.load(checkpoint, weights_only=False)
    model.load_state_dict(state["model"])
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("model*.safetensors*"):
        old.unlink()
    model.save_pretrained(out, max_shard_size="18MB")
    processor.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=RUNS / "joint.pt")
    parser.add_argument("--out", type=Path, default=embedded_path())
    args = parser.parse_args()
    export(args.checkpoint, args.out)


if __name__ == "__main__":
    main()
