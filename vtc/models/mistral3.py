# SPDX-License-Identifier: Apache-2.0
"""Mistral 3 and LightOnOCR."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

from torch import nn

from vtc.core.images import ImageMap, Modality, merged_patches
from vtc.models.base import Adapter


class Mistral3(Adapter):
    """Images of any size, packed into one tower sequence; each square of patches becomes one
    token."""

    name: ClassVar[str] = "mistral3"
    model_types: ClassVar[tuple[str, ...]] = ("mistral3",)
    projects_patches: ClassVar[bool] = False
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")

    def tower_attention(self) -> list[Any]:
        return [layer.attention for layer in self.tower.transformer.layers]

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


class LightOnOcr(Mistral3):
    """As Mistral 3, without breaks between the rows of an image."""

    name: ClassVar[str] = "lighton_ocr"
    model_types: ClassVar[tuple[str, ...]] = ("lighton_ocr",)

    @classmethod
    def bind(cls, model: nn.Module) -> Self:
        found = super().bind(model)
        return replace(found, tower=getattr(found.base, "vision_encoder", None))

    def projector(self) -> Any:
        return self.base.vision_projection
