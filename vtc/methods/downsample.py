# SPDX-License-Identifier: Apache-2.0
"""Fewer pixels, or a smaller grid of features: the baseline of VTC-Bench."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from vtc.core import Method, Positions, Selection, VisionTokens
from vtc.core.errors import ArgumentTypeError
from vtc.core.settings import budget, check_choice, check_keep, check_positions
from vtc.ops import cell_grid, pool_grid
from vtc.ops.pooling import cells_of


@dataclass(frozen=True)
class Downsample(Method):
    """Use a smaller image instead of a selection of the large image's tokens.

    VTC-Bench found that it beats token-pruning methods on most general benchmarks at equal numbers
    of tokens on a model with dynamic resolution, so it is a baseline for every method here.
    There are two variants, which are different baselines:

    - `how="pixels"` resizes the image before the vision tower, so the tower computes less too.
      This is the baseline of VTC-Bench. The engine resizes `pixel_values` and lets the tower
      interpolate its position embeddings. CLIP and SigLIP towers can, but a tower
      trained at one size may do badly; the method gives the size (`target_grid`).
    - `how="grid"`, the default, works with every model: the tower sees the full image,
      and its grid of projected features is resized, bilinearly and antialiased. The tower saves
      nothing, and each token has attended to the full-resolution image.

    Budgets become grids as in `Pool`: the largest r x c <= b that keeps the aspect up to a
    factor of 2. Grids with holes, frames and tiles are handled as in `Pool`, too.

    Args:
        keep: fraction of an image's (or clip's) tokens, or a whole number of tokens for each.
        how: "grid" or "pixels".
        positions: "original" or "contiguous".

    Raises:
        ArgumentError, ArgumentTypeError: a setting that is not accepted.
    """

    name = "downsample"
    title = "Down-sampling"
    reads_places = True
    by_tile = True

    keep: float | int = 0.25
    how: Literal["grid", "pixels"] = "grid"
    positions: Positions = "original"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_choice("how", self.how, ("grid", "pixels"))
        check_positions(self.positions)

    @property
    def stages(self) -> tuple[str, ...]:
        """("pixels",) or ("sequence",), by `how`."""
        return ("pixels",) if self.how == "pixels" else ("sequence",)

    def target_grid(self, rows: int, cols: int) -> tuple[int, int]:
        """(rows, columns) of the cells for `keep` tokens of an image of `rows` x `cols`."""
        return cell_grid(rows, cols, budget(self.keep, rows * cols))

    def entering(self, n: int, tiles: int = 1) -> int:
        """The number of cells for square images or tiles; `keep` for others."""
        return cells_of(n, tiles, budget(self.keep, n))

    def is_bound(self, n: int, tiles: int = 1) -> bool:
        """Whether the image (or its tiles) is not square, so that the cells may be fewer."""
        return math.isqrt(n // tiles) ** 2 * tiles != n

    def select(self, tokens: VisionTokens) -> Selection:
        """(k,) ascending indices and (k, d) interpolated features.

        Raises:
            TypeError: `how` is "pixels".
            ValueError: the tokens have no places.
        """
        if self.how == "pixels":
            raise ArgumentTypeError(
                "how", "'pixels' acts before the vision tower, not on its tokens"
            )
        n = len(tokens)
        b = tokens.budget(self.keep)
        if b >= n:
            return Selection(torch.arange(n, device=tokens.features.device))
        grid = tokens.places(self.name, "resizes a grid of tokens")
        return Selection(*pool_grid(tokens.features, grid, b, "bilinear", tokens.crop))
