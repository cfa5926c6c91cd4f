# SPDX-License-Identifier: Apache-2.0
"""Step 3.7."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.core.images import ImageMap, Modality, grid_positions, merged_patches
from vtc.models.base import Adapter


class Step3p7(Adapter):
    """A mixture of experts, some of whose layers have a window. An image is its tiles, followed by
    the whole picture.

    Two convolutions halve the map of the tower: a token's patches are the 4 x 4 that their strides
    map to it. They are 3 x 3, and also read patches around these, which do not count.
    """

    name: ClassVar[str] = "step3p7"
    model_types: ClassVar[tuple[str, ...]] = ("step3p7",)
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    unmerged: ClassVar[str] = "convolutions read the places of patches that would be gone"
    projects_patches: ClassVar[bool] = False
    by: ClassVar[int] = 4

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        pixels, local = given["pixel_values"], given.get("pixel_values_local")
        whole, counts = self._plane(pixels), given.get("num_local_patches")
        first = len(pixels) * whole[0] * whole[1]  # tiles come after all whole pictures
        maps = []
        for i in range(len(features)):
            tiles = 0 if counts is None else int(counts[i])
            grid, patches = self._tokens(whole, i * whole[0] * whole[1])
            if not tiles:
                maps.append([ImageMap(grid, patches=patches)])
                continue
            plane = self._plane(local)
            area = plane[0] * plane[1]
            each = [self._tokens(plane, first + tile * area) for tile in range(tiles)]
            first += tiles * area
            grids, joined = zip(*each, (grid, patches), strict=True)
            crop = torch.arange(1, tiles + 1).repeat_interleave(len(each[0][0]))
            crop = torch.nn.functional.pad(crop, (0, len(grid)))
            known = None if any(one is None for one in joined) else torch.cat(joined)
            maps.append([ImageMap(torch.cat(grids), crop=crop, patches=known, tiles=tiles + 1)])
        return maps

    def _plane(self, pixels: Any) -> tuple[int, int]:
        """Rows and columns of patches."""
        patch = self.tower.config.patch_size
        return pixels.shape[-2] // patch, pixels.shape[-1] // patch

    def _tokens(self, plane: tuple[int, int], first: int) -> tuple[Tensor, Tensor | None]:
        """(n, 3) places of the tokens of a map of patches, and (n, 16) patches of each, numbered
        from `first`; `None` if some tokens are made of less than a square."""
        by = self.by
        grid = grid_positions(*(-(-size // by) for size in plane))
        if any(size % by for size in plane):
            return grid, None
        return grid, merged_patches(*plane, by, first)

    def states_from(self) -> Any:
        return self.tower.layers[-1]

    def patch_states(self, given: Tensor, output: Any) -> Tensor:
        return output
