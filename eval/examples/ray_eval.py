# SPDX-License-Identifier: Apache-2.0
"""A grid of methods over the GPUs of a Ray cluster, one method at a time on each.

    python eval/examples/ray_eval.py --model llava-hf/llava-1.5-7b-hf --tasks pope,gqa \
        --methods todre,divprune,visionzip --keep 0.25,0.1 --out /shared/run --gpus 1

The folder must be one that all machines see. Each finished (method, keep, task) cell is a file of
its own there, written at once, so that workers do not disturb one another; the last step finds all
cells finished and only puts the table together. Killed, it goes on where it was.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import ray

from vtc.core.spec import parse_keep, split_list

from ..harness.run import BASELINES, Settings, run
from ..report.table import table


def main() -> None:
    """Hand the methods out, wait, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("model", "tasks", "methods", "keep", "out"):
        parser.add_argument(f"--{name}", required=name not in ("model",))
    parser.add_argument("--limit", type=int)
    parser.add_argument("--gpus", type=float, default=1, help="of each worker; 0 runs on CPUs")
    given = parser.parse_args()
    whole = Settings(
        out=Path(given.out).absolute(),
        model=given.model,
        methods=tuple(split_list(given.methods)),
        keeps=tuple(parse_keep(text) for text in split_list(given.keep)),
        tasks=tuple(split_list(given.tasks)),
        limit=given.limit,
        device="cuda" if given.gpus else "cpu",
    )

    @ray.remote(num_gpus=given.gpus, max_retries=2)
    def score(method: str) -> None:
        run(replace(whole, methods=(method,), baselines=False))

    ray.init(ignore_reinit_error=True)
    ray.get([score.remote(method) for method in (*BASELINES, *whole.methods)])
    from rich import print as show

    show(table(run(whole)))


if __name__ == "__main__":
    main()
