# SPDX-License-Identifier: Apache-2.0
"""LFM2-VL and LFM3-VL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.core.images import ImageMap, Modality, grid_positions, merged_patches
from vtc.models.base import Adapter, UnsupportedModelError
from vtc.models.qwen_like import OneAxis


class Lfm2VL(Adapter):
    """Images of any size; each tile is a separate image. Most layers are convolutions: a
    token that is dropped between layers stays in what they have read, and no later layer sees
    it."""

    name: ClassVar[str] = "lfm2_vl"
    model_types: ClassVar[tuple[str, ...]] = ("lfm2_vl",)
    projects_patches: ClassVar[bool] = False
    stages: ClassVar[tuple[str, ...]] = ("encoder", "sequence", "layers")
    decoder_parts: ClassVar[tuple[str, str, str]] = (
        *("operator_norm", "feed_forward", "embedding_norm"),
    )

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        by, padded = self.model.config.downsample_factor, given["pixel_values"].shape[1]
        maps = []
        for i, (rows, columns) in enumerate(given["spatial_shapes"].tolist()):
            grid = grid_positions(rows // by, columns // by)
            patches = merged_patches(rows, columns, by, i * padded)
            maps.append([ImageMap(grid, patches=patches, padded=padded)])
        return maps

    def states_from(self) -> Any:
        return self.tower.post_layernorm

    def patch_states(self, given: Tensor, output: Any) -> Tensor:
        return output

    def encoder_layers(self) -> list[Any]:
        return self._with_parts(list(self.tower.encoder.layers))

    def encoder_tiles(
        self, modality: Modality, given: Mapping[str, Any], rows: int, length: int
    ) -> list[tuple[int, Tensor, Tensor]]:
        # Padding, which nothing attends to, is in no tile and does not run.
        tiles = []
        for row, (height, width) in enumerate(given["spatial_shapes"].tolist()):
            units = merged_patches(height, width, self.model.config.downsample_factor)
            loose = torch.ones(height * width, dtype=torch.bool)
            loose[units.flatten()] = False  # what fills no square, and yields no token
            tiles.append((row, loose.nonzero()[:, 0], units))
        return tiles

    def encoder_projectors(self) -> list[Any]:
        return []  # the projector unfolds the grid


class Lfm3VL(OneAxis):
    """Images and clips of any size. Most layers are convolutions, as in LFM2-VL; others have full
    attention or a window. So it is in the tower: its layers are counted without convolutions, and
    the last is the last that attends."""

    name: ClassVar[str] = "lfm3_vl"
    model_types: ClassVar[tuple[str, ...]] = ("lfm3_vl",)
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    decoder_parts: ClassVar[tuple[str, str, str]] = Lfm2VL.decoder_parts
    unmerged: ClassVar[str] = (
        "convolutions between its layers of attention read the neighbours of each patch"
    )

    def projector(self) -> Any:
        return self.base.multi_modal_projector

    def tower_attention(self) -> list[Any]:
        found = [layer.self_attn for layer in self.tower.layers if layer.is_attention_layer]
        if not found:
            raise UnsupportedModelError(
                "model: all layers of its vision tower are convolutions, without attention and keys"
            )
        return found
