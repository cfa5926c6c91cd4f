# SPDX-License-Identifier: Apache-2.0
"""LFM2-VL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from vtc.core.images import ImageMap, Modality, grid_positions
from vtc.models.base import Adapter, UnsupportedModelError


class Lfm2VL(Adapter):
    """Images of any size; each tile is a separate image. Most layers are convolutions, and a token
    cannot be dropped from what they have read: methods act before the language model only."""

    name: ClassVar[str] = "lfm2_vl"
    model_types: ClassVar[tuple[str, ...]] = ("lfm2_vl",)
    projects_patches: ClassVar[bool] = False
    stages: ClassVar[tuple[str, ...]] = ("sequence",)
    unread: ClassVar[str] = "its images are padded to the largest of a batch"

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        sizes = (given["spatial_shapes"] // self.model.config.downsample_factor).tolist()
        return [[ImageMap(grid_positions(rows, columns))] for rows, columns in sizes]

    def check_layers(self, layers: Sequence[int]) -> None:
        if layers:
            raise UnsupportedModelError(
                "model: tokens cannot be dropped between layers of LFM2-VL, whose convolutions "
                "have already read them; use a method that acts before the language model"
            )
