# SPDX-License-Identifier: Apache-2.0
"""Step 3.7."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.core.images import ImageMap, Modality, grid_positions, merged_patches
from vtc.models.base import Adapter, UnsupportedModelError


class Step3p7(Adapter):
    """A mixture of experts, some of whose layers have a window. An image is its tiles, followed by
    the whole picture.

    Two convolutions halve the map of the tower: a token's patches are the 4 x 4 that their strides
    map to it. They are 3 x 3, and also read patches around these, which do not count. Of patches
    that were merged away or dropped they read zeros, as beyond the edge of the picture.
    """

    name: ClassVar[str] = "step3p7"
    model_types: ClassVar[tuple[str, ...]] = ("step3p7",)
    stages: ClassVar[tuple[str, ...]] = ("encoder", "sequence", "layers")
    encoder_parts: ClassVar[tuple[str, str, str, str]] = (
        *("layernorm_before", "self_attn"),
        *("layernorm_after", "mlp"),
    )
    projects_patches: ClassVar[bool] = False
    by: ClassVar[int] = 4

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        pixels, local = given["pixel_values"], given.get("pixel_values_local")
        whole, counts = self._plane(pixels), given.get("num_local_patches")
        first = len(pixels) * whole[0] * whole[1]  # tiles come after all whole pictures
        maps = []
        for i in range(len(features)):
            tiles = 0 if counts is None else int(counts[i])
            grid, patches = self._tokens(whole, i * whole[0] * whole[1])
            if not tiles:
                maps.append([ImageMap(grid, patches=patches)])
                continue
            plane = self._plane(local)
            area = plane[0] * plane[1]
            each = [self._tokens(plane, first + tile * area) for tile in range(tiles)]
            first += tiles * area
            grids, joined = zip(*each, (grid, patches), strict=True)
            crop = torch.arange(1, tiles + 1).repeat_interleave(len(each[0][0]))
            crop = torch.nn.functional.pad(crop, (0, len(grid)))
            known = None if any(one is None for one in joined) else torch.cat(joined)
            maps.append([ImageMap(torch.cat(grids), crop=crop, patches=known, tiles=tiles + 1)])
        return maps

    def _plane(self, pixels: Any) -> tuple[int, int]:
        """Rows and columns of patches."""
        patch = self.tower.config.patch_size
        return pixels.shape[-2] // patch, pixels.shape[-1] // patch

    def _tokens(self, plane: tuple[int, int], first: int) -> tuple[Tensor, Tensor | None]:
        """(n, 3) places of the tokens of a map of patches, and (n, 16) patches of each, numbered
        from `first`; `None` if some tokens are made of less than a square."""
        by = self.by
        grid = grid_positions(*(-(-size // by) for size in plane))
        if any(size % by for size in plane):
            return grid, None
        return grid, merged_patches(*plane, by, first)

    def states_from(self) -> Any:
        return self.tower.layers[-1]

    def patch_states(self, given: Tensor, output: Any) -> Tensor:
        return output

    def encoder_layers(self) -> list[Any]:
        return self._with_parts(list(self.tower.layers))

    def check_encoder(self, modality: Modality, given: Mapping[str, Any]) -> None:
        for name, plane in self._planes(given).items():
            if any(size % self.by for size in plane):
                raise UnsupportedModelError(
                    f"{name}: convolutions make tokens of less than {self.by} x {self.by} of its "
                    f"{plane[0]} x {plane[1]} patches, which cannot be merged with others; use "
                    f"sizes that are multiples of {self.by} patches"
                )
        planes = {*self._planes(given).values()}
        if len({rows * columns for rows, columns in planes}) < len(planes):
            raise UnsupportedModelError(
                "pixel_values_local: its tiles have as many patches as the whole picture, in "
                "another shape, by which vtc cannot tell them apart to merge patches"
            )

    def encoder_tiles(
        self, modality: Modality, given: Mapping[str, Any], rows: int, length: int
    ) -> list[tuple[int, Tensor, Tensor]]:
        # The tower runs on all whole pictures, then on all tiles.
        none, planes = torch.empty(0, dtype=torch.long), self._planes(given).values()
        plane = next(plane for plane in planes if plane[0] * plane[1] == length)
        return [(row, none, merged_patches(*plane, self.by)) for row in range(rows)]

    def encoder_given(self, given: Mapping[str, Any], row: int, places: Tensor) -> dict[str, Any]:
        rotation = tuple(part[places] for part in given["position_embeddings"])
        return {**super().encoder_given(given, row, places), "position_embeddings": rotation}

    def encoder_attend(self, layer: Any, hidden: Tensor, given: Mapping[str, Any]) -> Tensor:
        attended, _ = layer.self_attn(layer.layernorm_before(hidden), **given)
        return layer.lambda_1 * attended + hidden

    def encoder_feed(self, layer: Any, hidden: Tensor) -> Tensor:
        return layer.lambda_2 * layer.mlp(layer.layernorm_after(hidden)) + hidden

    def encoder_projectors(self) -> list[Any]:
        return []  # convolutions join the grid before it

    def _planes(self, given: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        """Rows and columns of patches of whole pictures and tiles, by the name of their pixels."""
        names = ("pixel_values", "pixel_values_local")
        return {name: self._plane(given[name]) for name in names if given.get(name) is not None}
