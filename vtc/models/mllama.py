# SPDX-License-Identifier: Apache-2.0
"""Mllama (Llama 3.2 Vision): the sequence contains no vision tokens. Cross-attention layers attend
to the states of the vision tower instead, tile by tile, [CLS] first in each tile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from vtc.core.errors import ArgumentError
from vtc.core.images import grid_positions
from vtc.models.base import Adapter, UnsupportedModelError, decoder_in, require


@dataclass(frozen=True)
class CrossImage:
    """An image's places among the cross-attention states of its batch row.

    Attributes:
        columns: (n,) indices of its patches in the row's states, tile by tile, without padding
            tiles.
        cls: (t,) indices of its t tiles' [CLS] states.
        grid: (n, 3) int64 (frame, row, column), from 0 in each tile.
        crop: (n,) the tile of each patch, from 1; `None` for a single tile.
    """

    columns: Tensor
    cls: Tensor
    grid: Tensor
    crop: Tensor | None


class Mllama(Adapter):
    """The sequence contains no vision tokens: methods drop keys and values of the cross-attention
    layers. Each tile has its own grid and keeps its [CLS]."""

    name = "mllama"
    model_types = ("mllama",)
    stages: ClassVar[tuple[str, ...]] = ("sequence",)
    positions: ClassVar[str] = "none"
    crosses: ClassVar[bool] = True
    attention = "nothing; text reads them through cross-attention"
    unread: ClassVar[str] = "its states join several layers of two encoders over all tiles"

    @classmethod
    def bind(cls, model: nn.Module) -> Self:
        base: Any = getattr(model, "model", model)
        require(model, base, ("language_model", "vision_model", "multi_modal_projector"))
        return cls(model, base, decoder_in(base.language_model), base.vision_model)

    def check(self) -> None:
        """Refuse flash attention, which does not take a cross-attention mask.

        Raises:
            UnsupportedModelError: the decoder uses flash attention, or as in `Adapter`.
        """
        super().check()
        if "flash" in (self.decoder.config._attn_implementation or ""):
            raise UnsupportedModelError(
                "model: flash attention does not take a cross-attention mask; load "
                f"{type(self.model).__name__} with attn_implementation='sdpa'"
            )

    def cross_layers(self) -> tuple[int, ...]:
        """The cross-attention layers: 0-based decoder layers, ascending."""
        layers = set(self.decoder.config.cross_attention_layers)
        return tuple(i for i in range(len(self.layers)) if i in layers)

    def image_token(self) -> int:
        """Id of the image token."""
        return int(self.model.config.image_token_index)

    def real_tiles(self, given: Mapping[str, Any]) -> Tensor:
        """Which tiles are not padding.

        Args:
            given: the arguments of the base model's forward.

        Returns:
            (b, images, tiles) bool, False for padding tiles and padding images.
        """
        # Padding images have id 0, but the image processor unmasks their first tile, too.
        ids, mask = given["aspect_ratio_ids"], given["aspect_ratio_mask"]
        return mask.bool() & (ids > 0)[..., None]

    def check_inputs(self, given: Mapping[str, Any]) -> None:
        """Refuse inputs whose vision states cannot be matched to images.

        Args:
            given: the arguments of the base model's forward.

        Raises:
            ArgumentError: vision states are passed in, or the cross-attention mask is missing, has
                the wrong shape or unmasks padding tiles.
        """
        if given.get("cross_attention_states") is not None:
            raise ArgumentError(
                "cross_attention_states",
                "a patched model must encode images itself, to know which patches their states "
                "belong to; pass pixel_values, or unpatch",
            )
        names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
        pixels, *ratios = (given.get(name) for name in names)
        if pixels is None or any(value is None for value in ratios):
            return  # without the ratios the model raises its own error
        mask = given.get("cross_attention_mask")
        if mask is None:
            raise ArgumentError(
                "cross_attention_mask",
                "a patched model needs it with pixel_values, got None; pass the processor's: "
                "without it transformers attends to padding tiles, and with sdpa masks the states "
                "causally",
            )
        real = self.real_tiles(given)
        if mask.dim() != 4 or mask.shape[0] != real.shape[0] or mask.shape[3] != real.shape[2]:
            raise ArgumentError(
                "cross_attention_mask",
                f"expected shape ({real.shape[0]}, tokens, images, "
                f"{real.shape[2]}), got {tuple(mask.shape)}",
            )
        # Skip images of earlier turns, whose states are in the cache.
        newest = mask[:, :, mask.shape[2] - real.shape[1] :].bool()
        if newest.shape[2] == real.shape[1] and bool((newest & ~real[:, None]).any()):
            raise ArgumentError(
                "cross_attention_mask",
                "it unmasks tiles that aspect_ratio_mask or aspect_ratio_ids mark as padding, "
                "whose states a patched model drops",
            )

    def images(self, given: Mapping[str, Any]) -> list[list[CrossImage]]:
        """The images of each batch row, in order.

        Args:
            given: the arguments of the base model's forward.

        Returns:
            By row, its images without padding images.
        """
        vision = self.tower.config
        side = vision.image_size // vision.patch_size
        own, place = grid_positions(side, side), torch.arange(1, side * side + 1)
        found: list[list[CrossImage]] = []
        for row in self.real_tiles(given).cpu():
            images = []
            for i, tiles in enumerate(row):
                if not bool(tiles.any()):
                    continue
                tile = tiles.nonzero().flatten()
                cls = (i * len(tiles) + tile) * (side * side + 1)
                crop = (tile + 1).repeat_interleave(side * side)
                images.append(
                    CrossImage(
                        columns=(cls[:, None] + place).flatten(),
                        cls=cls,
                        grid=own.repeat(len(tile), 1),
                        crop=crop if len(tile) > 1 else None,
                    )
                )
            found.append(images)
        return found
