# SPDX-License-Identifier: Apache-2.0
"""Where the commands that train get a model and batches from: a module that offers both.

The module is given by its name, so that training knows nothing of any data. It has the functions of
`Data`.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from vtc.training.loop import Batch


class Data(Protocol):
    """What a module of data offers."""

    def load(self, folder: Path) -> tuple[Any, Any]:
        """The model in `folder`, in evaluation mode, and its processor."""

    def batches(
        self, processor: Any, split: str, size: int, first: int, steps: int
    ) -> Iterable[Batch]:
        """`steps` batches of `size` samples, with labels.

        Args:
            split: "train", or "val" to calibrate on.
            first: number of the first sample.
        """

    def measure(
        self, model: Any, processor: Any, folder: Path, count: int, first: int
    ) -> dict[str, Any]:
        """Figures of what was trained into `folder`, on `count` samples that are for testing."""


def find_data(name: str) -> Data:
    """The module of this name.

    Raises:
        ValueError: there is none, or it lacks a function; says which.
    """
    try:
        found = import_module(name)
    except ImportError as error:
        raise ValueError(f"{name}: {error}") from error
    lacking = [n for n in ("load", "batches", "measure") if not callable(getattr(found, n, None))]
    if lacking:
        raise ValueError(f"{name}: the module lacks {', '.join(lacking)}")
    return cast(Data, found)
