# SPDX-License-Identifier: Apache-2.0
"""Phi-4 multimodal."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vtc.core.images import ImageMap, Modality, grid_positions, merged_patches
from vtc.models.base import Adapter, require


class Phi4Multimodal(Adapter):
    """Tiles, the thumbnail last; four patches per token. Features end each row, and one stands
    before the thumbnail; they go with their row, or with the whole image. The decoder itself merges
    images in. It rotates otherwise from `original_max_position_embeddings` tokens on, by default
    4096: results are exact below. Tested without audio."""

    name: ClassVar[str] = "phi4_multimodal"
    model_types: ClassVar[tuple[str, ...]] = ("phi4_multimodal",)
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    projects_patches: ClassVar[bool] = False
    merges_in_decoder: ClassVar[bool] = True

    @classmethod
    def bind(cls, model: nn.Module) -> Self:
        base: Any = (
            model if hasattr(model, "embed_tokens_extend") else getattr(model, "model", None)
        )
        require(model, base, ("embed_tokens", "embed_tokens_extend", "layers"))
        return cls(model, base, base, base.embed_tokens_extend.image_embed.img_processor)

    # ---- merging images in --------------------------------------------------------------------
    @cached_property
    def _images(self) -> _Images:
        return _Images(self.base)

    @property
    def holder(self) -> Any:
        return self._images

    def ignores_images(self, given: Mapping[str, Any]) -> bool:
        ids = given.get("input_ids")
        return ids is None or not bool((ids == self._images.token_id).any())

    def merged(self, given: Mapping[str, Any]) -> dict[str, Any]:
        found = dict(given)
        ids, embeds = found.get("input_ids"), found.get("inputs_embeds")
        if ids is None or embeds is not None:
            return found  # which has images in it, or the model raises its own error
        del found["input_ids"]
        image = {name: found.pop(name, None) for name in _IMAGE}
        audio = {name: found.pop(name, None) for name in _AUDIO}
        embeds, extend = self.base.embed_tokens(ids), self.base.embed_tokens_extend
        heard = audio["audio_input_features"] is not None
        if heard and bool((ids == extend.audio_token_id).any()):
            mode = "speech" if image["image_pixel_values"] is None else "vision"
            embeds = extend.audio_embed(ids, embeds, **audio, audio_projection_mode=mode)
        if image["image_pixel_values"] is not None and not self.ignores_images(given):
            features = self.features(self._images.get_image_features(**image))
            mask = self._images.get_placeholder_mask(ids)
            embeds = embeds.masked_scatter(mask[..., None], torch.cat(features).to(embeds))
        return {**found, "inputs_embeds": embeds}

    # ---- tiles --------------------------------------------------------------------------------
    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        maps, tiles = [], given["image_pixel_values"].shape[1]
        side, cells = self._images.side, self._cells()
        area = self._images.patches**2
        whole = grid_positions(side, side + 1)
        for i, plane in enumerate(self._images.planes(given)):
            grid = grid_positions(plane.rows, plane.columns + 1)
            row, column = grid[:, 1], grid[:, 2]
            tile = row // side * plane.across + column // side + 1
            crop = torch.cat([tile, torch.zeros(len(whole) + 1, dtype=torch.long)])
            grid = torch.cat([grid, torch.tensor([[0, -2, 0]]), whole])
            separator = grid[:, 2] == torch.where(crop == 0, side, plane.columns)
            separator |= grid[:, 1] == -2
            crop[: len(tile)][separator[: len(tile)]] = 1  # any but the thumbnail
            cell = grid[:, 1] % side * side + grid[:, 2] % side
            patches = cells[cell] + (i * tiles + crop[:, None]) * area
            patches[separator] = -1
            maps.append([ImageMap(grid, crop, separator, patches, tiles=tiles)])
        return maps

    def _cells(self) -> Tensor:
        """(cells, 4) the patches of each token of a tile; an odd side is padded by reflection."""
        count = self._images.patches
        index = torch.arange(count * count).view(count, count)
        if count % 2:
            index = torch.cat([index, index[:, -2:-1]], dim=1)
            index = torch.cat([index, index[-2:-1]], dim=0)
        return index.flatten()[merged_patches(index.shape[0], index.shape[1], 2)]

    # ---- the tower ----------------------------------------------------------------------------
    def projector(self) -> Any:
        return self.base.embed_tokens_extend.image_embed.img_projection_up

    def states_from(self) -> Any:
        layers = self.tower.encoder.layers
        wanted = self.base.embed_tokens_extend.image_embed.layer_idx
        return layers[wanted - 1 if wanted > 0 else wanted + len(layers)]

    def patch_states(self, given: Tensor, output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple) else output


_IMAGE = ("image_pixel_values", "image_sizes", "image_attention_mask")
_AUDIO = ("audio_input_features", "audio_embed_sizes", "audio_attention_mask")


class _Plane:
    """The plane of tiles of an image.

    Args:
        rows, columns: of tokens, without padding.
        across: tiles side by side.
    """

    def __init__(self, rows: int, columns: int, across: int) -> None:
        self.rows, self.columns, self.across = rows, columns, across


class _Images:
    """The functions of other base models, which this one has not: they call its own modules.

    Args:
        base: the base model.
    """

    def __init__(self, base: Any) -> None:
        self.base = base

    @property
    def _embed(self) -> Any:
        return self.base.embed_tokens_extend.image_embed

    @property
    def token_id(self) -> int:
        """Of the placeholders."""
        return int(self._embed.config.vision_config.image_token_id)

    @property
    def patches(self) -> int:
        """Patches along a side of a tile."""
        config = self._embed.config.vision_config
        return int(config.image_size // config.patch_size)

    @property
    def side(self) -> int:
        """Tokens along a side of a tile."""
        return -(-self.patches // 2)

    def planes(self, given: Mapping[str, Any]) -> list[_Plane]:
        """The plane of each image of a call.

        Args:
            given: the arguments of `get_image_features`.
        """
        found, side = [], self.side
        masks = given["image_attention_mask"]
        for size, mask in zip(given["image_sizes"].view(-1, 2).tolist(), masks, strict=True):
            down, across = (int(pixels) // self._embed.crop_size for pixels in size)
            seen = mask[1 : down * across + 1, ::2, ::2].reshape(down, across, side, side)
            rows, columns = int(seen[:, 0, :, 0].sum()), int(seen[0, :, 0].sum())
            found.append(_Plane(rows, columns, across))
        return found

    def get_image_features(
        self,
        image_pixel_values: Tensor,
        image_sizes: Tensor,
        image_attention_mask: Tensor,
        return_dict: bool = True,
    ) -> BaseModelOutputWithPooling:
        """The features of images, as the model puts them in the place of placeholders.

        Args:
            image_pixel_values: (images, tiles, 3, height, width).
            image_sizes: (images, 2) height and width of the plane of tiles.
            image_attention_mask: (images, tiles, rows, columns) of patches, 0 at padding.
            return_dict: has no effect.

        Returns:
            With `pooler_output`, a list of (n, d).
        """
        planes = self.planes(
            {"image_sizes": image_sizes, "image_attention_mask": image_attention_mask}
        )
        counts = [p.rows * (p.columns + 1) + 1 + self.side * (self.side + 1) for p in planes]
        weight = self._embed.img_projection_down.weight
        ids = torch.full((1, sum(counts)), self.token_id, device=weight.device)
        made = self._embed(
            ids,
            weight.new_zeros(1, sum(counts), weight.shape[0]),
            image_pixel_values=image_pixel_values,
            image_sizes=image_sizes,
            image_attention_mask=image_attention_mask,
        )
        features: Any = list(made[0].split(counts))
        return BaseModelOutputWithPooling(pooler_output=features)

    def get_placeholder_mask(self, input_ids: Tensor) -> Tensor:
        """(b, s) bool, True at placeholders."""
        return input_ids == self.token_id
