# SPDX-License-Identifier: Apache-2.0
"""Where an image's vision tokens lie: what model adapters tell the runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Modality = Literal["image", "video"]


@dataclass(frozen=True)
class ImageMap:
    """What the placeholders of one image (or clip) stand for, in order.

    Attributes:
        grid: (n, 3) integers (frame, row, column). In a tiled image they count over the plane
            of its tiles, and from 0 in the thumbnail. A separator has the frame and the
            row that it ends, or row -1 if it belongs to the frame, -2 to the whole image. `None`
            for tokens without places, as a resampler makes them; then `count` is given.
        crop: (n,) the tile of each token, 0 for the thumbnail, or `None` without tiles.
        separator: (n,) bool, features that are not vision tokens (ends of rows), or `None`. Without
            places they belong to the whole image.
        patches: (n, m) the tower patches that make up each token, numbered through everything
            `base` encoded in one call, -1 at separators; `None` if unknown.
        states: (n, m) the rows of the projector's input that make up each token, numbered
            likewise; `None` if these are its patches.
        group: separates adjacent images, for families that join tiles.
        tiles: tiles (or frames) that the tower ran on for this image, including discarded ones.
        padded: patches of each tile, if the processor pads images to a fixed number of patches.
        count: n; may be left out if `grid` is given.

    Raises:
        ValueError: neither `grid` nor `count`.
    """

    grid: Tensor | None
    crop: Tensor | None = None
    separator: Tensor | None = None
    patches: Tensor | None = None
    states: Tensor | None = None
    group: int | None = None
    tiles: int = 1
    padded: int | None = None
    count: int | None = None

    def __post_init__(self) -> None:
        if self.grid is None and self.count is None:
            raise ValueError("grid: tokens without places need a count")

    def __len__(self) -> int:
        return self.grid.shape[0] if self.grid is not None else int(self.count or 0)

    @property
    def extent(self) -> tuple[int, int, int] | None:
        """(frames, rows, columns) of its vision tokens, or `None` if they fill no block."""
        grid = self.grid
        if grid is not None and self.separator is not None:
            grid = grid[~self.separator]
        if grid is None or not len(grid):
            return None
        frames, rows, columns = (1 + grid.max(0).values).tolist()
        return (frames, rows, columns) if frames * rows * columns == len(grid) else None

    @property
    def tile_patches(self) -> int | None:
        """Patches of each tile, or `None` if unknown; several tiles have the tower's fixed size."""
        if self.padded is not None or self.tiles > 1 or self.patches is None:
            return self.padded
        return int((self.patches >= 0).sum())


def grid_positions(rows: int, columns: int) -> Tensor:
    """(rows * columns, 3) integers (0, row, column) in raster order."""
    place = torch.arange(rows * columns)
    return torch.stack([torch.zeros_like(place), place // columns, place % columns], dim=1)


def merged_patches(rows: int, columns: int, by: int, first: int = 0) -> Tensor:
    """(rows // by * columns // by, by ** 2) the patches that each by x by cell of a raster merges,
    numbered from `first`.

    Args:
        rows, columns: size of the raster; patches that fill no cell are left out.
        by: side of a cell.
        first: number of the first patch.
    """
    index = torch.arange(first, first + rows * columns).view(rows, columns)
    index = index[: rows // by * by, : columns // by * by]
    index = index.reshape(rows // by, by, columns // by, by)
    return index.transpose(1, 2).reshape(-1, by * by)
