# SPDX-License-Identifier: Apache-2.0
"""HunYuan-VL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.core.images import ImageMap, Modality, grid_positions, merged_patches
from vtc.models.base import Adapter
from vtc.models.qwen import QwenVL


class HunYuanVL(QwenVL):
    """HunyuanOCR: images of any size, M-RoPE with three or four axes (XD-RoPE). Features begin and
    end each image and end each of its rows; they go with the last token that they stand beside. The
    axis of images counts through a batch, so that the model itself gives a row other logits behind
    other images."""

    name: ClassVar[str] = "hunyuan_vl"
    model_types: ClassVar[tuple[str, ...]] = ("hunyuan_vl",)
    since: ClassVar[Mapping[str, str]] = {"hunyuan_vl": "5.21"}
    stages: ClassVar[tuple[str, ...]] = ("encoder", "sequence", "layers")
    video: ClassVar[bool] = False
    encoder_parts: ClassVar[tuple[str, str, str, str]] = Adapter.encoder_parts

    def projector(self) -> Any:
        return self.tower.patch_merger

    def states_from(self) -> Any:
        return self.tower.layers[-1]  # the merger runs once per image

    def patch_states(self, given: Tensor, output: Any) -> Tensor:
        return output

    def encoder_layers(self) -> list[Any]:
        return self._with_parts(list(self.tower.layers))

    def encoder_attend(self, layer: Any, hidden: Tensor, given: Mapping[str, Any]) -> Tensor:
        return Adapter.encoder_attend(self, layer, hidden, given)

    def encoder_tiles(
        self, modality: Modality, given: Mapping[str, Any], rows: int, length: int
    ) -> list[tuple[int, Tensor, Tensor]]:
        none, by, tiles, first = torch.empty(0, dtype=torch.long), self._side(), [], 0
        for _, height, width in self.grids(modality, given):
            tiles.append((0, none, merged_patches(height, width, by, first)))
            first += height * width
        return tiles

    def encoder_projectors(self) -> list[Any]:
        return []  # the merger convolves the grid, square by square

    def _side(self) -> int:
        """Patches along the side of a token's square."""
        return int(self.tower.config.spatial_merge_size)

    def rotary(self, layer: int, hidden: Tensor, positions: Tensor) -> Any:
        return Adapter.rotary(self, layer, hidden, positions)

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        by, maps, first = self._side(), [], 0
        for _, rows, columns in given["image_grid_thw"].tolist():
            r, c = rows // by, columns // by
            whole = torch.tensor([[0, -2, 0]])
            grid = torch.cat([whole, grid_positions(r, c + 1), whole])
            ends = (grid[:, 1] < 0) | (grid[:, 2] == c)
            patches = torch.full((len(grid), by * by), -1)
            patches[~ends] = merged_patches(rows, columns, by, first)
            first += rows * columns
            maps.append([ImageMap(grid, separator=ends, patches=patches)])
        return maps
