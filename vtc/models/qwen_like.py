# SPDX-License-Identifier: Apache-2.0
"""Relatives of Qwen-VL: EXAONE 4.5, HyperCLOVA X Vision, VideoLLaMA 3, PaddleOCR-VL and
ERNIE 4.5 VL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.core.images import ImageMap, Modality, grid_positions, merged_patches
from vtc.models.base import Adapter
from vtc.models.packed import Packed
from vtc.models.qwen import QwenVL


class OneAxis(QwenVL):
    """The tower of Qwen2.5-VL with a language model whose positions count tokens."""

    model_types: ClassVar[tuple[str, ...]] = ("exaone4_5", "hyperclovax_vision_v2")
    name: ClassVar[str] = ", ".join(model_types)
    since: ClassVar[Mapping[str, str]] = {"exaone4_5": "5.21"}
    axial: ClassVar[bool] = False
    positions: ClassVar[str] = "one axis"

    def rotary(self, layer: int, hidden: Tensor, positions: Tensor) -> Any:
        return Adapter.rotary(self, layer, hidden, positions)

    def can_peek(self, layer: int) -> bool:
        return True

    def attention_input(self, layer: int, hidden: Tensor) -> Tensor:
        # EXAONE 4 has norms behind attention and MLP only.
        if not hasattr(self.layers[layer], self.decoder_parts[0]):
            return hidden
        return super().attention_input(layer, hidden)

    def rotates(self, layer: int) -> bool:
        attention = self.attention_of(layer)
        if not hasattr(attention, "is_sliding"):
            return super().rotates(layer)
        # EXAONE 4 with windows rotates in layers with a window only.
        return attention.sliding_window is None or bool(attention.is_sliding)


class VideoLlama3(Packed):
    """Images and clips of any size, positions that count tokens. The processor of clips must be
    called with `use_token_compression=False`: what it drops itself vtc cannot place."""

    name: ClassVar[str] = "video_llama_3"
    model_types: ClassVar[tuple[str, ...]] = ("video_llama_3",)
    stages: ClassVar[tuple[str, ...]] = ("encoder", "sequence", "layers")
    encoder_parts: ClassVar[tuple[str, str, str, str]] = Adapter.encoder_parts
    video: ClassVar[bool] = True

    def projector(self) -> Any:
        return self.base.projector

    def states_from(self) -> Any:
        return self.tower.post_layernorm

    def patch_states(self, given: Tensor, output: Any) -> Tensor:
        return output

    def maps(self, modality: Modality, given: Mapping[str, Any]) -> list[ImageMap]:
        # `get_video_features` calls `get_image_features` with its own arguments' names.
        merged = given["image_merge_sizes" if modality == "image" else "video_merge_sizes"].tolist()
        maps, first = [], 0
        for (frames, rows, columns), by in zip(self.grids(modality, given), merged, strict=True):
            grid = torch.cat([grid_positions(rows // by, columns // by)] * frames)
            grid[:, 0] = torch.arange(frames).repeat_interleave(len(grid) // frames)
            # The processor orders patches so that those of one token are adjacent.
            patches = torch.arange(first, first + len(grid) * by * by).view(-1, by * by)
            first += len(grid) * by * by
            maps.append(ImageMap(grid, patches=patches))
        return maps


class PaddleOCRVL(QwenVL):
    """Images of any size, M-RoPE; the tower sees patches in raster order."""

    name: ClassVar[str] = "paddleocr_vl"
    model_types: ClassVar[tuple[str, ...]] = ("paddleocr_vl",)
    encoder_parts: ClassVar[tuple[str, str, str, str]] = Adapter.encoder_parts
    video: ClassVar[bool] = False

    def encoder_layers(self) -> list[Any]:
        return self._with_parts(list(self.tower.vision_model.encoder.layers))

    def encoder_tiles(
        self, modality: Modality, given: Mapping[str, Any], rows: int, length: int
    ) -> list[tuple[int, Tensor, Tensor]]:
        return Packed.encoder_tiles(self, modality, given, rows, length)

    def encoder_projectors(self) -> list[Any]:
        return []  # the projector divides its input by images

    def projector(self) -> Any:
        return self.base.projector

    def states_from(self) -> Any:
        return self.base.projector

    def patch_states(self, given: Tensor, output: Any) -> Tensor:
        return given

    def maps(self, modality: Modality, given: Mapping[str, Any]) -> list[ImageMap]:
        by, maps, first = self.model.config.vision_config.spatial_merge_size, [], 0
        for _, rows, columns in self.grids(modality, given):
            grid = grid_positions(rows // by, columns // by)
            maps.append(ImageMap(grid, patches=merged_patches(rows, columns, by, first)))
            first += rows * columns
        return maps


class Ernie45VL(QwenVL):
    """Experts of their own for vision tokens, M-RoPE. Two frames of a clip become one."""

    name: ClassVar[str] = "ernie4_5_vl_moe"
    model_types: ClassVar[tuple[str, ...]] = ("ernie4_5_vl_moe",)

    def encoder_tiles(
        self, modality: Modality, given: Mapping[str, Any], rows: int, length: int
    ) -> list[tuple[int, Tensor, Tensor]]:
        # Both frames of a token are one tile, though each attends to itself.
        return Packed.encoder_tiles(self, modality, given, rows, length)

    def encoder_projectors(self) -> list[Any]:
        return []  # the resampler pairs frames

    def projector(self) -> Any:
        return self.base.resampler_model

    def states_from(self) -> Any:
        return self.tower.ln

    def patch_states(self, given: Tensor, output: Any) -> Tensor:
        return output

    def maps(self, modality: Modality, given: Mapping[str, Any]) -> list[ImageMap]:
        if modality == "image":
            return super().maps(modality, given)
        side, depth = self.tower.spatial_merge_size, self.base.resampler_model.temporal_merge_size
        maps, first = [], 0
        for frames, rows, columns in self.grids(modality, given):
            plane = grid_positions(rows // side, columns // side)
            grid = torch.cat([plane] * (frames // depth))
            grid[:, 0] = torch.arange(frames // depth).repeat_interleave(len(plane))
            patches = torch.arange(first, first + frames * rows * columns)
            patches = patches.view(frames // depth, depth, len(plane), side * side)
            maps.append(ImageMap(grid, patches=patches.transpose(1, 2).flatten(0, 1).flatten(1)))
            first += frames * rows * columns
        return maps
