# SPDX-License-Identifier: Apache-2.0
"""Molmo 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.core.images import ImageMap, Modality, grid_positions
from vtc.models.base import Adapter


class Molmo2(Adapter):
    """An image is a thumbnail and a plane of overlapping tiles; a token pools a square of patches
    with attention. All tokens of a prompt's images, with the marks around them, see one another.
    Features are added to the embeddings of their placeholders."""

    name: ClassVar[str] = "molmo2"
    model_types: ClassVar[tuple[str, ...]] = ("molmo2",)
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    masks_in_base: ClassVar[bool] = True
    attention: ClassVar[str] = "both directions, over all images"
    projects_patches: ClassVar[bool] = False
    unmerged: ClassVar[str] = (
        "a token pools a square of patches, of which those at the edges are incomplete, and groups "
        "of unequal size have no mean patch by patch"
    )
    video: ClassVar[bool] = True

    def blocks(self, given: Mapping[str, Any]) -> Tensor | None:
        kinds = given.get("mm_token_type_ids")
        return None if kinds is None else torch.where(kinds == 1, 0, -1)

    def placeholders(self, output: Any, given: Mapping[str, Any]) -> dict[Modality, Tensor]:
        return {"image": output[..., 0], "video": output[..., 0]}  # a call has one of them

    def rotary_kind(self, layer: int) -> str:
        return str(self.decoder.rope_types[layer])

    def rotary(self, layer: int, hidden: Tensor, positions: Tensor) -> Any:
        scaled = self.rotary_kind(layer) == "scaled"
        embed = self.decoder.rotary_emb if scaled else self.decoder.rotary_emb_unscaled
        return embed(hidden, position_ids=positions)

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        video = modality == "video"
        pooling = given["video_token_pooling" if video else "image_token_pooling"].cpu()
        real = pooling[(pooling >= 0).any(1)].long()
        per_tile, maps = given["pixel_values_videos" if video else "pixel_values"].shape[-2], []
        for sizes, own in zip(
            given["video_grids" if video else "image_grids"].tolist(),
            real.split([len(own) for own in features]),
            strict=True,
        ):
            tile = own.max(1).values // per_tile
            tile = tile - tile[0]
            tiles = int(tile.max()) + 1
            if video:
                frames, rows, columns = sizes
                grid = grid_positions(rows, columns).repeat(frames, 1)
                grid[:, 0] = torch.arange(frames).repeat_interleave(rows * columns)
                crop = None
            else:
                grid = torch.cat([grid_positions(*sizes[:2]), grid_positions(*sizes[2:])])
                crop = tile
            maps.append([ImageMap(grid, crop=crop, patches=_filled(own), tiles=tiles)])
        return maps


def _filled(pooling: Tensor) -> Tensor | None:
    """(n, m) patches in which those of incomplete squares are repeated, so that a mean over the
    columns is the mean over them; `None` if they do not divide m.

    Args:
        pooling: (n, m) the patches of each token, -1 where a square is incomplete.
    """
    there = pooling >= 0
    count = there.sum(1, keepdim=True)
    if bool((pooling.shape[1] % count).any()):
        return None
    order = (~there).long().argsort(dim=1, stable=True)  # patches first
    return pooling.gather(1, order).gather(1, torch.arange(pooling.shape[1]) % count)
