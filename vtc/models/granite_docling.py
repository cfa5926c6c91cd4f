# SPDX-License-Identifier: Apache-2.0
"""Granite-Docling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.core.images import ImageMap, Modality, merged_patches
from vtc.models.base import Adapter


class GraniteDocling(Adapter):
    """Each tile is a separate image, as in Idefics 3, on the coarse path of the connector or on the
    fine one. Features of earlier tower layers are added after the first decoder layers; a merged
    token gets those of its place."""

    name: ClassVar[str] = "granite_docling"
    model_types: ClassVar[tuple[str, ...]] = ("granite_docling",)
    since: ClassVar[Mapping[str, str]] = {"granite_docling": "5.21"}
    stages: ClassVar[tuple[str, ...]] = ("encoder", "sequence", "layers")
    projects_patches: ClassVar[bool] = False

    def projector(self) -> Any:
        return self.tower.connector

    def states_from(self) -> Any:
        return self.tower.post_layernorm

    def patch_states(self, given: Tensor, output: Any) -> Tensor:
        return output

    def encoder_tiles(
        self, modality: Modality, given: Mapping[str, Any], rows: int, length: int
    ) -> list[tuple[int, Tensor, Tensor]]:
        by, side = self._sides(given)
        none, units = torch.empty(0, dtype=torch.long), merged_patches(side, side, by)
        return [(row, none, units) for row in range(rows)]

    def encoder_projectors(self) -> list[Any]:
        return []  # the connector joins patches on the grid

    def _sides(self, given: Mapping[str, Any]) -> tuple[int, int]:
        """Patches along the side of a token's square, and of a tile."""
        config = self.tower.config
        by = config.scale_factor // (1 if given.get("tile_fine_mask") is None else 2)
        return by, config.image_size // config.patch_size

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        (by, side), first, maps = self._sides(given), 0, []
        for own in features:  # one element holds all tiles of a sample
            of_one = []
            for _ in range(len(own) // (side // by) ** 2):
                patches = merged_patches(side, side, by, first)
                first += side * side
                of_one.append(ImageMap(self.grid(len(patches), None), patches=patches))
            maps.append(of_one)
        return maps
