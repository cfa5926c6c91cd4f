# SPDX-License-Identifier: Apache-2.0
"""InternVL 2.5 and later, and Qianfan-OCR."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.core.images import ImageMap, Modality
from vtc.models.shuffled import Shuffled


class InternVL(Shuffled):
    """Tiles are adjacent, the thumbnail last, and form one image. Each frame of a clip is a
    separate image."""

    name: ClassVar[str] = "internvl"
    model_types: ClassVar[tuple[str, ...]] = ("internvl",)
    frames: ClassVar[bool] = True
    joins: ClassVar[tuple[Modality, ...]] = ("image",)
    encoder_parts: ClassVar[tuple[str, str, str, str]] = (
        *("layernorm_before", "attention"),
        *("layernorm_after", "mlp"),
    )

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        maps, first = super().image_maps(modality, given, features), 0
        for of_one in maps:
            for i, own in enumerate(of_one):
                # The projector receives the patches of a token side by side in one row.
                rows = torch.arange(first, first + len(own))[:, None]
                of_one[i] = replace(own, states=rows)
                first += len(own)
        return maps

    def encoder_layers(self) -> list[Any]:
        return self._with_parts(list(self.tower.encoder.layer))

    def encoder_attend(self, layer: Any, hidden: Tensor, given: Mapping[str, Any]) -> Tensor:
        attended, _ = layer.attention(layer.layernorm_before(hidden))
        return layer.lambda_1 * attended + hidden

    def encoder_feed(self, layer: Any, hidden: Tensor) -> Tensor:
        fed = layer.dropout(layer.mlp(layer.layernorm_after(hidden)))
        return (fed if layer.lambda_2 is None else layer.lambda_2 * fed) + hidden


class QianfanOCR(InternVL):
    """As InternVL, for images only."""

    name: ClassVar[str] = "qianfan_ocr"
    model_types: ClassVar[tuple[str, ...]] = ("qianfan_ocr",)
    frames: ClassVar[bool] = False

    def encoder_layers(self) -> list[Any]:
        return self._with_parts(list(self.tower.layers))

    def encoder_attend(self, layer: Any, hidden: Tensor, given: Mapping[str, Any]) -> Tensor:
        attended, _ = layer.attention(layer.layernorm_before(hidden))
        return layer.drop_path1(layer.lambda_1 * attended) + hidden

    def encoder_feed(self, layer: Any, hidden: Tensor) -> Tensor:
        fed = layer.dropout(layer.mlp(layer.layernorm_after(hidden)))
        return layer.drop_path2(layer.lambda_2 * fed) + hidden
