# SPDX-License-Identifier: Apache-2.0
"""Coarser grids: tokens averaged within, or interpolated at, the cells of a smaller grid.

A grid of rows x cols tokens is divided into r x c cells. A token belongs to the cell that contains
its centre, so cells always partition the tokens; if r and c divide rows
and cols this is ordinary average pooling. The same definition works for grids with holes: a cell
consists of the tokens in it, and empty cells are left out.

All sums are matrix products with small weight matrices, as the order of scattered additions is
not fixed on a GPU.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from vtc.core.errors import ArgumentError
from vtc.ops.batch import check_count, check_fits

Kernel = Literal["mean", "bilinear"]

STRETCH = 2.0
"""Largest aspect of a cell, relative to the aspect of the token grid, that `cell_grid` accepts."""


@lru_cache(maxsize=1024)
def cell_grid(rows: int, cols: int, budget: int) -> tuple[int, int]:
    """The division of a rows x cols grid into at most `budget` cells.

    Most budgets are not met exactly: on 24 x 24, 58 gives 7 x 8 = 56.

    Args:
        rows, cols: size of the token grid.
        budget: most cells.

    Returns:
        The (r, c), r <= rows and c <= cols, with the largest r * c <= budget among those that
        keep the grid's aspect up to a factor of `STRETCH` (if a thin grid allows none, among those
        nearest to it). Ties go to the better aspect, then to fewer rows.

    Raises:
        ArgumentError: a size or a budget below 1.
    """
    for name, value in (("rows", rows), ("cols", cols), ("budget", budget)):
        if value < 1:
            raise ArgumentError(name, f"expected a whole number of at least 1, got {value}")

    def stretch(r: int, c: int) -> float:
        return max(r * cols, c * rows) / min(r * cols, c * rows)

    fitting = []
    for r in range(1, min(rows, budget) + 1):
        # For a given number of rows, more columns are better until cells are too narrow.
        c = min(cols, budget // r, int(STRETCH * r * cols / rows))
        if c and stretch(r, c) <= STRETCH:
            fitting.append((r, c))
    if not fitting:
        sizes = [
            (r, c)
            for r in range(1, min(rows, budget) + 1)
            for c in range(1, min(cols, budget // r) + 1)
        ]
        least = min(stretch(r, c) for r, c in sizes)
        fitting = [size for size in sizes if stretch(*size) == least]
    return min(fitting, key=lambda size: (-size[0] * size[1], stretch(*size), size[0]))


def cells_of(n: int, tiles: int, budget: int) -> int:
    """Number of cells for `budget` of `n` tokens in `tiles` equal square tiles; the budget itself
    if the tiles are not square.

    This follows `pool_grid`: cells rarely use up the budget, and a budget below one
    token per tile pools neighbouring tiles into one token each.

    Args:
        n: tokens of the image.
        tiles: its tiles, of equal size.
        budget: tokens to keep, at least 1.
    """
    side = math.isqrt(n // tiles)
    if budget >= n or side * side * tiles != n or budget < tiles:
        return budget
    ends = [i * budget // tiles for i in range(tiles + 1)]
    return sum(math.prod(cell_grid(side, side, after - before)) for before, after in pairwise(ends))


def pool_grid(
    features: Tensor,
    grid: Tensor,
    budget: int,
    kernel: Kernel = "mean",
    crop: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Replace the tokens of one image or clip by at most `budget` tokens on a coarser grid.

    Every frame of a clip, and every crop of a tiled image, is a plane with its own grid, as large
    as the extent of its rows and columns. The budget is divided among planes in
    proportion to their tokens. A budget below the number of planes groups neighbouring planes,
    one token per group.

    A cell's token replaces the cell's token nearest to its centre (ties to the lowest index), so
    places are unique.

    Args:
        features: (n, d) tokens.
        grid: (n, 3) integers (frame, row, column).
        budget: most tokens to return, 1 <= budget <= n.
        kernel: "mean" averages the tokens of a cell; "bilinear" weighs the plane's tokens by a
            triangle around the cell's centre, two cells wide, like
            `torch.nn.functional.interpolate` with `antialias=True`.
        crop: (n,) integers, the tile of each token, or `None`.

    Returns:
        (k,) ascending indices, and (k, d) contents in the dtype of `features`.

    Raises:
        ArgumentError: mismatched shapes, or a budget out of range.
    """
    n = features.shape[0]
    if features.ndim != 2:
        raise ArgumentError("features", f"expected shape (n, d), got {tuple(features.shape)}")
    check_fits("grid", grid, (n, 3))
    check_fits("crop", crop, (n,))
    check_count("budget", budget, 1, n)
    frame = grid[:, :1]
    planes = frame if crop is None else torch.cat([crop[:, None].to(frame), frame], 1)
    plane = torch.unique(planes, dim=0, return_inverse=True)[1]
    count = int(plane.max()) + 1
    if budget < count:
        plane = plane * budget // count
    indices, contents = [], []
    before = 0
    for members in (plane == p for p in range(min(count, budget))):
        places = members.nonzero().squeeze(1)
        # Differences of rounded cumulative shares sum to the budget exactly.
        after = before + places.shape[0]
        share = after * budget // n - before * budget // n if budget >= count else 1
        before = after
        if share == 0:  # a plane far smaller than the others
            continue
        anchors, pooled = _pool_plane(features[places], grid[places, 1:], share, kernel)
        indices.append(places[anchors])
        contents.append(pooled)
    found = torch.cat(indices)
    order = found.argsort()
    return found[order], torch.cat(contents)[order].to(features.dtype)


def _pool_plane(
    features: Tensor, grid: Tensor, share: int, kernel: Kernel
) -> tuple[Tensor, Tensor]:
    """Anchors (k,) and contents (k, d) of one plane's cells, in raster order of the cells."""
    grid = grid.long() - grid.amin(0)
    rows, cols = (int(size) + 1 for size in grid.amax(0))
    r, c = cell_grid(rows, cols, share)
    row, col = grid.unbind(1)
    # Twice the tokens' centres as integers: (2 row + 1) r / (2 rows) is the place in cells.
    i = (2 * row + 1) * r // (2 * rows)
    j = (2 * col + 1) * c // (2 * cols)
    cells, cell = torch.unique(i * c + j, return_inverse=True)

    # Squared distance to the cell's centre in half tokens times r c, still integers.
    down = ((2 * row + 1) * r - (2 * i + 1) * rows) * c
    right = ((2 * col + 1) * c - (2 * j + 1) * cols) * r
    nearest = (down**2 + right**2).argsort(stable=True)
    ordered = cell[nearest].argsort(stable=True)
    members = torch.bincount(cell, minlength=cells.shape[0])
    anchors = nearest[ordered[members.cumsum(0) - members]]

    wide = features if features.dtype == torch.float64 else features.float()
    if kernel == "mean":
        weights = (cell == torch.arange(cells.shape[0], device=cell.device)[:, None]).to(wide)
    else:
        weights = (
            _triangle(rows, r, wide)[cells // c][:, row]
            * _triangle(cols, c, wide)[cells % c][:, col]
        )
    return anchors, (weights / weights.sum(1, keepdim=True)) @ wide


def _triangle(size: int, cells: int, like: Tensor) -> Tensor:
    """(cells, size) weights of an antialiased linear interpolation of `size` samples to `cells`."""
    scale = size / cells
    centres = (torch.arange(cells, device=like.device, dtype=like.dtype) + 0.5) * scale
    samples = torch.arange(size, device=like.device, dtype=like.dtype) + 0.5
    return (1 - (samples - centres[:, None]).abs() / scale).clamp_min(0)
