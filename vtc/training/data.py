# SPDX-License-Identifier: Apache-2.0
"""The data module that provides training commands with a model and batches.

It is given by name and has the functions of `Data`, so that training is independent of any data
set.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from vtc.core.errors import ArgumentError
from vtc.training.loop import Batch


class Data(Protocol):
    """The functions of a data module."""

    def load(self, folder: Path) -> tuple[Any, Any]:
        """Load a model.

        Args:
            folder: with the model.

        Returns:
            The model, in evaluation mode, and its processor.
        """

    def batches(
        self, processor: Any, split: str, size: int, first: int, steps: int
    ) -> Iterable[Batch]:
        """Batches with labels.

        Args:
            processor: of the model.
            split: "train", or "val" for calibration.
            size: samples per batch.
            first: number of the first sample.
            steps: number of batches.

        Returns:
            `steps` batches.
        """

    def measure(
        self, model: Any, processor: Any, folder: Path, count: int, first: int
    ) -> dict[str, Any]:
        """Evaluate trained weights on test samples.

        Args:
            model: the model.
            processor: of the model.
            folder: with the trained weights.
            count: number of samples.
            first: number of the first sample.

        Returns:
            Figures by name.
        """


def find_data(name: str) -> Data:
    """Import a data module.

    Args:
        name: of the module.

    Returns:
        The module.

    Raises:
        ArgumentError: it cannot be imported, or lacks a function; the message names it.
    """
    try:
        found = import_module(name)
    except ImportError as error:
        raise ArgumentError("name", f"{name}: {error}") from error
    lacking = [n for n in ("load", "batches", "measure") if not callable(getattr(found, n, None))]
    if lacking:
        raise ArgumentError("name", f"{name}: the module lacks {', '.join(lacking)}")
    return cast(Data, found)
