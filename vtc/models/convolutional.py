# SPDX-License-Identifier: Apache-2.0
"""GOT-OCR 2, PP-Chart2Table and FastVLM, whose towers cannot be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from vtc.core.images import ImageMap, Modality
from vtc.models.base import Adapter


class GotOcr2(Adapter):
    """The tower of SAM, then convolutions: a token's state is what they make at its place."""

    name: ClassVar[str] = "got_ocr2, pp_chart2table"
    model_types: ClassVar[tuple[str, ...]] = ("got_ocr2", "pp_chart2table")
    projects_patches: ClassVar[bool] = False
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    unread: ClassVar[str] = "it attends in windows, and convolutions mix its patches"
    shows_states: ClassVar[bool] = True

    def states_from(self) -> Any:
        return self.base.multi_modal_projector.multimodal_projector

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        return feature_maps(self, features)


class FastVLM(GotOcr2):
    """A convolutional tower: a token's state is what it makes at its place."""

    name: ClassVar[str] = "fast_vlm"
    model_types: ClassVar[tuple[str, ...]] = ("fast_vlm",)
    unread: ClassVar[str] = "convolutions mix its places, before and after attention"

    def states_from(self) -> Any:
        return self.projector()


def feature_maps(adapter: Adapter, features: Any) -> list[list[ImageMap]]:
    """Maps of square images whose tokens are the places of a feature map, one after another.

    Args:
        adapter: bound to the model.
        features: (images, n, d), or a list of (n, d).
    """
    maps, first = [], 0
    for own in features:
        places = torch.arange(first, first + len(own))[:, None]
        maps.append([ImageMap(adapter.grid(len(own), None), patches=places)])
        first += len(own)
    return maps
