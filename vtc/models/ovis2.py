# SPDX-License-Identifier: Apache-2.0
"""Ovis 2, whose tower maps patches to visual words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from vtc.core.images import ImageMap, Modality
from vtc.models.base import Adapter


class Ovis2(Adapter):
    """Vision tokens are mixtures of visual-word embeddings; image indicators count as text."""

    name: ClassVar[str] = "ovis2"
    model_types: ClassVar[tuple[str, ...]] = ("ovis2",)
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    reads_tower: ClassVar[bool] = False

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        # The tower joins patches into visual words, which its attention does not refer to.
        return [[ImageMap(self.grid(len(own), None))] for own in features]
