# SPDX-License-Identifier: Apache-2.0
"""The command line: tunes a model on a file of questions on pictures."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import torch

from vtc.core.errors import ArgumentError, argument_of
from vtc.core.spec import parse_keep, parse_method
from vtc.training.finetune.config import Config
from vtc.training.finetune.conversations import Conversations
from vtc.training.finetune.trainer import finetune

_KINDS: dict[str, Any] = {"steps": int, "minutes": float}


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune a model, and save what was tuned."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    parser = argparse.ArgumentParser(
        prog="python -m vtc.training.finetune",
        description="Fine-tune a vision-language model while a method compresses its images.",
    )
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument(
        "--data", required=True, help="JSONL file with image or images, question and answer"
    )
    parser.add_argument("--method", default=None, help="as for vtc.patch; default: none")
    parser.add_argument("--keep", type=parse_keep, default=None, help="of the method")
    parser.add_argument("--batch", type=int, default=4, help="rows per batch")
    parser.add_argument("--dtype", default="float32", help="of the weights that are loaded")
    parser.add_argument("--threads", type=int, default=None)
    for field in dataclasses.fields(Config):
        name = "--" + field.name.replace("_", "-")
        if field.default is dataclasses.MISSING:
            parser.add_argument(name, required=True, help="folder for the result")
        elif isinstance(field.default, bool):
            parser.add_argument(name, action="store_true")
        else:
            kind = _KINDS.get(field.name, type(field.default))
            parser.add_argument(name, type=kind, default=field.default)
    given = vars(parser.parse_args(arguments))

    name, file, text = given.pop("model"), given.pop("data"), given.pop("method")
    keep, size, dtype = given.pop("keep"), given.pop("batch"), given.pop("dtype")
    if (threads := given.pop("threads")) is not None:
        torch.set_num_threads(threads)
    try:
        config = Config(**given)
        if text is None and keep is not None:
            raise ArgumentError("method", "expected one, as --keep is given")
        method = None if text is None else parse_method(text, keep)
        processor = AutoProcessor.from_pretrained(name)
        batches = Conversations.read(processor, file, size, config.seed)
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
        made = finetune(model, method, batches, config)
    except (ValueError, TypeError) as error:
        if argument_of(error) is None:
            raise
        parser.error(str(error))
    last = made.log[-1]
    sys.stdout.write(f"{made.folder}: {last['step']} steps, loss {last['loss']:.4g}\n")
