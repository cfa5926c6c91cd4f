# SPDX-License-Identifier: Apache-2.0
"""GOT-OCR 2, PP-Chart2Table, FastVLM and Perception LM, whose towers cannot be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from vtc.core.images import ImageMap, Modality
from vtc.models.base import Adapter


class Convolutional(Adapter):
    """Towers without plain attention: tokens have a grid, but the tower cannot be read."""

    name: ClassVar[str] = "got_ocr2, pp_chart2table, fast_vlm"
    model_types: ClassVar[tuple[str, ...]] = ("got_ocr2", "pp_chart2table", "fast_vlm")
    projects_patches: ClassVar[bool] = False
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    reads_tower: ClassVar[bool] = False

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        return [[ImageMap(self.grid(len(own), None))] for own in features]


class PerceptionLM(Convolutional):
    """A tower of timm. The thumbnail and the tiles are adjacent and form one image, as do the
    frames of a clip."""

    name: ClassVar[str] = "perception_lm"
    model_types: ClassVar[tuple[str, ...]] = ("perception_lm",)
    reads_tower: ClassVar[bool] = False
    joins: ClassVar[tuple[Modality, ...]] = ("image", "video")
    video: ClassVar[bool] = True
    clips_as_images: ClassVar[bool] = True

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        tiles = given["pixel_values"].shape[1]
        maps = super().image_maps(modality, given, features)
        return [[replace(found, group=i // tiles)] for i, (found,) in enumerate(maps)]

    def join(self, maps: list[ImageMap], modality: Modality) -> ImageMap:
        found = super().join(maps, modality)
        if found.crop is None:
            return found
        count = len(maps)  # here the thumbnail comes first
        return replace(found, crop=(found.crop - 1) % count)
