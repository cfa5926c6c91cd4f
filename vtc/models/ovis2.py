# SPDX-License-Identifier: Apache-2.0
"""Ovis 2, whose tower maps patches to visual words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from vtc.core.images import ImageMap, Modality, merged_patches
from vtc.models.base import Adapter, UnsupportedModelError


class Ovis2(Adapter):
    """Vision tokens are mixtures of visual-word embeddings; image indicators count as text. A
    token's patches are those whose states choose its words."""

    name: ClassVar[str] = "ovis2"
    model_types: ClassVar[tuple[str, ...]] = ("ovis2",)
    stages: ClassVar[tuple[str, ...]] = ("encoder", "sequence", "layers")
    projects_patches: ClassVar[bool] = False
    encoder_parts: ClassVar[tuple[str, str, str, str]] = (
        *("rms_norm1", "attention"),
        *("rms_norm2", "ffn"),
    )

    def encoder_layers(self) -> list[Any]:
        vision = self.model.config.vision_config
        side, by = vision.image_size // vision.patch_size, vision.hidden_stride
        if side % by:
            raise UnsupportedModelError(
                f"model: the tower pads the {side} x {side} patches of an image to squares of "
                f"{by} x {by}, so that tokens have different numbers of patches, and those of one "
                "cannot be merged with those of another"
            )
        return self._with_parts(list(self.tower.transformer.encoder.layers))

    def encoder_units(self, modality: Modality, n: int) -> Tensor:
        side = math.isqrt(n)
        return merged_patches(side, side, self.model.config.vision_config.hidden_stride)

    def encoder_projectors(self) -> list[Any]:
        return [self.tower.head_linear, self.base.visual_embeddings_table]

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
