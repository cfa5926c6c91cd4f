# SPDX-License-Identifier: Apache-2.0
"""Cohere Compass."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from vtc.models.qwen import QwenVL


class CohereCompass(QwenVL):
    """The tower of Qwen3-VL, whose deeper features are added after the first decoder layers. Layers
    of a kind share their rotation; those with full attention may have none."""

    name: ClassVar[str] = "cohere_compass"
    model_types: ClassVar[tuple[str, ...]] = ("cohere_compass",)

    def rotates(self, layer: int) -> bool:
        return self.decoder.config.rope_parameters[self.layer_type(layer)] is not None

    def rotary(self, layer: int, hidden: Tensor, positions: Tensor) -> Any:
        if not self.rotates(layer):
            return None
        if positions.dim() == 3:
            positions = positions[-3:]  # the first of four axes counts text
        return self.decoder.rotary_emb(hidden, positions, self.layer_type(layer))
