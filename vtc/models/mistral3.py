# SPDX-License-Identifier: Apache-2.0
"""Mistral 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from vtc.core.images import ImageMap, Modality, merged_patches
from vtc.models.base import Adapter


class Mistral3(Adapter):
    """Images of any size, packed into one tower sequence; each square of patches becomes one
    token."""

    name: ClassVar[str] = "mistral3"
    model_types: ClassVar[tuple[str, ...]] = ("mistral3",)
    projects_patches: ClassVar[bool] = False
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        config = self.model.config
        by, patch = config.spatial_merge_size, config.vision_config.patch_size
        maps, first = [], 0
        for i, own in enumerate(features):
            height, width = (int(size) // patch for size in given["image_sizes"][i])
            grid = self.grid(len(own), (height // by * patch, width // by * patch))
            patches = merged_patches(height, width, by, first)
            first += height * width
            maps.append([ImageMap(grid, patches=patches)])
        return maps
