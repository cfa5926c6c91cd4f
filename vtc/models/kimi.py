# SPDX-License-Identifier: Apache-2.0
"""Kimi K2.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.core.images import ImageMap, Modality, grid_positions, merged_patches
from vtc.models.base import Adapter


class KimiK25(Adapter):
    """Images of any size, latent attention, a mixture of experts. A token joins a square of patches
    over all frames of its chunk."""

    name: ClassVar[str] = "kimi_k25"
    model_types: ClassVar[tuple[str, ...]] = ("kimi_k25",)
    frames: ClassVar[bool] = True
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    projects_patches: ClassVar[bool] = False

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        sizes = given["image_grid_thw" if modality == "image" else "video_grid_thw"].tolist()
        maps, first = [], 0
        for own, (frames, rows, columns) in zip(features, sizes, strict=True):
            by = round((rows * columns / len(own)) ** 0.5)
            grid, area = grid_positions(rows // by, columns // by), rows * columns
            starts = range(first, first + frames * area, area)
            patches = torch.cat([merged_patches(rows, columns, by, s) for s in starts], dim=1)
            first += frames * area
            maps.append([ImageMap(grid, patches=patches, tiles=frames)])
        return maps

    def projector(self) -> Any:
        return self.base.mm_projector

    def states_from(self) -> Any:
        return self.tower.final_layernorm

    def patch_states(self, given: Tensor, output: Any) -> Tensor:
        return output
