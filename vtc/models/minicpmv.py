# SPDX-License-Identifier: Apache-2.0
"""MiniCPM-V 4.6 and 4.7, and MiniCPM-OCR."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from vtc.core.images import ImageMap, Modality, grid_positions
from vtc.models.base import Adapter
from vtc.models.qwen import QwenVL


class MiniCPMV(Adapter):
    """Images of any size; each slice is a separate image. Most layers are recurrent, as in Qwen3.5.
    Clips are not tested."""

    model_types: ClassVar[tuple[str, ...]] = ("minicpmv4_6", "minicpm_ocr")
    name: ClassVar[str] = ", ".join(model_types)
    projects_patches: ClassVar[bool] = False
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    unread: ClassVar[str] = "it joins patches between its layers"

    def placeholders(self, output: Any, given: Mapping[str, Any]) -> dict[Modality, Tensor]:
        clip = given["token_id"] == self.model.config.video_token_id
        return {"video" if clip else "image": output[..., 0]}

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        sizes = given["target_sizes" if modality == "image" else "target_sizes_videos"].tolist()
        maps = []
        for own, (rows, columns) in zip(features, sizes, strict=True):
            by = round((rows * columns / len(own)) ** 0.5)
            maps.append([ImageMap(grid_positions(rows // by, columns // by))])
        return maps


class MiniCPMV47(MiniCPMV):
    """As MiniCPM-V 4.6, with M-RoPE: the slices of an image share one canvas."""

    name: ClassVar[str] = "minicpmv4_7"
    model_types: ClassVar[tuple[str, ...]] = ("minicpmv4_7",)
    axial: ClassVar[bool] = True
    positions: ClassVar[str] = "places in the picture"

    def rotary(self, layer: int, hidden: Tensor, positions: Tensor) -> Any:
        return QwenVL.rotary(self, layer, hidden, positions)  # type: ignore[arg-type]
