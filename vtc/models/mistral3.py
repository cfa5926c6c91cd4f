# SPDX-License-Identifier: Apache-2.0
"""Mistral 3 and LightOnOCR."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from vtc.core.images import ImageMap, Modality, merged_patches
from vtc.models.base import Adapter, UnsupportedModelError


class Mistral3(Adapter):
    """Images of any size, packed into one tower sequence; each square of patches becomes one
    token.

    The language models of Ministral 3 and Mistral Small 4 scale queries by position, in steps of
    `original_max_position_embeddings` tokens: results are exact below one step, by default 8192.
    """

    name: ClassVar[str] = "mistral3"
    model_types: ClassVar[tuple[str, ...]] = ("mistral3",)
    projects_patches: ClassVar[bool] = False
    stages: ClassVar[tuple[str, ...]] = ("encoder", "sequence", "layers")
    encoder_parts: ClassVar[tuple[str, str, str, str]] = (
        *("attention_norm", "attention"),
        *("ffn_norm", "feed_forward"),
    )

    def check(self) -> None:
        super().check()
        attention: Any = type(self.any_attention)
        scales = "position_ids" in inspect.signature(attention.forward).parameters
        if scales and "flash" in (self.decoder.config._attn_implementation or ""):
            raise UnsupportedModelError(
                f"model: {attention.__name__} scales queries by position and hands positions on to "
                "flash attention, which takes gaps in them for packed sequences; use "
                "attn_implementation='sdpa'"
            )

    def encoder_layers(self) -> list[Any]:
        return self._with_parts(list(self.tower.transformer.layers))

    def encoder_given(self, given: Mapping[str, Any], row: int, places: Tensor) -> dict[str, Any]:
        cos, sin = given["position_embeddings"]
        return {
            **super().encoder_given(given, row, places),
            "position_embeddings": (cos[..., places, :], sin[..., places, :]),
        }

    def encoder_tiles(
        self, modality: Modality, given: Mapping[str, Any], rows: int, length: int
    ) -> list[tuple[int, Tensor, Tensor]]:
        config, tiles, first = self.model.config, [], 0
        patch, by = config.vision_config.patch_size, config.spatial_merge_size
        for size in given["image_sizes"]:
            height, width = (int(side) // patch for side in size)
            units = merged_patches(height, width, by, first)
            loose = torch.ones(height * width, dtype=torch.bool)
            loose[units.flatten() - first] = False  # what fills no square, and yields no token
            tiles.append((0, loose.nonzero()[:, 0] + first, units))
            first += height * width
        return tiles

    def encoder_projectors(self) -> list[Any]:
        return []  # the projector unfolds the grid

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        config = self.model.config
        by, patch = config.spatial_merge_size, config.vision_config.patch_size
        maps, first = [], 0
        for i, own in enumerate(features):
            height, width = (int(size) // patch for size in given["image_sizes"][i])
            grid = self.grid(len(own), (height // by * patch, width // by * patch))
            patches = merged_patches(height, width, by, first)
            first += height * width
            maps.append([ImageMap(grid, patches=patches)])
        return maps


class LightOnOcr(Mistral3):
    """As Mistral 3, without breaks between the rows of an image."""

    name: ClassVar[str] = "lighton_ocr"
    model_types: ClassVar[tuple[str, ...]] = ("lighton_ocr",)

    @classmethod
    def bind(cls, model: nn.Module) -> Self:
        found = super().bind(model)
        return replace(found, tower=getattr(found.base, "vision_encoder", None))

    def projector(self) -> Any:
        return self.base.vision_projection
