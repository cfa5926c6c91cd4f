# SPDX-License-Identifier: Apache-2.0
"""Muse Glimmer and Muse Spark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.core.images import ImageMap, Modality, grid_positions, merged_patches
from vtc.models.base import UnsupportedModelError
from vtc.models.packed import Packed


class MuseGlimmer(Packed):
    """Images and clips of any size. Layers with a window have rotary positions, those with full
    attention have none. Muse Spark is tested without audio."""

    name: ClassVar[str] = "muse_glimmer, muse_spark"
    model_types: ClassVar[tuple[str, ...]] = ("muse_glimmer", "muse_spark")
    stages: ClassVar[tuple[str, ...]] = ("encoder", "sequence", "layers")
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

    def maps(self, modality: Modality, given: Mapping[str, Any]) -> list[ImageMap]:
        by, maps, first = self.tower.merge_size, [], 0
        for frames, rows, columns in self.grids(modality, given):
            plane, area = grid_positions(rows // by, columns // by), rows * columns
            grid = torch.cat([plane] * frames)
            grid[:, 0] = torch.arange(frames).repeat_interleave(len(plane))
            starts = range(first, first + frames * area, area)
            patches = torch.cat([merged_patches(rows, columns, by, start) for start in starts])
            first += frames * area
            maps.append(ImageMap(grid, patches=patches))
        return maps

    def tower_order(self, given: Mapping[str, Any]) -> Tensor:
        from transformers.vision_utils import get_vision_window_index

        # Windows are counted in patches, and may cut through the square of a token.
        windows, _ = get_vision_window_index(
            given.get("image_grid_thw", given.get("video_grid_thw")),
            self.tower.spatial_merge_size,
            self.tower.window_size,
            self.tower.patch_size,
        )
        return torch.as_tensor(windows).cpu().argsort()

    def projector(self) -> Any:
        return self.base.vision_adapter

    def states_from(self) -> Any:
        return self.tower.layers[-1]

    def patch_states(self, given: Tensor, output: Any) -> Tensor:
        # Normed here as after the windows: the states lie in the tower's order.
        return self.tower.ln_post(output)

    def encoder_layers(self) -> list[Any]:
        return self._with_parts(list(self.tower.layers))
