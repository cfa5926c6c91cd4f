# SPDX-License-Identifier: Apache-2.0
"""Step 3.7."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from vtc.core.images import ImageMap, Modality, grid_positions
from vtc.models.base import Adapter


class Step3p7(Adapter):
    """A mixture of experts, some of whose layers have a window. An image is its tiles, followed by
    the whole picture."""

    name: ClassVar[str] = "step3p7"
    model_types: ClassVar[tuple[str, ...]] = ("step3p7",)
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    unread: ClassVar[str] = "convolutions mix its patches"
    projects_patches: ClassVar[bool] = False

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        whole = self._plane(given["pixel_values"])
        local, counts = given.get("pixel_values_local"), given.get("num_local_patches")
        maps = []
        for i in range(len(features)):
            tiles = 0 if counts is None else int(counts[i])
            if not tiles:
                maps.append([ImageMap(grid_positions(*whole))])
                continue
            tile = grid_positions(*self._plane(local))
            crop = torch.arange(1, tiles + 1).repeat_interleave(len(tile))
            grid = torch.cat([tile.repeat(tiles, 1), grid_positions(*whole)])
            crop = torch.nn.functional.pad(crop, (0, len(grid) - len(crop)))
            maps.append([ImageMap(grid, crop=crop, tiles=tiles + 1)])
        return maps

    def _plane(self, pixels: Any) -> tuple[int, int]:
        """Rows and columns of tokens: two convolutions halve those of patches, rounded up."""
        patch = self.tower.config.patch_size
        rows, columns = pixels.shape[-2] // patch, pixels.shape[-1] // patch
        return -(-rows // 4), -(-columns // 4)
