# SPDX-License-Identifier: Apache-2.0
"""Aya Vision and Command A Vision."""

from __future__ import annotations

from typing import Any, ClassVar

from vtc.models.shuffled import Shuffled


class CohereVision(Shuffled):
    """Aya Vision and Command A Vision. Each tile is a separate image."""

    name: ClassVar[str] = "aya_vision, cohere2_vision"
    model_types: ClassVar[tuple[str, ...]] = ("aya_vision", "cohere2_vision")

    def per_side(self) -> int:
        return int(self.model.config.downsample_factor)

    def encoder_projectors(self) -> list[Any]:
        return []  # the projector shuffles the grid
