# SPDX-License-Identifier: Apache-2.0
"""LFM2-VL and LFM3-VL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from vtc.core.images import ImageMap, Modality, grid_positions
from vtc.models.base import Adapter
from vtc.models.qwen_like import OneAxis


class Lfm2VL(Adapter):
    """Images of any size; each tile is a separate image. Most layers are convolutions: a
    token that is dropped between layers stays in what they have read, and no later layer sees
    it."""

    name: ClassVar[str] = "lfm2_vl"
    model_types: ClassVar[tuple[str, ...]] = ("lfm2_vl",)
    projects_patches: ClassVar[bool] = False
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    decoder_parts: ClassVar[tuple[str, str, str]] = (
        *("operator_norm", "feed_forward", "embedding_norm"),
    )
    unread: ClassVar[str] = "its images are padded to the largest of a batch"

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        sizes = (given["spatial_shapes"] // self.model.config.downsample_factor).tolist()
        return [[ImageMap(grid_positions(rows, columns))] for rows, columns in sizes]


class Lfm3VL(OneAxis):
    """Images and clips of any size. Most layers are convolutions, as in LFM2-VL; others have full
    attention or a window."""

    name: ClassVar[str] = "lfm3_vl"
    model_types: ClassVar[tuple[str, ...]] = ("lfm3_vl",)
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    decoder_parts: ClassVar[tuple[str, str, str]] = Lfm2VL.decoder_parts
    unread: ClassVar[str] = "most of its layers are convolutions over the grid"

    def projector(self) -> Any:
        return self.base.multi_modal_projector
