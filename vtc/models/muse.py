# SPDX-License-Identifier: Apache-2.0
"""Muse Glimmer and Muse Spark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.core.images import ImageMap, Modality, grid_positions
from vtc.models.base import Adapter, UnsupportedModelError


class MuseGlimmer(Adapter):
    """Images and clips of any size. Layers with a window have rotary positions, those with full
    attention have none. Muse Spark is tested without audio."""

    name: ClassVar[str] = "muse_glimmer, muse_spark"
    model_types: ClassVar[tuple[str, ...]] = ("muse_glimmer", "muse_spark")
    projects_patches: ClassVar[bool] = False
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    unread: ClassVar[str] = "vtc does not know which patches its tokens join"
    video: ClassVar[bool] = True

    def check(self) -> None:
        super().check()
        kinds = {(self.layer_type(i), self.rotates(i)) for i in range(len(self.layers))}
        if len(kinds) != len({kind for kind, _ in kinds}):
            raise UnsupportedModelError(
                "model: some layers of one kind have rotary positions and others none; vtc takes "
                "rotary positions in all layers with a window and in no other"
            )

    def rotates(self, layer: int) -> bool:
        return bool(self.decoder.config.layer_rope_theta[layer])

    def rotary(self, layer: int, hidden: Tensor, positions: Tensor) -> Any:
        return super().rotary(layer, hidden, positions) if self.rotates(layer) else None

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        sizes = given["image_grid_thw" if modality == "image" else "video_grid_thw"].tolist()
        by, maps = self.tower.merge_size, []
        for frames, rows, columns in sizes:
            plane = grid_positions(rows // by, columns // by)
            grid = torch.cat([plane] * frames)
            grid[:, 0] = torch.arange(frames).repeat_interleave(len(plane))
            maps.append([ImageMap(grid)])
        return maps
