# SPDX-License-Identifier: Apache-2.0
"""The command line: trains, calibrates and evaluates heads on a module's data."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from pathlib import Path

import torch

from vtc.core.errors import message_of
from vtc.training.atp.calibration import calibrate
from vtc.training.atp.config import Config
from vtc.training.atp.trainer import train
from vtc.training.data import find_data

DATA = "vtc.eval.embedded.training.atp"
"""The generated scenes; by name, as training does not import evaluation."""

FIRST_SCENE = 5_000_000
"""First training scene; earlier ones have other uses."""


def main() -> None:
    """Train and calibrate, or measure."""
    parser = argparse.ArgumentParser(
        prog="python -m vtc.training.atp", description="Train the heads of ATP-LLaVA."
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--out", type=Path, required=True, help="folder of the heads")
    parser.add_argument("--data", default=DATA, help="data module; see `vtc.training.data`")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--calibrate", type=int, default=0, help="held-out batches to calibrate on")
    parser.add_argument(
        "--measure", type=int, default=0, help="test scenes to evaluate on, instead of training"
    )
    parser.add_argument("--first", type=int, default=0, help="number of the first test scene")
    for field in dataclasses.fields(Config):
        if field.name in ("out", "layers", "train_model"):
            continue
        kind = type(field.default) if field.default not in (None, dataclasses.MISSING) else float
        if field.name == "steps":
            kind = int
        name = "--" + field.name.replace("_", "-")
        fallback = None if field.default is dataclasses.MISSING else field.default
        parser.add_argument(name, dest=field.name, type=kind, default=fallback)
    args = vars(parser.parse_args())

    torch.set_num_threads(args.pop("threads"))
    folder, size = args.pop("model"), args.pop("batch")
    held, scenes, first = args.pop("calibrate"), args.pop("measure"), args.pop("first")
    try:
        data = find_data(args.pop("data"))
    except ValueError as error:
        parser.error(f"--data: {message_of(error, 'name')}")
    for name in ("steps", "target"):
        if args[name] is None and not scenes:
            parser.error(f"--{name} is needed for training")
    model, processor = data.load(folder)
    if scenes:
        weights = hashlib.sha256((args["out"] / "model.safetensors").read_bytes()).hexdigest()
        found = data.measure(model, processor, args["out"], scenes, first)
        figures = {"weights": weights, **found}
        (args["out"] / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
        print(json.dumps(figures, indent=2))
        return
    config = Config(**args)
    train(model, data.batches(processor, "train", size, FIRST_SCENE, config.steps), config)
    if held:
        validation = data.batches(processor, "val", size, 0, held)
        count = calibrate(model, config.out, validation, config.target)
        print(f"calibrated: {count:.1f} tokens on {held * size} scenes of the val split")
