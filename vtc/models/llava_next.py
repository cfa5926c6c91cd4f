# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision: tiles side by side, in rows that end in
`image_newline` tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.core.images import ImageMap, Modality, grid_positions, merged_patches
from vtc.models.base import Adapter, UnsupportedModelError


class LlavaNext(Adapter):
    """An image is a thumbnail and a plane of tiles, cropped to the picture's shape, whose rows end
    in `image_newline` tokens. These do not count as vision tokens; that of an empty row is
    dropped."""

    name: ClassVar[str] = "llava_next"
    model_types: ClassVar[tuple[str, ...]] = ("llava_next", "llava_next_video")
    since: ClassVar[Mapping[str, str]] = {"llava_next_video": "5.21"}
    stages: ClassVar[tuple[str, ...]] = ("encoder", "sequence", "layers")
    video: ClassVar[bool] = True

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        if modality == "video":
            return self.clip_maps(given, features)
        side = self.side()
        maps, first = [], 0
        for i, own in enumerate(features):
            tiles = self.tiles(given, i)
            across = self.across(given, i) if tiles > 1 else 1
            # The model's packing, applied to places, shows which patch each token comes from.
            tile = torch.arange(tiles)[:, None].clamp_min(1) - 1
            place = torch.arange(side * side)[None]
            row = tile // across * side + place // side
            column = tile % across * side + place % side
            places = torch.stack([row, column], dim=2).to(torch.float64)
            packed = self.pack(given, i, places)
            found = self._map(packed, side, across, first, len(own))
            maps.append([replace(found, tiles=tiles)])
            first += tiles * side * side
        return maps

    def encoder_units(self, modality: Modality, n: int) -> Tensor:
        # The patches of a clip are pooled before the projector.
        return self.pooled()[0] if modality == "video" else super().encoder_units(modality, n)

    def side(self) -> int:
        """Patches along a tile's side."""
        vision = self.model.config.vision_config
        return vision.image_size // vision.patch_size

    def tiles(self, given: Mapping[str, Any], i: int) -> int:
        """Number of tiles of image `i`, including the thumbnail.

        Args:
            given: the arguments of `get_image_features`.
            i: number of the image in the batch, from 0.

        Returns:
            The number of tiles.
        """
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        config = self.model.config
        return image_size_to_num_patches(
            image_size=given["image_sizes"][i],
            grid_pinpoints=config.image_grid_pinpoints,
            patch_size=config.vision_config.image_size,
        )

    def across(self, given: Mapping[str, Any], i: int) -> int:
        """Number of columns in the plane of tiles of image `i`.

        Args:
            given: the arguments of `get_image_features`.
            i: number of the image in the batch, from 0.

        Returns:
            The number of columns.
        """
        from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

        config = self.model.config
        return get_anyres_image_grid_shape(
            given["image_sizes"][i], config.image_grid_pinpoints, config.vision_config.image_size
        )[1]

    def pack(self, given: Mapping[str, Any], i: int, places: Tensor) -> Tensor:
        """Pack values of patches as the model packs their features.

        Args:
            given: the arguments of `get_image_features`.
            i: number of the image in the batch, from 0.
            places: (tiles, patches, 2) two values per patch.

        Returns:
            (n, 2) those of each token, -1 at newlines.
        """
        packed, _ = self.base.pack_image_features(
            [places],
            given["image_sizes"][i : i + 1],
            vision_feature_select_strategy="full",
            image_newline=places.new_full((2,), -1),
        )
        return packed[0]

    def _map(self, packed: Tensor, side: int, across: int, first: int, n: int) -> ImageMap:
        if len(packed) != n:
            raise RuntimeError(f"an image has {n} features, but its tiles give {len(packed)}")
        area = side * side
        separator = packed[:, 0] < 0
        # Large planes are resampled, which gives fractions: use the nearest patch.
        row, column = (packed + 0.5).floor().long().unbind(1)
        tile = row // side * across + column // side + 1
        tile[:area] = 0
        patch = first + tile * area + row % side * side + column % side
        patch = torch.where(separator, -1, patch)
        grid = torch.zeros(n, 3, dtype=torch.long)
        plane = torch.arange(n) >= area
        grid[:area] = grid_positions(side, side)
        if n > area:
            ends = separator & plane
            # Each row of the plane ends in a newline, so rows are counted by the newlines before.
            row = ends.cumsum(0) - ends.long()
            grid[plane, 1] = row[plane]
            last = torch.where(ends, torch.arange(n) + 1, area).cummax(0).values
            last = torch.cat([last.new_full((1,), area), last[:-1]])
            grid[plane, 2] = (torch.arange(n) - last)[plane]
        if int(plane.sum()) == 1:  # one tile, followed by a newline that ends the image
            grid[separator] = torch.tensor([0, -2, 0])
            return ImageMap(grid, separator=separator, patches=patch[:, None])
        # A newline belongs to the plane of tiles, not to the thumbnail.
        crop = torch.where(separator, 1, tile)
        return ImageMap(grid, crop=crop, separator=separator, patches=patch[:, None])

    def clip_maps(self, given: Mapping[str, Any], features: Any) -> list[list[ImageMap]]:
        """The map of each clip: frames pooled to fewer tokens, one after the other.

        Args:
            given: the arguments of `get_video_features`.
            features: a list of (n, d), one per clip.

        Returns:
            By clip, a list of its one map.
        """
        frames = given["pixel_values_videos"].shape[1]
        area = self.side() ** 2
        patches, states = self.pooled()
        maps = []
        for i, own in enumerate(features):
            frame = torch.arange(i * frames, (i + 1) * frames)[:, None, None]
            plain = self._clip(frames, math.isqrt(len(patches)), len(own))
            spare = (0, 0, 0, len(own) - frames * len(patches))  # a newline at the end
            of_clip = [
                torch.nn.functional.pad((frame * count + places).flatten(0, 1), spare, value=-1)
                for count, places in ((area, patches), (int(states.max()) + 1, states))
            ]
            maps.append([replace(plain, tiles=frames, patches=of_clip[0], states=of_clip[1])])
        return maps

    def pooled(self) -> tuple[Tensor, Tensor]:
        """Where a frame's n tokens come from.

        Returns:
            (n, m) its patches, and (n, k) its rows in the projector's input, that each token is
            pooled from.
        """
        side, by = self.side(), self.model.config.spatial_pool_stride
        patches = merged_patches(side, side, by)
        return patches, torch.arange(len(patches))[:, None]  # pooled before the projector

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
    """As LLaVA-NeXT, but large planes are resampled, prompts with several images are not tiled, and
    a clip ends in an `image_newline`. Where planes or clips are resampled, no patches can be merged
    in the tower."""

    name: ClassVar[str] = "llava_onevision"
    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)

    def check_encoder(self, modality: Modality, given: Mapping[str, Any]) -> None:
        if modality == "video":
            raise UnsupportedModelError(
                "model: LLaVA-OneVision makes the tokens of a clip by interpolating between the "
                "features of patches, which it cannot where some were merged away"
            )
        for i in range(len(given["image_sizes"])):
            if self.tiles(given, i) > 1 and self._resamples(given, i):
                raise UnsupportedModelError(
                    "model: LLaVA-OneVision resamples the features of an image of this size, which "
                    "interpolates between patches, and it cannot where some were merged away; "
                    "accepted are images that fill fewer tiles"
                )

    def _resamples(self, given: Mapping[str, Any], i: int) -> bool:
        """Whether the plane of image `i` is resampled: places then come out as fractions."""
        side = self.side()
        places = torch.arange(self.tiles(given, i) * side * side, dtype=torch.float64)
        places = places.view(-1, side * side, 1).expand(-1, -1, 2)
        packed = self.pack(given, i, places)
        plane = packed[side * side :, 0]
        return len(plane[plane >= 0].unique()) < int((plane >= 0).sum()) or bool(
            (plane != plane.round()).any()
        )

    def tiles(self, given: Mapping[str, Any], i: int) -> int:
        counts = given.get("batch_num_images")
        if counts is not None:
            alone = [count == 1 for count in counts for _ in range(int(count))]
            if not alone[i]:
                return 1
        return super().tiles(given, i)

    def pooled(self) -> tuple[Tensor, Tensor]:
        # Bilinear, after the projector: each token mixes two rows and two columns.
        side = self.side()
        count = math.ceil(side / 2)
        middle = ((torch.arange(count) + 0.5) * side / count - 0.5).clamp_min(0)
        low = middle.long()
        ends = torch.stack([low, (low + 1).clamp_max(side - 1)], dim=1)
        row, column = ends[:, None, :, None], ends[None, :, None, :]
        patches = (row * side + column).reshape(count * count, 4)
        return patches, patches

    def pack(self, given: Mapping[str, Any], i: int, places: Tensor) -> Tensor:
        ratio = given.get("vision_aspect_ratio") or self.model.config.vision_aspect_ratio
        packed, _ = self.base.pack_image_features(
            [places],
            given["image_sizes"][i : i + 1],
            image_newline=places.new_full((2,), -1),
            vision_aspect_ratio=ratio,
        )
        return packed[0]


class Granite4Vision(LlavaNext):
    """As LLaVA-NeXT, with a resampler for each of several decoder layers: vision tokens enter as
    zeros, and features are added before these layers. Methods see the first of them. A token's
    query reads a window of patches and stands at the place of some, which count as its patches: its
    signals are means over these, and states those that the first of the resamplers receives."""

    name: ClassVar[str] = "granite4_vision"
    model_types: ClassVar[tuple[str, ...]] = ("granite4_vision",)
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    unmerged: ClassVar[str] = (
        "each token mixes all patches of its window (a resampler), so that no group of patches "
        "becomes one token"
    )
    projects_patches: ClassVar[bool] = False
    video: ClassVar[bool] = False

    def features(self, output: Any) -> Any:
        return min(output.deepstack_features, key=lambda pair: pair[0])[1]

    def side(self) -> int:
        return int(super().side() * Fraction(self.base.downsample_rate))

    def pack(self, given: Mapping[str, Any], i: int, places: Tensor) -> Tensor:
        newline, sizes = places.new_full((2,), -1), given["image_sizes"][i : i + 1]
        packed: list[Tensor] = self.base.pack_image_features([places], sizes, "full", newline)
        return packed[0]

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        every = super().image_maps(modality, given, features)
        return [[replace(found, patches=self._at(found.patches)) for found in m] for m in every]

    def _at(self, tokens: Tensor | None) -> Tensor | None:
        """(n, m) the patches at the places of tokens (n, 1), numbered likewise, -1 at separators;
        `None` if patches lie at the places of two tokens."""
        side, whole = self.side(), super().side()
        if tokens is None or whole % side:
            return None
        tile, place = tokens[:, 0] // side**2, tokens[:, 0] % side**2
        own = merged_patches(whole, whole, whole // side)[place] + (tile * whole**2)[:, None]
        return torch.where(tokens < 0, -1, own)

    def projector(self) -> Any:
        config, base = self.model.config, self.base
        deep = [layer for _, layer in config.deepstack_layer_map]
        found = [*zip(deep, base.layerwise_projectors, strict=True)]
        found += zip(config.spatial_target_layers, base.spatial_projectors, strict=False)
        return min(found, key=lambda pair: pair[0])[1]

    def injects(self) -> tuple[int, ...]:
        config = self.model.config
        return tuple(
            sorted({*dict(config.deepstack_layer_map).values()} | {*config.spatial_target_layers})
        )

    def take_injected(self, kwargs: dict[str, Any]) -> tuple[Tensor, dict[int, Tensor]] | None:
        features, mask = kwargs.get("deepstack_features"), kwargs.get("vision_mask")
        if features is None or mask is None:
            return None
        kwargs["deepstack_features"] = kwargs["vision_mask"] = None
        return mask[..., 0], features
