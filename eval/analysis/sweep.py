# SPDX-License-Identifier: Apache-2.0
"""Sweeps settings that a paper leaves open, on one type of question about generated scenes.

    python -m vtc.eval.analysis.sweep correlation --type document --limit 100 \\
        --grid alpha=0.5,0.7,0.9 --grid beta=0.0625,0.25 --out sweep.md

Every combination runs on the same questions; the table has the accuracy and the vision tokens of an
image, averaged over the decoder layers.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import vtc
from vtc.core.errors import ArgumentError

from ..embedded.scenes.questions import TYPES
from ..embedded.score import Sample, score
from ..embedded.vlm import load
from ..tasks.parquet import scene_questions


def grid(texts: Sequence[str]) -> list[dict[str, Any]]:
    """All combinations of `name=value,value` texts.

    Raises:
        ArgumentError: a malformed text.
    """
    axes = []
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or not values:
            raise ArgumentError("grid", f"expected name=value,value, got {text!r}")
        axes.append([(name, float(value)) for value in values.split(",")])
    return [dict(chosen) for chosen in itertools.product(*axes)]


def sweep(
    method: str, combinations: Sequence[dict[str, Any]], samples: Sequence[Sample]
) -> list[dict[str, Any]]:
    """Each combination's settings, accuracy in percent, and mean vision tokens."""
    model, processor = load(torch.float32)
    rows = []
    for settings in combinations:
        with vtc.patch(model, method, **settings) as patch:
            right, count = score(model, processor, samples)["all"]
            tokens = patch.report.equivalent_tokens
        rows.append({**settings, "right": 100 * right / count, "tokens": tokens})
        print(" ".join(f"{name}={value:g}" for name, value in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("method")
    parser.add_argument("--grid", action="append", default=[], help="name=value,value")
    parser.add_argument("--type", default="document", help="type of question")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None, help="file for the table")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    # Not the test split, on which methods are compared.
    every = scene_questions(args.limit * len(TYPES), split="val")
    samples = [sample for sample in every if sample[0].type == args.type]
    rows = sweep(args.method, grid(args.grid), samples)
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    lines += [f"| {' | '.join(f'{row[name]:g}' for name in names)} |" for row in rows]
    if args.out is not None:
        head = f"`{args.method}` on {len(samples)} questions of the type {args.type}, split val\n\n"
        args.out.write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
