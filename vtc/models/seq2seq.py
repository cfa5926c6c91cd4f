# SPDX-License-Identifier: Apache-2.0
"""Models with an encoder and a decoder, such as BART and T5: vision tokens enter the encoder beside
the text, and the decoder reads what the encoder leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import nn

from vtc.core.images import ImageMap, Modality, grid_positions
from vtc.models.base import Adapter, UnsupportedModelError, require


class Seq2Seq(Adapter):
    """What adapters of such models share: `decoder` is the encoder, which the vision tokens enter.
    Positions are learned (BART) or distances between tokens (T5)."""

    name: ClassVar[str] = "seq2seq"
    stages: ClassVar[tuple[str, ...]] = ("sequence",)
    attention: ClassVar[str] = "both ways; the answer reads them through cross-attention"
    seq2seq: ClassVar[bool] = True

    @property
    def reader(self) -> Any:
        """The decoder, whose cross-attention reads the encoder's output."""
        raise NotImplementedError

    @property
    def layers(self) -> nn.ModuleList:
        found: Any = getattr(self.decoder, "block", None)
        return self.decoder.layers if found is None else found

    def distances(self) -> Any:
        """The attention module that computes the encoder's bias by distance; `None` without."""
        blocks = getattr(self.decoder, "block", None)
        return None if blocks is None else blocks[0].layer[0].SelfAttention

    def check(self) -> None:
        super().check()
        biased = self.distances()
        table = getattr(self.decoder, "embed_positions", None)
        if not hasattr(biased, "compute_bias") and not hasattr(table, "offset"):
            raise UnsupportedModelError(
                f"model: {type(self.decoder).__name__} has neither the learned positions of BART "
                "nor the bias by distance of T5"
            )


class Florence2(Seq2Seq):
    """An encoder reads vision tokens and text, and its decoder what the encoder leaves: methods
    drop tokens before the encoder. The first feature is the mean of all; it always stays."""

    name: ClassVar[str] = "florence2"
    model_types: ClassVar[tuple[str, ...]] = ("florence2",)
    projects_patches: ClassVar[bool] = False
    unread: ClassVar[str] = "it attends in windows and between channels"

    @classmethod
    def bind(cls, model: nn.Module) -> Self:
        base: Any = model if hasattr(model, "language_model") else getattr(model, "model", None)
        parts = (cls.merger, "get_image_features", "vision_tower", "language_model")
        require(model, base, parts)
        require(model, base.language_model, ("encoder", "decoder"))
        return cls(model, base, base.language_model.encoder, base.vision_tower)

    @property
    def reader(self) -> Any:
        return self.base.language_model.decoder

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        config = self.tower.config
        sides = list(given["pixel_values"].shape[-2:])
        for kernel, stride, padding in zip(
            config.patch_size, config.patch_stride, config.patch_padding, strict=True
        ):
            sides = [(side + 2 * padding - kernel) // stride + 1 for side in sides]
        grid = torch.cat([torch.tensor([[0, -1, -1]]), grid_positions(*sides)])
        mean = torch.arange(len(grid)) == 0  # of the frame, whose row is -1
        return [[ImageMap(grid, separator=mean)] for _ in features]
