# SPDX-License-Identifier: Apache-2.0
"""Kimi K2.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.core.images import ImageMap, Modality, grid_positions, merged_patches
from vtc.models.packed import Packed


class KimiK25(Packed):
    """Images of any size, latent attention, a mixture of experts. A token joins a square of patches
    over all frames of its chunk."""

    name: ClassVar[str] = "kimi_k25"
    model_types: ClassVar[tuple[str, ...]] = ("kimi_k25",)
    frames: ClassVar[bool] = True
    stages: ClassVar[tuple[str, ...]] = ("encoder", "sequence", "layers")
    joins_frames: ClassVar[bool] = True

    def encoder_layers(self) -> list[Any]:
        return self._with_parts(list(self.tower.layers))

    def encoder_projectors(self) -> list[Any]:
        return []  # it receives patches by square

    def maps(self, modality: Modality, given: Mapping[str, Any]) -> list[ImageMap]:
        by, maps, first = int(self.tower.merge_kernel_size[0]), [], 0
        for frames, rows, columns in self.grids(modality, given):
            grid, area = grid_positions(rows // by, columns // by), rows * columns
            starts = range(first, first + frames * area, area)
            patches = torch.cat([merged_patches(rows, columns, by, s) for s in starts], dim=1)
            first += frames * area
            maps.append(ImageMap(grid, patches=patches, tiles=frames))
        return maps

    def projector(self) -> Any:
        return self.base.mm_projector

    def states_from(self) -> Any:
        return self.tower.final_layernorm

    def patch_states(self, given: Tensor, output: Any) -> Tensor:
        return output
