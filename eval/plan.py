# SPDX-License-Identifier: Apache-2.0
"""What a run of `vtc eval` is asked for, and the cells that come of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vtc
from vtc.spec import Keep, parse_method, takes_keep

__all__ = ["BASELINES", "DTYPES", "SUITE", "BadInput", "Cell", "Observer", "Settings", "plan"]

SUITE = ("vtc_scenes", "vtc_photo", "vtc_mosaic")
"""Tasks whose data is generated here."""

BASELINES = ("full", "blind", "random", "pool", "downsample")
"""What every method is to be compared with: all tokens, a grey image, and the simplest ways to get
to the same number of tokens."""

DTYPES = ("float32", "bfloat16", "float16")


class BadInput(ValueError):
    """Something given does not work; says which option, before any work is done."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(f"{option}: {message}")
        self.option, self.message = option, message


@dataclass(frozen=True)
class Settings:
    """What to run.

    Attributes:
        out: folder for everything that is written.
        model: a folder or an id from the hub; `None` is the model that comes with vtc.
        methods: as text (`vtc.spec`), and "blind".
        keeps: for each method that has a `keep` left open.
        tasks: of the suite here or of lmms-eval.
        limit: samples of each task; `None` for all.
        batch_size: for lmms-eval's class; many take 1 only.
        device: "cpu", "cuda", "cuda:1"; `None` for a GPU if there is one.
        dtype: one of `DTYPES`; `None` for float32 on the CPU, the checkpoint's own elsewhere.
        seed: of sampling methods, of the suite and of lmms-eval.
        baselines: add those of `BASELINES` that are missing.
        lmms_model: lmms-eval's class, where the model's type does not tell.
    """

    out: Path
    model: str | None = None
    methods: tuple[str, ...] = ("todre", "fastv")
    keeps: tuple[Keep, ...] = (0.25, 0.1)
    tasks: tuple[str, ...] = ("vtc_scenes",)
    limit: int | None = None
    batch_size: int = 1
    device: str | None = None
    dtype: str | None = None
    seed: int = 0
    baselines: bool = True
    lmms_model: str | None = None


@dataclass(frozen=True)
class Cell:
    """One (method, keep, task) to run."""

    label: str
    keep: Keep | None
    task: str
    method: vtc.Method
    blind: bool = False

    def key(self, context: Mapping[str, Any]) -> str:
        """Hash of all that the result depends on."""
        parts = {
            "method": self.method.to_dict(),
            "blind": self.blind,
            "task": self.task,
            **context,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


class Observer:
    """Told of a run's progress; the methods do nothing here."""

    def planned(self, total: int, cells: int, finished: int) -> None:
        """`total` samples are to be answered in all cells; `finished` cells are done already."""

    def stage(self, text: str) -> None:
        """What is going on now."""

    def advanced(self, samples: int) -> None:
        """So many more samples are answered."""

    def finished(self, cell: Mapping[str, Any]) -> None:
        """A cell is done or failed; a cell as in results.json."""


def plan(settings: Settings) -> list[Cell]:
    """The cells in the order in which they run: the baselines first, without repetition.

    Raises:
        BadInput: something in `settings` does not work, as far as that can be told without the
            model and the data.
    """
    if not settings.methods:
        raise BadInput("--methods", "expected at least one method, got none")
    if not settings.tasks:
        raise BadInput("--tasks", "expected at least one task, got none")
    if settings.limit is not None and settings.limit < 1:
        raise BadInput("--limit", f"expected at least 1, got {settings.limit}")
    if settings.batch_size < 1:
        raise BadInput("--batch-size", f"expected at least 1, got {settings.batch_size}")
    if settings.dtype is not None and settings.dtype not in DTYPES:
        raise BadInput("--dtype", f"expected one of {', '.join(DTYPES)}, got {settings.dtype!r}")
    if settings.seed < 0:
        raise BadInput("--seed", f"expected at least 0, got {settings.seed}")
    labels = [*(BASELINES if settings.baselines else ()), *settings.methods]
    labels = list(dict.fromkeys(label.replace(" ", "") for label in labels))
    variants: list[tuple[str, Keep | None, vtc.Method, bool]] = []
    for label in labels:
        try:
            if label == "blind":
                variants.append((label, None, vtc.make("full"), True))
            elif takes_keep(label):
                if not settings.keeps:
                    raise BadInput("--keep", f"expected a value for {label}, got none")
                for keep in dict.fromkeys(settings.keeps):
                    method = parse_method(label, keep, settings.seed)
                    variants.append((label, keep, method, False))
            else:
                variants.append((label, None, parse_method(label, None, settings.seed), False))
        except BadInput:
            raise
        except (ValueError, TypeError) as error:
            option = "--keep" if str(error).startswith("keep") else "--methods"
            raise BadInput(option, f"{label}: {error}") from error
    return [
        Cell(label, keep, task, method, blind)
        for task in dict.fromkeys(settings.tasks)
        for label, keep, method, blind in variants
    ]
