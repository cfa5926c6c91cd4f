# SPDX-License-Identifier: Apache-2.0
"""Where an image's vision tokens stand: what adapters of models tell the runtime."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Modality = Literal["image", "video"]


@dataclass(frozen=True)
class ImageMap:
    """What the placeholders of one image (or clip) stand for, in their order.

    Attributes:
        grid: (n, 3) whole numbers (frame, row, column). In a tiled image they count over the plane
            that its tiles make up, and from 0 in the thumbnail. A separator has the frame and the
            row that it ends, or row -1 if it belongs to the frame, -2 to all of the image.
        crop: (n,) the tile of each token, 0 for the thumbnail, or `None` without tiles.
        separator: (n,) bool, features that are no vision tokens (ends of rows), or `None`.
        patches: (n, m) the tower's patches that each token is made of, numbered through all that
            `base` encoded in one call, -1 at separators; `None` where they are not known.
        states: (n, m) the rows of what the projector receives that each token is made of, numbered
            likewise; `None` where these are its patches.
        group: tells apart images that stand side by side, for families that join tiles.
        tiles: tiles (or frames) that the tower ran on for it, those that are cut off included.
        padded: patches of each of them, where the processor pads images to a number of patches.
    """

    grid: Tensor
    crop: Tensor | None = None
    separator: Tensor | None = None
    patches: Tensor | None = None
    states: Tensor | None = None
    group: int | None = None
    tiles: int = 1
    padded: int | None = None

    def __len__(self) -> int:
        return self.grid.shape[0]

    @property
    def extent(self) -> tuple[int, int, int] | None:
        """Frames, rows and columns of its vision tokens, if they fill such a block."""
        grid = self.grid if self.separator is None else self.grid[~self.separator]
        if not len(grid):
            return None
        frames, rows, columns = (1 + grid.max(0).values).tolist()
        return (frames, rows, columns) if frames * rows * columns == len(grid) else None

    @property
    def tile_patches(self) -> int | None:
        """Patches of each tile, if they are known; those of several are the tower's fixed size."""
        if self.padded is not None or self.tiles > 1 or self.patches is None:
            return self.padded
        return int((self.patches >= 0).sum())


def shift_patches(found: ImageMap, by: int) -> ImageMap:
    """The same image, its patches numbered from `by` on."""
    if found.patches is None:
        return found
    return replace(found, patches=torch.where(found.patches < 0, -1, found.patches + by))


def grid_positions(rows: int, columns: int) -> Tensor:
    """(rows * columns, 3) whole numbers (0, row, column) in raster order."""
    place = torch.arange(rows * columns)
    return torch.stack([torch.zeros_like(place), place // columns, place % columns], dim=1)


def merged_patches(rows: int, columns: int, by: int, first: int = 0) -> Tensor:
    """(rows // by * columns // by, by ** 2) the patches of a raster that by x by cells join; those
    at the end of rows and columns that fill no cell are in none."""
    index = torch.arange(first, first + rows * columns).view(rows, columns)
    index = index[: rows // by * by, : columns // by * by]
    index = index.reshape(rows // by, by, columns // by, by)
    return index.transpose(1, 2).reshape(-1, by * by)
