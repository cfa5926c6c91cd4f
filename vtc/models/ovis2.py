# SPDX-License-Identifier: Apache-2.0
"""Ovis 2, whose tower maps patches to visual words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from vtc.core.images import ImageMap, Modality, merged_patches
from vtc.models.base import Adapter


class Ovis2(Adapter):
    """Vision tokens are mixtures of visual-word embeddings; image indicators count as text. A
    token's patches are those whose states choose its words."""

    name: ClassVar[str] = "ovis2"
    model_types: ClassVar[tuple[str, ...]] = ("ovis2",)
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    projects_patches: ClassVar[bool] = False

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        vision, maps = self.model.config.vision_config, []
        side, by = vision.image_size // vision.patch_size, vision.hidden_stride
        for i, own in enumerate(features):
            patches = merged_patches(side, side, by, i * side * side)
            whole = len(patches) == len(own)  # otherwise the tower pads the last cells with zeros
            maps.append([ImageMap(self.grid(len(own), None), patches=patches if whole else None)])
        return maps

    def projector(self) -> Any:
        return self.tower.head_linear

    def states_from(self) -> Any:
        return self.tower.transformer.rms_norm

    def patch_states(self, given: Tensor, output: Any) -> Tensor:
        return output
