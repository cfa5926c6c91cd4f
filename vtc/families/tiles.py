# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision: tiles laid side by side, rows that end in a
newline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Backbone, Family, ImageMap, Modality, grid_positions


class LlavaNext(Family):
    """An image is a thumbnail and a plane of tiles, cut to the picture's shape, each row of which
    ends in a learned newline. Newlines are no vision tokens; that of an emptied row goes."""

    name: ClassVar[str] = "llava_next"
    model_types: ClassVar[tuple[str, ...]] = ("llava_next", "llava_next_video")
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    video: ClassVar[bool] = True

    def image_maps(
        self, backbone: Backbone, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        if modality == "video":
            return self.clip_maps(backbone, given, features)
        side = self.side(backbone)
        maps, first = [], 0
        for i, own in enumerate(features):
            tiles = self.tiles(backbone, given, i)
            # The model's own packing, run on numbers: each token says which patch it is.
            numbers = torch.arange(first, first + tiles * side * side, dtype=torch.float64)
            first += tiles * side * side
            packed = self.pack(backbone, given, i, numbers.view(tiles, side * side, 1))
            maps.append([self._map(packed, side, numbers[0], len(own))])
        return maps

    def side(self, backbone: Backbone) -> int:
        """Patches along a side of a tile."""
        vision = backbone.model.config.vision_config
        return vision.image_size // vision.patch_size

    def tiles(self, backbone: Backbone, given: Mapping[str, Any], i: int) -> int:
        """Tiles of image `i`, the thumbnail included."""
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        config = backbone.model.config
        return image_size_to_num_patches(
            image_size=given["image_sizes"][i],
            grid_pinpoints=config.image_grid_pinpoints,
            patch_size=config.vision_config.image_size,
        )

    def pack(self, backbone: Backbone, given: Mapping[str, Any], i: int, numbers: Tensor) -> Tensor:
        """(n,) what the model makes of one number a patch, (tiles, patches, 1); -1 at newlines."""
        packed, _ = backbone.base.pack_image_features(
            [numbers],
            given["image_sizes"][i : i + 1],
            vision_feature_select_strategy="full",
            image_newline=numbers.new_full((1,), -1),
        )
        return packed[0][:, 0]

    def _map(self, packed: Tensor, side: int, first: Tensor, n: int) -> ImageMap:
        if len(packed) != n:
            raise RuntimeError(f"an image has {n} features, but its tiles give {len(packed)}")
        area = side * side
        separator = packed < 0
        # Bilinear shrinking of large planes leaves fractions: the nearest patch stands for them.
        patch = torch.where(separator, -1, packed.round().long())
        tile = torch.where(separator, 0, (patch - first.long()) // area)
        grid = torch.zeros(n, 3, dtype=torch.long)
        plane = torch.arange(n) >= area
        grid[:area] = grid_positions(side, side)
        if n > area:
            ends = separator & plane
            # Each row of the plane ends in a newline, so rows are counted by the newlines before.
            row = ends.cumsum(0) - ends.long()
            grid[plane, 1] = row[plane]
            begins = torch.zeros(n, dtype=torch.long)
            begins[area:] = area
            last = torch.where(ends, torch.arange(n) + 1, begins).cummax(0).values
            last = torch.cat([last.new_full((1,), area), last[:-1]])
            grid[plane, 2] = (torch.arange(n) - last)[plane]
        if int(plane.sum()) == 1:  # one tile, and a newline after it that ends the image
            grid[separator] = torch.tensor([0, -2, 0])
            return ImageMap(grid, separator=separator, patches=patch[:, None])
        # A newline belongs to the plane of tiles, not to the thumbnail.
        crop = torch.where(separator, 1, tile)
        return ImageMap(grid, crop=crop, separator=separator, patches=patch[:, None])

    def clip_maps(
        self, backbone: Backbone, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        """Frames pooled to fewer tokens, one after the other."""
        frames = given["pixel_values_videos"].shape[1]
        maps = []
        for own in features:
            per_frame = len(own) // frames
            columns = math.isqrt(per_frame)
            maps.append([self._clip(frames, columns, len(own))])
        return maps

    def _clip(self, frames: int, side: int, n: int) -> ImageMap:
        grid = grid_positions(side, side).repeat(frames, 1)
        grid[:, 0] = torch.arange(frames).repeat_interleave(side * side)
        if n == len(grid):
            return ImageMap(grid)
        separator = torch.zeros(n, dtype=torch.bool)
        separator[-1] = True
        grid = torch.cat([grid, torch.tensor([[0, -2, 0]])])
        return ImageMap(grid, separator=separator)


class LlavaOnevision(LlavaNext):
    """As LLaVA-NeXT; large planes are shrunk, several images have no tiles, and a clip ends in a
    newline."""

    name: ClassVar[str] = "llava_onevision"
    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)

    def tiles(self, backbone: Backbone, given: Mapping[str, Any], i: int) -> int:
        counts = given.get("batch_num_images")
        if counts is not None:
            alone = [count == 1 for count in counts for _ in range(int(count))]
            if not alone[i]:
                return 1
        return super().tiles(backbone, given, i)

    def pack(self, backbone: Backbone, given: Mapping[str, Any], i: int, numbers: Tensor) -> Tensor:
        ratio = given.get("vision_aspect_ratio") or backbone.model.config.vision_aspect_ratio
        packed, _ = backbone.base.pack_image_features(
            [numbers],
            given["image_sizes"][i : i + 1],
            image_newline=numbers.new_full((1,), -1),
            vision_aspect_ratio=ratio,
        )
        return packed[0][:, 0]
