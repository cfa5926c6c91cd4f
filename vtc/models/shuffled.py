# SPDX-License-Identifier: Apache-2.0
"""The base of families whose projector joins neighbouring patches into one token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from vtc.core.images import ImageMap, Modality, merged_patches
from vtc.models.base import Adapter


class Shuffled(Adapter):
    """Square images in which each square of patches becomes one token ("pixel shuffle")."""

    stages: ClassVar[tuple[str, ...]] = ("encoder", "sequence", "layers")
    projects_patches: ClassVar[bool] = False

    def per_side(self) -> int:
        """Patches along the side of a token's square."""
        config = self.model.config
        if hasattr(config, "downsample_ratio"):
            return round(1 / config.downsample_ratio)
        return int(config.downsample_factor)

    def encoder_units(self, modality: Modality, n: int) -> Tensor:
        side = math.isqrt(n)
        return merged_patches(side, side, self.per_side())

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        by, first, maps = self.per_side(), 0, []
        for own in features:
            n = len(own)
            side = math.isqrt(n) * by
            patches = merged_patches(side, side, by, first)
            first += side * side
            maps.append([ImageMap(self.grid(n, None), patches=patches)])
        return maps
