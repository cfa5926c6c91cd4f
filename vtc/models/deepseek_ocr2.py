# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-OCR 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from vtc.core.images import ImageMap, Modality
from vtc.models.resampled import Resampled


class DeepseekOcr2(Resampled):
    """A mixture of experts. Learned queries read each tile and the whole picture behind them; the
    tokens that they become have no places. A separator ends an image."""

    name: ClassVar[str] = "deepseek_ocr2"
    model_types: ClassVar[tuple[str, ...]] = ("deepseek_ocr2",)

    def resampler_attention(self) -> list[nn.Module]:
        return [layer.self_attn for layer in self.tower.vision_encoder.layers]

    def tokens_in(self, length: int) -> slice:
        # Queries follow the patches; the few of small tiles read no more patches than they are.
        few = len(self.tower.query_768_resolution.weight)
        many = len(self.tower.query_1024_resolution.weight)
        return slice(length - (few if length <= 2 * few else many), length)

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        counts, maps = given.get("num_local_patches"), []
        whole = self._queries(given["pixel_values"])
        seen = len(features) * whole  # tiles are encoded after all whole pictures
        for i, own in enumerate(features):
            tiles = 0 if counts is None else int(counts[i])
            separator, crop = torch.arange(len(own)) == len(own) - 1, None
            patches = torch.arange(i * whole, (i + 1) * whole)
            if tiles:
                each = self._queries(given["pixel_values_local"])
                crop = torch.arange(1, tiles + 1).repeat_interleave(each)
                crop = torch.nn.functional.pad(crop, (0, whole + 1))
                patches = torch.cat([torch.arange(seen, seen + tiles * each), patches])
                seen += tiles * each
            patches = torch.nn.functional.pad(patches, (0, 1), value=-1)[:, None]
            found = ImageMap(
                None, crop, separator, patches=patches, tiles=tiles + 1, count=len(own)
            )
            maps.append([found])
        return maps

    def _queries(self, pixels: Any) -> int:
        """Tokens of a tile: convolutions leave a sixteenth of its patches, rounded up; there are
        queries for small tiles and for large ones."""
        rows, columns = (
            size // self.tower.config.sam_config.patch_size for size in pixels.shape[-2:]
        )
        small = -(-rows // 4) * -(-columns // 4) <= len(self.tower.query_768_resolution.weight)
        queries = self.tower.query_768_resolution if small else self.tower.query_1024_resolution
        return len(queries.weight)
