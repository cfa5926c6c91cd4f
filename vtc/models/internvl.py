# SPDX-License-Identifier: Apache-2.0
"""InternVL 2.5 and later."""

from __future__ import annotations

from typing import Any, ClassVar

from vtc.core.images import Modality
from vtc.models.shuffled import Shuffled


class InternVL(Shuffled):
    """Tiles are adjacent, the thumbnail last, and form one image. Each frame of a clip is a
    separate image."""

    name: ClassVar[str] = "internvl"
    model_types: ClassVar[tuple[str, ...]] = ("internvl",)
    frames: ClassVar[bool] = True
    joins: ClassVar[tuple[Modality, ...]] = ("image",)

    def tower_attention(self) -> list[Any]:
        layers = self.tower.encoder.layer
        return [layer.attention for layer in layers]
