# SPDX-License-Identifier: Apache-2.0
"""Families that join squares of patches into one token: InternVL, Aya Vision, Command A Vision,
Idefics, SmolVLM, Llama 4, Mistral 3, Kimi."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.models.base import Backbone, Family, ImageMap, Modality, merged_patches


class Shuffled(Family):
    """Square images, of which squares of patches become one token each ("pixel shuffle")."""

    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    projects_patches: ClassVar[bool] = False

    def per_side(self, backbone: Backbone) -> int:
        """Patches along a side of the square that one token is made of."""
        config = backbone.model.config
        if hasattr(config, "downsample_ratio"):
            return round(1 / config.downsample_ratio)
        return int(config.downsample_factor)

    def image_maps(
        self, backbone: Backbone, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        by, first, maps = self.per_side(backbone), 0, []
        for own in features:
            n = len(own)
            side = math.isqrt(n) * by
            patches = merged_patches(side, side, by, first)
            first += side * side
            maps.append([ImageMap(self.grid(backbone, n, None), patches=patches)])
        return maps


class InternVL(Shuffled):
    """Tiles stand side by side, the thumbnail last: together they are one image. A frame of a clip
    is an image of its own."""

    name: ClassVar[str] = "internvl"
    model_types: ClassVar[tuple[str, ...]] = ("internvl",)
    frames: ClassVar[bool] = True
    joins: ClassVar[tuple[Modality, ...]] = ("image",)

    def tower_attention(self, backbone: Backbone) -> list[Any]:
        layers = backbone.tower.encoder.layer
        return [layer.attention for layer in layers]


class CohereVision(Shuffled):
    """Aya Vision and Command A Vision. Each tile is an image of its own."""

    name: ClassVar[str] = "aya_vision, cohere2_vision"
    model_types: ClassVar[tuple[str, ...]] = ("aya_vision", "cohere2_vision")

    def per_side(self, backbone: Backbone) -> int:
        return int(backbone.model.config.downsample_factor)


class Idefics3(Shuffled):
    """Each tile, and each frame of a clip, is an image of its own: the model
    is not told which belong together."""

    name: ClassVar[str] = "idefics3"
    model_types: ClassVar[tuple[str, ...]] = ("idefics3",)
    merger: ClassVar[str] = "inputs_merger"

    def per_side(self, backbone: Backbone) -> int:
        return int(backbone.model.config.scale_factor)

    def placeholders(
        self, backbone: Backbone, output: Any, given: Mapping[str, Any]
    ) -> dict[Modality, Tensor]:
        return placeholder_ids(backbone, given)

    def image_maps(
        self, backbone: Backbone, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        config, by = backbone.model.config, self.per_side(backbone)
        side = config.vision_config.image_size // config.vision_config.patch_size
        n = (side // by) ** 2
        maps, first = [], 0
        for own in features:
            # One element holds all tiles of a sample.
            of_one = []
            for _ in range(own.shape[:-1].numel() // n):
                patches = merged_patches(side, side, by, first)
                first += side * side
                of_one.append(ImageMap(self.grid(backbone, n, None), patches=patches))
            maps.append(of_one)
        return maps


class SmolVLM(Idefics3):
    """As Idefics 3, with a mask of placeholders."""

    name: ClassVar[str] = "smolvlm"
    model_types: ClassVar[tuple[str, ...]] = ("smolvlm",)
    since: ClassVar[Mapping[str, str]] = {"smolvlm": "5.21"}
    frames: ClassVar[bool] = True
    merger: ClassVar[str] = "get_placeholder_mask"

    def placeholders(
        self, backbone: Backbone, output: Any, given: Mapping[str, Any]
    ) -> dict[Modality, Tensor]:
        return Family.placeholders(self, backbone, output, given)


class Idefics2(Family):
    """A perceiver makes a fixed number of tokens of each image, which have no places."""

    name: ClassVar[str] = "idefics2"
    model_types: ClassVar[tuple[str, ...]] = ("idefics2",)
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    tower: ClassVar[bool] = False
    merger: ClassVar[str] = "inputs_merger"

    def placeholders(
        self, backbone: Backbone, output: Any, given: Mapping[str, Any]
    ) -> dict[Modality, Tensor]:
        return placeholder_ids(backbone, given)

    def image_maps(
        self, backbone: Backbone, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        n = backbone.model.config.perceiver_config.resampler_n_latents
        row = torch.stack([torch.zeros(n).long(), torch.zeros(n).long(), torch.arange(n)], dim=1)
        return [[ImageMap(row)] * (own.shape[:-1].numel() // n) for own in features]


class Llama4(Shuffled):
    """Chunked and full attention layers, complex rotations. Each tile is an image of its own.

    Layers without rotary positions may scale queries by their place (`attn_temperature_tuning`),
    in steps of `floor_scale` tokens: below one step, by default 8192 tokens, results are exact.
    """

    name: ClassVar[str] = "llama4"
    model_types: ClassVar[tuple[str, ...]] = ("llama4",)
    tower: ClassVar[bool] = False
    attention: ClassVar[str] = "causal, in chunks"

    def features(self, output: Any) -> Any:
        return output.last_hidden_state

    def per_side(self, backbone: Backbone) -> int:
        return round(1 / backbone.model.config.vision_config.pixel_shuffle_ratio)


class Mistral3(Family):
    """Images of any size in one packed sequence of the tower; squares of patches become tokens."""

    name: ClassVar[str] = "mistral3"
    model_types: ClassVar[tuple[str, ...]] = ("mistral3",)
    projects_patches: ClassVar[bool] = False
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")

    def tower_attention(self, backbone: Backbone) -> list[Any]:
        return [layer.attention for layer in backbone.tower.transformer.layers]

    def image_maps(
        self, backbone: Backbone, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        config = backbone.model.config
        by, patch = config.spatial_merge_size, config.vision_config.patch_size
        maps, first = [], 0
        for i, own in enumerate(features):
            height, width = (int(size) // patch for size in given["image_sizes"][i])
            grid = self.grid(backbone, len(own), (height // by * patch, width // by * patch))
            patches = merged_patches(height, width, by, first)
            first += height * width
            maps.append([ImageMap(grid, patches=patches)])
        return maps


def placeholder_ids(backbone: Backbone, given: Mapping[str, Any]) -> dict[Modality, Tensor]:
    """(b, s) bool, where the ids say that features go; without ids, where embeddings are those of
    the placeholder, as the model itself has it."""
    ids, place = given.get("input_ids"), backbone.model.config.image_token_id
    if ids is not None:
        return {"image": ids == place}
    embeds = given["inputs_embeds"]
    table = backbone.base.get_input_embeddings()
    mark = table(torch.full((), place, dtype=torch.long, device=embeds.device))
    return {"image": (embeds == mark).all(-1)}
