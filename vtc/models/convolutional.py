# SPDX-License-Identifier: Apache-2.0
"""GOT-OCR 2, PP-Chart2Table and FastVLM, whose towers cannot be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from vtc.core.images import ImageMap, Modality
from vtc.models.base import Adapter


class GotOcr2(Adapter):
    """Tokens have a grid, but the tower of SAM cannot be read."""

    name: ClassVar[str] = "got_ocr2, pp_chart2table"
    model_types: ClassVar[tuple[str, ...]] = ("got_ocr2", "pp_chart2table")
    projects_patches: ClassVar[bool] = False
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    unread: ClassVar[str] = "it attends in windows, and convolutions mix its patches"

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        return [[ImageMap(self.grid(len(own), None))] for own in features]


class FastVLM(GotOcr2):
    """Tokens have a grid, but the convolutional tower cannot be read."""

    name: ClassVar[str] = "fast_vlm"
    model_types: ClassVar[tuple[str, ...]] = ("fast_vlm",)
    unread: ClassVar[str] = "convolutions mix its places, before and after attention"
