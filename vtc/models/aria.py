# SPDX-License-Identifier: Apache-2.0
"""Aria."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from vtc.core.images import ImageMap, Modality
from vtc.models.base import Adapter


class Aria(Adapter):
    """A mixture of experts. A resampler makes a fixed number of tokens of each image or tile, which
    have no places."""

    name: ClassVar[str] = "aria"
    model_types: ClassVar[tuple[str, ...]] = ("aria",)
    projects_patches: ClassVar[bool] = False
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    unread: ClassVar[str] = (
        "each token mixes all patches of its image (a resampler), whose queries do not attend to "
        "one another"
    )
    places: ClassVar[bool] = False

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        return [[ImageMap(None, count=len(own))] for own in features]
