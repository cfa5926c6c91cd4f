# SPDX-License-Identifier: Apache-2.0
"""LLaVA 1.5, ViP-LLaVA and Video-LLaVA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import nn

from vtc.core.images import ImageMap, Modality
from vtc.models.base import Adapter


class Llava(Adapter):
    """`LlavaForConditionalGeneration`; tested with the towers CLIP, SigLIP, SigLIP 2, DINOv2,
    DINOv3, ViT, DeiT, BEiT, AIMv2, MLCD and InternViT, and with Llama, Qwen2 and Mistral decoders.
    Registers, and the padding of SigLIP 2, are vision tokens, as they are in the model; tokens of
    such an image have places in one row only."""

    name: ClassVar[str] = "llava"
    model_types: ClassVar[tuple[str, ...]] = ("llava",)


class VipLlava(Adapter):
    """Concatenated features of several tower layers, then as LLaVA. The features of a token that
    was merged in the tower are, of the layers before, those of its first patch."""

    name: ClassVar[str] = "vipllava"
    model_types: ClassVar[tuple[str, ...]] = ("vipllava",)
    stages: ClassVar[tuple[str, ...]] = ("encoder", "sequence", "layers")


class VideoLlava(Adapter):
    """Two towers, for images and for clips. A frame's [CLS] is a separator, dropped if its frame is
    empty."""

    name: ClassVar[str] = "video_llava"
    model_types: ClassVar[tuple[str, ...]] = ("video_llava",)
    since: ClassVar[Mapping[str, str]] = {"video_llava": "5.21"}
    stages: ClassVar[tuple[str, ...]] = ("encoder", "sequence", "layers")
    joins: ClassVar[tuple[Modality, ...]] = ("video",)
    video: ClassVar[bool] = True

    @classmethod
    def bind(cls, model: nn.Module) -> Self:
        """As in `Adapter`; `tower` is the image tower."""
        found = super().bind(model)
        return replace(found, tower=found.base.image_tower)

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        maps = super().image_maps(modality, given, features)
        if modality == "image":
            return maps
        maps = []
        for i, own in enumerate(features):
            n = len(own) - 1
            grid = torch.cat([torch.tensor([[0, -1, 0]]), self.grid(n, None)])
            separator = torch.zeros(n + 1, dtype=torch.bool)
            separator[0] = True
            # [CLS] passes the projector, too.
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

    def tower_of(self, modality: Modality) -> Any:
        return self.tower if modality == "image" else self.base.video_tower

    def prefix(self, given: Mapping[str, Any]) -> int:
        if "pixel_values_videos" in given:  # [CLS] of a frame is a separator among its tokens
            return int(self.has_cls())
        return super().prefix(given)
