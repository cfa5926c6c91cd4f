# SPDX-License-Identifier: Apache-2.0
"""The pixels stage: the tower runs on fewer pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from vtc.core import Method
from vtc.models import Adapter
from vtc.runtime.forward import Forward
from vtc.runtime.hf.stages.base import Runner, Shortened

if TYPE_CHECKING:
    from vtc.runtime.hf.vision import Encoding


class PixelsRunner(Runner):
    """Resizes the pixels to the grid that the method asks for."""

    stage: ClassVar[str] = "pixels"
    shortens: ClassVar[bool] = True

    def __init__(
        self, adapter: Adapter, method: Method, current: Callable[[], Forward | None]
    ) -> None:
        super().__init__(adapter, method, current)
        adapter.check_pixels({})

    def encode(
        self, encoding: Encoding, original: Callable[..., Any], kwargs: dict[str, Any]
    ) -> tuple[Any, list[Shortened]]:
        """Run the tower on fewer pixels; see `Runner.encode`."""
        encoding.adapter.check_pixels(encoding.given)
        kwargs = dict(kwargs)
        pixels = kwargs.pop("pixel_values")
        (part,) = (part for _, part in self.parts)
        out, sizes = encoding.adapter.downsampled_features(original, pixels, part, kwargs)
        return out, [
            Shortened(size[0] * size[1], None if size == reduced else _filled(size, reduced))
            for size, reduced in sizes
        ]


def _filled(size: tuple[int, int], reduced: tuple[int, int]) -> Tensor:
    """(r * c,) places on a grid of `size` nearest to those of a grid of `reduced` (r, c)."""
    (rows, columns), (r, c) = size, reduced
    row = ((torch.arange(r) + 0.5) * rows / r).long()
    column = ((torch.arange(c) + 0.5) * columns / c).long()
    return (row[:, None] * columns + column).flatten()
