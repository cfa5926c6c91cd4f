# SPDX-License-Identifier: Apache-2.0
"""Average pooling of the token grid."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vtc.core import Method, Positions, Selection, VisionTokens, budget, check_choice, check_keep
from vtc.ops import pool_grid
from vtc.ops.pooling import cells_of


@dataclass(frozen=True)
class Pool(Method):
    """Average the projected tokens within the cells of a coarser grid.

    A budget of b tokens becomes the largest r x c <= b cells that keep the grid's aspect up to a
    factor of 2 (`vtc.ops.cell_grid`), so a little less than b may be kept: 56 (7 x 8) for 58 on a
    24 x 24 grid. Each token belongs to the cell its centre lies in; a cell's mean takes the place
    of the token nearest to the cell's centre. Cells without tokens, on grids with holes, are left
    out. The budget of a clip or of a tiled image is shared among its frames or tiles, and each is
    pooled by itself; a budget below one token per frame averages neighbouring frames.

    Args:
        keep: fraction of an image's (or clip's) tokens, or a whole number of tokens for each.
        positions: "original" or "contiguous".
    """

    name = "pool"
    title = "Average pooling"
    by_tile = True

    keep: float | int = 0.25
    positions: Positions = "original"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_choice("positions", self.positions, ("original", "contiguous"))

    def entering(self, n: int, tiles: int = 1) -> int:
        """The cells of square tiles, or of a square image; `keep` of others."""
        return cells_of(n, tiles, budget(self.keep, n))

    def is_bound(self, n: int, tiles: int = 1) -> bool:
        """A grid of another shape is rarely divided to the token."""
        return math.isqrt(n // tiles) ** 2 * tiles != n

    def select(self, tokens: VisionTokens) -> Selection:
        """Ascending indices, (k,), and the means that stand there, (k, d)."""
        n = len(tokens)
        b = tokens.budget(self.keep)
        if b >= n:
            return Selection(torch.arange(n, device=tokens.features.device))
        grid = tokens.places(self.name, "averages tokens that lie beside each other")
        return Selection(*pool_grid(tokens.features, grid, b, "mean", tokens.crop))
