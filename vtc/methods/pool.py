# SPDX-License-Identifier: Apache-2.0
"""Average pooling of the token grid."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vtc.core import Method, Positions, Selection, VisionTokens, budget, check_keep, check_positions
from vtc.ops import pool_grid
from vtc.ops.pooling import cells_of


@dataclass(frozen=True)
class Pool(Method):
    """Average the projected tokens within the cells of a coarser grid.

    A budget of b tokens becomes the largest r x c <= b cells that keep the grid's aspect up to a
    factor of 2 (`vtc.ops.cell_grid`), so slightly fewer than b may be kept: 56 (7 x 8) for 58 on a
    24 x 24 grid. Each token belongs to the cell that contains its centre; a cell's mean replaces
    the token nearest to the cell's centre. Cells without tokens, on grids with holes, are left
    out. The budget of a clip or of a tiled image is divided among its frames or tiles, and each is
    pooled separately; a budget below one token per frame averages neighbouring frames.

    Args:
        keep: fraction of an image's (or clip's) tokens, or a whole number of tokens for each.
        positions: "original" or "contiguous".

    Raises:
        ArgumentError, ArgumentTypeError: a setting that is not accepted.
    """

    name = "pool"
    title = "Average pooling"
    reads_places = True
    by_tile = True

    keep: float | int = 0.25
    positions: Positions = "original"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_positions(self.positions)

    def entering(self, n: int, tiles: int = 1) -> int:
        """The number of cells for square images or tiles; `keep` for others."""
        return cells_of(n, tiles, budget(self.keep, n))

    def is_bound(self, n: int, tiles: int = 1) -> bool:
        """Whether the image (or its tiles) is not square, so that the cells may be fewer."""
        return math.isqrt(n // tiles) ** 2 * tiles != n

    def select(self, tokens: VisionTokens) -> Selection:
        """(k,) ascending indices and (k, d) means.

        Raises:
            ValueError: the tokens have no places.
        """
        n = len(tokens)
        b = tokens.budget(self.keep)
        if b >= n:
            return Selection(torch.arange(n, device=tokens.features.device))
        grid = tokens.places(self.name, "averages neighbouring tokens")
        return Selection(*pool_grid(tokens.features, grid, b, "mean", tokens.crop))
