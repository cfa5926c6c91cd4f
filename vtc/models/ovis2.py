# SPDX-License-Identifier: Apache-2.0
"""Ovis 2, whose tower joins patches into visual words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from vtc.core.images import ImageMap, Modality
from vtc.models.base import Adapter


class Ovis2(Adapter):
    """Visual tokens are mixtures of a table of visual words; indicators of the image are text."""

    name: ClassVar[str] = "ovis2"
    model_types: ClassVar[tuple[str, ...]] = ("ovis2",)
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    reads_tower: ClassVar[bool] = False

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        # The tower joins patches into visual words; its attention does not map onto these here.
        return [[ImageMap(self.grid(len(own), None))] for own in features]
