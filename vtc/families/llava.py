# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5 and models of its shape: one image, one grid of patches, one token a patch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from .base import Backbone, Family, ImageMap, Modality


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
    """Two towers, for images and for clips; all tokens of a frame count, its [CLS] too."""

    name: ClassVar[str] = "video_llava"
    model_types: ClassVar[tuple[str, ...]] = ("video_llava",)
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    joins_runs: ClassVar[bool] = True
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
        # The other tower's patches are not those that a method could read.
        return [[ImageMap(found.grid) for found in of_one] for of_one in maps]


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

    def image_maps(
        self, backbone: Backbone, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        # The tower joins patches into visual words; its attention does not map onto these here.
        return [[ImageMap(self.grid(backbone, len(own), None))] for own in features]


class Convolutional(Family):
    """Towers without attention of a plain kind: tokens have a grid, but nothing of the tower can
    be read."""

    name: ClassVar[str] = "got_ocr2, fast_vlm, perception_lm"
    model_types: ClassVar[tuple[str, ...]] = ("got_ocr2", "fast_vlm", "perception_lm")
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")

    def image_maps(
        self, backbone: Backbone, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        return [[ImageMap(self.grid(backbone, len(own), None))] for own in features]
