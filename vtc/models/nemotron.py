# SPDX-License-Identifier: Apache-2.0
"""Nemotron 3 Nano Omni."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.core.errors import ArgumentError
from vtc.core.images import ImageMap, Modality, grid_positions, merged_patches
from vtc.models.base import Adapter
from vtc.models.decoder import POINTWISE


class NemotronOmni(Adapter):
    """Images of any size and clips. A decoder layer is attention, Mamba-2, or a feed-forward alone;
    none has positions. A token that is dropped between layers stays in the Mamba-2 states of the
    layers that have read it; those after never see it. Clips need a model whose
    `video_pruning_rate` is 0. Tested without audio."""

    name: ClassVar[str] = "nemotron_h_omni"
    model_types: ClassVar[tuple[str, ...]] = ("nemotron_h_omni",)
    stages: ClassVar[tuple[str, ...]] = ("encoder", "sequence", "layers")
    positions: ClassVar[str] = "none"
    video: ClassVar[bool] = True
    projects_patches: ClassVar[bool] = False
    decoder_parts: ClassVar[tuple[str, str, str]] = ("norm", "mixer", "norm_f")
    encoder_parts: ClassVar[tuple[str, str, str, str]] = ("norm1", "attention", "norm2", "mlp")

    # ---- the decoder --------------------------------------------------------------------------
    @property
    def takes_rotation(self) -> bool:
        return False

    def rotary(self, layer: int, hidden: Tensor, positions: Tensor) -> Any:
        return None

    def rotates(self, layer: int) -> bool:
        return False

    def check_rotate(self) -> None:
        pass  # keys are as they are

    def attention_name(self, layer: int) -> str:
        return "mixer"

    def attention_of(self, layer: int) -> Any:
        attends = self.layer_type(layer) == "full_attention"
        return super().attention_of(layer) if attends else None

    def recorded_at(self, layer: int, name: str) -> tuple[str, bool]:
        part, _, end = name.partition("_")
        has = "mlp" if self.layer_type(layer) in POINTWISE else "attention"
        if part not in ("attention", "mlp"):
            return super().recorded_at(layer, name)
        return "mixer" if part == has else part, end == "in"

    # ---- images and clips ---------------------------------------------------------------------
    def placeholders(self, output: Any, given: Mapping[str, Any]) -> dict[Modality, Tensor]:
        if given["token_id"] != self.model.image_token_id:
            return {}  # audio
        # Clips have the placeholders of images, and the model takes only one of both at a time.
        return {"image": output[..., 0], "video": output[..., 0]}

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        if modality == "video" and self.model.video_pruning_rate > 0:
            raise ArgumentError(
                "pixel_values_videos",
                f"the model itself drops vision tokens of clips (video_pruning_rate is "
                f"{self.model.video_pruning_rate}), and vtc cannot place those that are left; set "
                "model.video_pruning_rate = 0, or unpatch for clips",
            )
        maps, first = [], 0
        for frames, rows, columns in self._grids(modality, given):
            plane = grid_positions(rows // 2, columns // 2)
            grid = torch.cat([plane] * frames)
            grid[:, 0] = torch.arange(frames).repeat_interleave(len(plane))
            starts = range(first, first + frames * rows * columns, rows * columns)
            patches = torch.cat([merged_patches(rows, columns, 2, start) for start in starts])
            first += frames * rows * columns
            maps.append([ImageMap(grid, patches=patches, tiles=frames)])
        return maps

    def _grids(self, modality: Modality, given: Mapping[str, Any]) -> list[tuple[int, int, int]]:
        """(frames, rows, columns) of patches of each image, or of each clip with its frames in
        pairs."""
        if modality == "image":
            return [(1, rows, columns) for rows, columns in given["image_grid_hw"].tolist()]
        pixels, patch = given["pixel_values_videos"], self.tower.config.patch_size
        rows, columns = (side // patch for side in pixels.shape[-2:])
        if pixels.dim() == 4:  # single frames of one clip, which the model pairs
            by = self.model.config.video_temporal_patch_size
            return [(-(-pixels.shape[0] // by), rows, columns)]
        return [(pixels.shape[1], rows, columns)] * pixels.shape[0]

    # ---- the tower ----------------------------------------------------------------------------
    def _extra(self) -> int:
        """Tokens of the tower before the patches of an image or frame: summaries, registers."""
        return int(self.tower.config.num_summary_tokens)

    def tower_order(self, given: Mapping[str, Any]) -> Tensor | None:
        modality: Modality = "image" if "image_grid_hw" in given else "video"
        places, first = [], 0
        for frames, rows, columns in self._grids(modality, given):
            for _ in range(frames):
                first += self._extra()
                places.append(torch.arange(first, first + rows * columns))
                first += rows * columns
        return torch.cat(places)

    def states_from(self) -> Any:
        return self.tower.encoder

    def patch_states(self, given: Tensor, output: Any) -> Tensor:
        return output.last_hidden_state

    def encoder_layers(self) -> list[Any]:
        return self._with_parts(list(self.tower.encoder.layer))

    def encoder_depth(self, given: Mapping[str, Any]) -> int:
        return len(self.encoder_layers())

    def encoder_attend(self, layer: Any, hidden: Tensor, given: Mapping[str, Any]) -> Tensor:
        attended, _ = layer.attention(layer.norm1(hidden), **given)
        return layer.drop_path(layer.layer_scale1(attended)) + hidden

    def encoder_feed(self, layer: Any, hidden: Tensor) -> Tensor:
        return layer.drop_path(layer.layer_scale2(layer.mlp(layer.norm2(hidden)))) + hidden

    def encoder_given(self, given: Mapping[str, Any], row: int, places: Tensor) -> dict[str, Any]:
        own = super().encoder_given(given, row, places)
        own.pop("cu_seqlens", None)  # a tile is one image
        return own

    def encoder_tiles(
        self, modality: Modality, given: Mapping[str, Any], rows: int, length: int
    ) -> list[tuple[int, Tensor, Tensor]]:
        tiles, first, extra = [], 0, self._extra()
        for frames, height, width in self._grids(modality, given):
            for _ in range(frames):
                row, start = divmod(first, length)
                units = merged_patches(height, width, 2, start + extra)
                tiles.append((row, torch.arange(start, start + extra), units))
                first += extra + height * width
        return tiles
