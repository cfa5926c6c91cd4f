# SPDX-License-Identifier: Apache-2.0
"""Chameleon, Emu3 and Apertus 1.5: an image is a row of codes of a VQ-VAE, which are words of the
vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from vtc.core.images import ImageMap, Modality, grid_positions
from vtc.models.base import Adapter, require

_CODES = "its tokens are codes of a VQ-VAE, whose convolutions mix places"


class Chameleon(Adapter):
    """Tokens are codes of a VQ-VAE: their contents are rows of the embedding table. The decoder
    itself merges them in."""

    name: ClassVar[str] = "chameleon"
    model_types: ClassVar[tuple[str, ...]] = ("chameleon",)
    projects_patches: ClassVar[bool] = False
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    unread: ClassVar[str] = _CODES
    merges_in_decoder: ClassVar[bool] = True

    @classmethod
    def bind(cls, model: nn.Module) -> Self:
        base: Any = model if hasattr(model, cls.merger) else getattr(model, "model", None)
        require(model, base, (cls.merger, "get_image_features", "layers", "vqmodel"))
        return cls(model, base, base, base.vqmodel)

    def attention_input(self, layer: int, hidden: Tensor) -> Tensor:
        # With swin_norm, the norms stand behind attention and feed-forward.
        swin = getattr(self.decoder.config, "swin_norm", False)
        return hidden if swin else super().attention_input(layer, hidden)

    def merged(self, given: Mapping[str, Any]) -> dict[str, Any]:
        found = dict(given)
        names = ("input_ids", "inputs_embeds", "pixel_values", "mm_encoder_outputs")
        ids, embeds, pixels, encoded = (found.pop(name, None) for name in names)
        encoded = (encoded or {}).get("image")
        if (ids is None) == (embeds is None) or (pixels is not None and encoded is not None):
            return dict(given)  # the model raises its own error
        if embeds is None:
            embeds = self.base.embed_tokens(ids)
        if pixels is not None:
            encoded = self.base.get_image_features(pixels, return_dict=True)
        if encoded is not None:
            features = self.features(encoded)
            mask = self.base.get_placeholder_mask(
                ids, inputs_embeds=embeds, image_features=features
            )
            embeds = embeds.masked_scatter(mask, features)
        return {**found, "inputs_embeds": embeds}

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        return [[ImageMap(self.grid(len(own), None))] for own in features]


class Emu3(Adapter):
    """Tokens are codes of a VQ-VAE: their contents are rows of the embedding table. A further code
    ends each row, and goes with the row's last token."""

    name: ClassVar[str] = "emu3"
    model_types: ClassVar[tuple[str, ...]] = ("emu3",)
    projects_patches: ClassVar[bool] = False
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    unread: ClassVar[str] = _CODES

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        by = self.base.vqmodel.vision_spatial_factor
        maps = []
        for height, width in given["image_sizes"].tolist():
            columns = width // by
            grid: Tensor = grid_positions(height // by, columns + 1)
            maps.append([ImageMap(grid, separator=grid[:, 2] == columns)])
        return maps


class Apertus15(Adapter):
    """Tokens are codes of a tokenizer, as words are: their contents are rows of the embedding
    table. Images have any size. Tested without audio."""

    name: ClassVar[str] = "apertus1p5"
    decoder_parts: ClassVar[tuple[str, str, str]] = ("attention_layernorm", "mlp", "norm")
    model_types: ClassVar[tuple[str, ...]] = ("apertus1p5",)
    projects_patches: ClassVar[bool] = False
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    unread: ClassVar[str] = _CODES

    def placeholders(self, output: Any, given: Mapping[str, Any]) -> dict[Modality, Tensor]:
        return super().placeholders(output[0], given)  # the other output is for audio

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        by = 2 ** (len(self.model.config.vision_config.channel_multiplier) - 1)
        sizes = (given["image_sizes"] // by).tolist()
        return [[ImageMap(grid_positions(rows, columns))] for rows, columns in sizes]
