# SPDX-License-Identifier: Apache-2.0
"""Qwen-VL and GLM-V: images and clips of any size, rotary positions with three axes (M-RoPE)."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.core.images import ImageMap, Modality
from vtc.models.base import Adapter, UnsupportedModelError


class QwenVL(Adapter):
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL (dense and MoE).

    A vision token's position is its place in the picture, so tokens keep theirs: "contiguous"
    equals "original" here, as in the methods' official code for these models. Qwen3-VL adds
    features of earlier tower layers after its first decoder layers; a merged token gets those of
    its place. Patches merged in the tower lie in the window of the first.
    """

    model_types: ClassVar[tuple[str, ...]] = (
        *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"),
    )
    name: ClassVar[str] = ", ".join(model_types)
    stages: ClassVar[tuple[str, ...]] = ("encoder", "sequence", "layers")
    encoder_parts: ClassVar[tuple[str, str, str, str]] = ("norm1", "attn", "norm2", "mlp")
    axial: ClassVar[bool] = True
    positions: ClassVar[str] = "places in the picture"
    projects_patches: ClassVar[bool] = False
    video: ClassVar[bool] = True

    def encoder_layers(self) -> list[Any]:
        return self._with_parts(list(self.tower.blocks))

    def encoder_attend(self, layer: Any, hidden: Tensor, given: Mapping[str, Any]) -> Tensor:
        return super().encoder_attend(layer, hidden[0], given)[None]

    def encoder_given(self, given: Mapping[str, Any], places: Tensor) -> dict[str, Any]:
        # A token lies in the window (or frame) of its place, of which some may be left empty.
        counts = torch.bincount(_windows(given, places))
        ends = torch.nn.functional.pad(counts[counts > 0].cumsum(0), (1, 0)).to(torch.int32)
        own = {**given, "cu_seqlens": ends}
        if given.get("position_embeddings") is not None:
            cos, sin = given["position_embeddings"]
            own["position_embeddings"] = cos[places], sin[places]
        if given.get("max_seqlen") is not None:
            own["max_seqlen"] = int(counts.max())
        return own

    def encoder_order(self, given: Mapping[str, Any], places: Tensor) -> Tensor | None:
        windows = _windows(given, places)
        return None if bool((windows == windows[0]).all()) else windows.argsort(stable=True)

    def encoder_tiles(
        self, modality: Modality, given: Mapping[str, Any], rows: int, length: int
    ) -> list[tuple[int, Tensor, Tensor]]:
        sizes = given["image_grid_thw" if modality == "image" else "video_grid_thw"]
        none, tiles, first = torch.empty(0, dtype=torch.long), [], 0
        unit = self.tower.spatial_merge_size**2
        for frames, height, width in sizes.tolist():
            for _ in range(frames):  # each attends to itself only
                count = height * width
                places = torch.arange(first, first + count)
                tiles.append((0, none, places.view(-1, unit)))
                first += count
        return tiles

    def encoder_projectors(self) -> list[Any]:
        return [self.tower.merger, *getattr(self.tower, "deepstack_merger_list", ())]

    def encoder_depth(self, given: Mapping[str, Any]) -> int:
        return len(self.encoder_layers())

    def projector(self) -> Any:
        return self.tower.merger

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        sizes = given["image_grid_thw" if modality == "image" else "video_grid_thw"]
        by, maps, first = self.tower.spatial_merge_size, [], 0
        for own, (frames, rows, columns) in zip(features, sizes.tolist(), strict=True):
            place = torch.arange(len(own))
            r, c = rows // by, columns // by
            grid = torch.stack([place // (r * c), place // c % r, place % c], dim=1)
            assert len(own) == frames * r * c
            # The processor orders patches so that those of one token are adjacent.
            count = len(own) * by * by
            patches = torch.arange(first, first + count).view(-1, by * by)
            first += count
            maps.append([ImageMap(grid, patches=patches)])
        return maps

    def tower_order(self, given: Mapping[str, Any]) -> Tensor | None:
        tower = self.tower
        if not hasattr(tower, "fullatt_block_indexes"):  # no windows: the same order
            return None
        grid = given.get("image_grid_thw", given.get("video_grid_thw"))
        if hasattr(tower, "get_window_index"):  # transformers up to 5.23
            windows, _ = tower.get_window_index(grid)
        else:
            from transformers.vision_utils import get_vision_window_index

            windows, _ = get_vision_window_index(
                grid, tower.spatial_merge_size, tower.window_size, tower.patch_size
            )
        unit = self.tower.spatial_merge_unit
        windows = torch.as_tensor(windows).cpu()
        place = torch.empty_like(windows)
        place[windows] = torch.arange(len(windows))
        return (place[:, None] * unit + torch.arange(unit)).flatten()

    def rotary(self, layer: int, hidden: Tensor, positions: Tensor) -> Any:
        if positions.dim() == 2:
            positions = positions[None].expand(3, -1, -1)
        elif positions.shape[0] == 4:  # the first axis counts text, for packed sequences
            positions = positions[1:]
        return self.decoder.rotary_emb(hidden, positions)

    def check_rotate(self) -> None:
        if not hasattr(_module(self), "apply_multimodal_rotary_pos_emb"):
            super().check_rotate()

    def rotate(self, layer: int, states: Tensor, rotation: Any) -> Tensor:
        apply = getattr(_module(self), "apply_multimodal_rotary_pos_emb", None)
        if apply is None:
            return super().rotate(layer, states, rotation)
        section = self.decoder.config.rope_parameters["mrope_section"]
        return apply(states, states, *rotation, section)[1]


class GlmV(QwenVL):
    """GLM-4.1V, GLM-4.5V, GLM-4.6V, its agent, and GLM-OCR: as Qwen2-VL, but a convolution joins
    the patches of a token before the merger."""

    model_types: ClassVar[tuple[str, ...]] = ("glm4v", "glm4v_moe", "glm46v", "glmga", "glm_ocr")
    name: ClassVar[str] = ", ".join(model_types)

    def states_from(self) -> Any:
        return self.tower.post_layernorm

    def patch_states(self, given: Tensor, output: Any) -> Tensor:
        return output


class Qwen3_5(QwenVL):
    """Qwen3.5 (dense and MoE): most layers are recurrent, and a token cannot be dropped from a
    recurrent state. Methods act before the language model only."""

    name: ClassVar[str] = "qwen3_5, qwen3_5_moe"
    model_types: ClassVar[tuple[str, ...]] = ("qwen3_5", "qwen3_5_moe")
    stages: ClassVar[tuple[str, ...]] = ("encoder", "sequence")

    def check_layers(self, layers: Sequence[int]) -> None:
        if layers:
            raise UnsupportedModelError(
                "model: tokens cannot be dropped between layers of Qwen3.5, whose recurrent layers "
                "have already read them; use a method that acts before the language model"
            )


def _windows(given: Mapping[str, Any], places: Tensor) -> Tensor:
    """(t,) the number of the window of each place, in a tower layer."""
    return torch.bucketize(places, given["cu_seqlens"].to(places), right=True)


class QwenOmni(QwenVL):
    """The thinkers of Qwen2.5-Omni and Qwen3-Omni: patch `model.thinker`. Images and clips are
    compressed; tested without audio."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
    name: ClassVar[str] = ", ".join(model_types)
    since: ClassVar[Mapping[str, str]] = dict.fromkeys(model_types, "5.21")


def _module(adapter: Adapter) -> Any:
    return sys.modules[type(adapter.layers[0].self_attn).__module__]
