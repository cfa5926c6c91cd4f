# SPDX-License-Identifier: Apache-2.0
"""Kimi K2.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from vtc.core.images import ImageMap, Modality, grid_positions
from vtc.models.base import Adapter


class KimiK25(Adapter):
    """Images of any size, latent attention, a mixture of experts."""

    name: ClassVar[str] = "kimi_k25"
    model_types: ClassVar[tuple[str, ...]] = ("kimi_k25",)
    frames: ClassVar[bool] = True
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    reads_tower: ClassVar[bool] = False

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        sizes = given["image_grid_thw" if modality == "image" else "video_grid_thw"].tolist()
        maps = []
        for own, (frames, rows, columns) in zip(features, sizes, strict=True):
            by = round((rows * columns / len(own)) ** 0.5)
            maps.append([ImageMap(grid_positions(rows // by, columns // by), tiles=frames)])
        return maps
