# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5 and models of its shape: one image, one grid of patches, one token a patch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from vtc.models.base import Backbone, Family, ImageMap, Modality, grid_positions


class Llava(Family):
    """`LlavaForConditionalGeneration` with a CLIP or SigLIP tower; tested with Llama, Qwen2 and
    Mistral decoders."""

    name: ClassVar[str] = "llava"
    model_types: ClassVar[tuple[str, ...]] = ("llava",)


class VipLlava(Family):
    """Features of several tower layers joined, then as LLaVA."""

    name: ClassVar[str] = "vipllava"
    model_types: ClassVar[tuple[str, ...]] = ("vipllava",)
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")


class VideoLlava(Family):
    """Two towers, for images and for clips. The [CLS] of a frame is a separator: it goes when its
    frame is empty."""

    name: ClassVar[str] = "video_llava"
    model_types: ClassVar[tuple[str, ...]] = ("video_llava",)
    since: ClassVar[Mapping[str, str]] = {"video_llava": "5.21"}
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    joins: ClassVar[tuple[Modality, ...]] = ("video",)
    video: ClassVar[bool] = True

    def backbone(self, model: nn.Module) -> Backbone:
        found = super().backbone(model)
        return Backbone(found.model, found.base, found.decoder, found.base.image_tower)

    def image_maps(
        self, backbone: Backbone, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        maps = super().image_maps(backbone, modality, given, features)
        if modality == "image":
            return maps
        maps = []
        for i, own in enumerate(features):
            n = len(own) - 1
            grid = torch.cat([torch.tensor([[0, -1, 0]]), self.grid(backbone, n, None)])
            separator = torch.zeros(n + 1, dtype=torch.bool)
            separator[0] = True
            # [CLS] goes through the projector as well.
            states = torch.arange(i * (n + 1), (i + 1) * (n + 1))
            patches = torch.where(separator, -1, states - i - 1)
            maps.append(
                [
                    ImageMap(
                        grid, separator=separator, patches=patches[:, None], states=states[:, None]
                    )
                ]
            )
        return maps

    def tower_of(self, backbone: Backbone, modality: Modality) -> Any:
        return backbone.tower if modality == "image" else backbone.base.video_tower

    def prefix(self, backbone: Backbone, given: Mapping[str, Any]) -> int:
        if "pixel_values_videos" in given:  # [CLS] of a frame is a separator among its tokens
            return int(self.has_cls(backbone))
        return super().prefix(backbone, given)


class DeepseekVL(Family):
    """A SigLIP tower (the hybrid has a SAM tower beside it) and an aligner."""

    name: ClassVar[str] = "deepseek_vl"
    model_types: ClassVar[tuple[str, ...]] = ("deepseek_vl", "deepseek_vl_hybrid")
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")


class Ovis2(Family):
    """Visual tokens are mixtures of a table of visual words; indicators of the image are text."""

    name: ClassVar[str] = "ovis2"
    model_types: ClassVar[tuple[str, ...]] = ("ovis2",)
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    tower: ClassVar[bool] = False

    def image_maps(
        self, backbone: Backbone, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        # The tower joins patches into visual words; its attention does not map onto these here.
        return [[ImageMap(self.grid(backbone, len(own), None))] for own in features]


class Convolutional(Family):
    """Towers without attention of a plain kind: tokens have a grid, but nothing of the tower can
    be read."""

    name: ClassVar[str] = "got_ocr2, fast_vlm"
    model_types: ClassVar[tuple[str, ...]] = ("got_ocr2", "fast_vlm")
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    tower: ClassVar[bool] = False

    def image_maps(
        self, backbone: Backbone, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        return [[ImageMap(self.grid(backbone, len(own), None))] for own in features]


class PerceptionLM(Convolutional):
    """A tower of timm. The thumbnail and the tiles, or the frames of a clip, stand side by side
    and are one image."""

    name: ClassVar[str] = "perception_lm"
    model_types: ClassVar[tuple[str, ...]] = ("perception_lm",)
    tower: ClassVar[bool] = False
    joins: ClassVar[tuple[Modality, ...]] = ("image", "video")
    video: ClassVar[bool] = True
    clips_as_images: ClassVar[bool] = True

    def image_maps(
        self, backbone: Backbone, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        tiles = given["pixel_values"].shape[1]
        maps = super().image_maps(backbone, modality, given, features)
        return [[replace(found, group=i // tiles)] for i, (found,) in enumerate(maps)]

    def join(self, maps: list[ImageMap], modality: Modality) -> ImageMap:
        found = super().join(maps, modality)
        if found.crop is None:
            return found
        count = len(maps)  # here the thumbnail comes first
        return replace(found, crop=(found.crop - 1) % count)


class KimiK25(Family):
    """Kimi K2.5: images of any size, latent attention, a mixture of experts."""

    name: ClassVar[str] = "kimi_k25"
    model_types: ClassVar[tuple[str, ...]] = ("kimi_k25",)
    frames: ClassVar[bool] = True
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    tower: ClassVar[bool] = False

    def image_maps(
        self, backbone: Backbone, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        sizes = given["image_grid_thw" if modality == "image" else "video_grid_thw"].tolist()
        maps = []
        for own, (frames, rows, columns) in zip(features, sizes, strict=True):
            by = round((rows * columns / len(own)) ** 0.5)
            maps.append([ImageMap(grid_positions(rows // by, columns // by), tiles=frames)])
        return maps
