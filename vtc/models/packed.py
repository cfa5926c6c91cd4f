# SPDX-License-Identifier: Apache-2.0
"""Towers that take the patches of all images as one sequence, in which `cu_seqlens` bounds what
attends to one another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.core.images import ImageMap, Modality
from vtc.models.base import Adapter


class Packed(Adapter):
    """A packed tower: its tiles are the frames of images and clips.

    A subclass gives the map of each image in `maps`; what has one frame number there is a tile,
    and its tokens are the units in which the tower's patches are merged.
    """

    projects_patches: ClassVar[bool] = False
    encoder_parts: ClassVar[tuple[str, str, str, str]] = ("norm1", "attn", "norm2", "mlp")

    def maps(self, modality: Modality, given: Mapping[str, Any]) -> list[ImageMap]:
        """What the tokens of each image or clip of a call represent.

        Args:
            modality: "image" or "video".
            given: the arguments of `get_image_features` or `get_video_features`.

        Returns:
            One map per image, with patches numbered in the order in which they are given.
        """
        raise NotImplementedError

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        return [[found] for found in self.maps(modality, given)]

    def grids(self, modality: Modality, given: Mapping[str, Any]) -> list[tuple[int, int, int]]:
        """(frames, rows, columns) of patches of each image or clip of a call; as `maps`."""
        sizes = given["image_grid_thw" if modality == "image" else "video_grid_thw"]
        return [(int(t), int(h), int(w)) for t, h, w in sizes.tolist()]

    def encoder_attend(self, layer: Any, hidden: Tensor, given: Mapping[str, Any]) -> Tensor:
        return super().encoder_attend(layer, hidden[0], given)[None]

    def encoder_given(self, given: Mapping[str, Any], row: int, places: Tensor) -> dict[str, Any]:
        # A token lies in the window (or frame) of its place, of which some may be left empty.
        counts = torch.bincount(_windows(given, places))
        ends = torch.nn.functional.pad(counts[counts > 0].cumsum(0), (1, 0)).to(torch.int32)
        own = {**given, "cu_seqlens": ends}
        if (rotation := given.get("position_embeddings")) is not None:
            own["position_embeddings"] = tuple(part[places] for part in rotation)
        if given.get("max_seqlen") is not None:
            own["max_seqlen"] = int(counts.max())
        return own

    def encoder_order(self, given: Mapping[str, Any], places: Tensor) -> Tensor | None:
        windows = _windows(given, places)
        return None if bool((windows == windows[0]).all()) else windows.argsort(stable=True)

    def encoder_tiles(
        self, modality: Modality, given: Mapping[str, Any], rows: int, length: int
    ) -> list[tuple[int, Tensor, Tensor]]:
        none, tiles, order = torch.empty(0, dtype=torch.long), [], self.tower_order(given)
        for found in self.maps(modality, given):
            assert found.grid is not None
            assert found.patches is not None
            for frame in found.grid[:, 0].unique():
                units = found.patches[found.grid[:, 0] == frame]
                tiles.append((0, none, units if order is None else order[units]))
        return tiles

    def encoder_depth(self, given: Mapping[str, Any]) -> int:
        return len(self.encoder_layers())


def _windows(given: Mapping[str, Any], places: Tensor) -> Tensor:
    """(t,) the number of the window of each place, in a tower layer."""
    return torch.bucketize(places, given["cu_seqlens"].to(places), right=True)
