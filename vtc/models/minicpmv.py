# SPDX-License-Identifier: Apache-2.0
"""MiniCPM-V 4.6 and 4.7, and MiniCPM-OCR."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.core.images import ImageMap, Modality, grid_positions, merged_patches
from vtc.models.base import Adapter
from vtc.models.packed import Packed
from vtc.models.qwen import QwenVL


class MiniCPMV(Packed):
    """Images of any size; each slice is a separate image. Most layers are recurrent, as in Qwen3.5.
    The tower joins squares of patches between two of its layers: a token's patches are the joined
    ones, and of layers before that all that those were made of. Clips are not tested."""

    model_types: ClassVar[tuple[str, ...]] = ("minicpmv4_6", "minicpm_ocr")
    name: ClassVar[str] = ", ".join(model_types)
    stages: ClassVar[tuple[str, ...]] = ("encoder", "sequence", "layers")
    encoder_parts: ClassVar[tuple[str, str, str, str]] = Adapter.encoder_parts

    def placeholders(self, output: Any, given: Mapping[str, Any]) -> dict[Modality, Tensor]:
        clip = given["token_id"] == self.model.config.video_token_id
        return {"video" if clip else "image": output[..., 0]}

    def grids(self, modality: Modality, given: Mapping[str, Any]) -> list[tuple[int, int, int]]:
        sizes = given["target_sizes" if modality == "image" else "target_sizes_videos"]
        return [(1, int(rows), int(columns)) for rows, columns in sizes.tolist()]

    def side(self, given: Mapping[str, Any]) -> int:
        """Patches along the side of the squares that the tower joins; 1 if it does not."""
        mode = given.get("downsample_mode") or self.model.config.downsample_mode
        return 1 if mode == "4x" else 2

    def maps(self, modality: Modality, given: Mapping[str, Any]) -> list[ImageMap]:
        inside, maps, first = self.side(given), [], 0
        by = self.base.merger.merge_kernel_size[0] ** self.base.merger.merger_times
        for _, rows, columns in self.grids(modality, given):
            r, c = rows // inside, columns // inside
            patches = merged_patches(r, c, by, first)
            maps.append(ImageMap(grid_positions(r // by, c // by), patches=patches))
            first += r * c
        return maps

    def patches_at(self, layer: int, patches: Tensor, given: Mapping[str, Any]) -> Tensor:
        by = self.side(given)
        if by == 1 or layer > self.tower.config.insert_layer_id:
            return patches
        modality: Modality = "image" if "target_sizes" in given else "video"
        squares, first = [], 0
        for _, rows, columns in self.grids(modality, given):
            squares.append(merged_patches(rows, columns, by, first))
            first += rows * columns
        return torch.cat(squares)[patches].flatten(1)

    def projector(self) -> Any:
        return self.base.merger

    def states_from(self) -> Any:
        return self.tower.post_layernorm

    def patch_states(self, given: Tensor, output: Any) -> Tensor:
        return output

    def encoder_attend(self, layer: Any, hidden: Tensor, given: Mapping[str, Any]) -> Tensor:
        return Adapter.encoder_attend(self, layer, hidden, given)

    def encoder_tiles(
        self, modality: Modality, given: Mapping[str, Any], rows: int, length: int
    ) -> list[tuple[int, Tensor, Tensor]]:
        tiles = super().encoder_tiles(modality, given, rows, length)
        if sum(units.numel() for *_, units in tiles) == length:
            return tiles
        # Before the squares are joined.
        return [(row, fixed, self.patches_at(0, units, given)) for row, fixed, units in tiles]

    def encoder_projectors(self) -> list[Any]:
        return []  # the merger divides its input by images


class MiniCPMV47(MiniCPMV):
    """As MiniCPM-V 4.6, with M-RoPE: the slices of an image share one canvas."""

    name: ClassVar[str] = "minicpmv4_7"
    model_types: ClassVar[tuple[str, ...]] = ("minicpmv4_7",)
    axial: ClassVar[bool] = True
    positions: ClassVar[str] = "places in the picture"

    def rotary(self, layer: int, hidden: Tensor, positions: Tensor) -> Any:
        return QwenVL.rotary(self, layer, hidden, positions)  # type: ignore[arg-type]
