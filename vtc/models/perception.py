# SPDX-License-Identifier: Apache-2.0
"""Perception LM."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch

from vtc.core.images import ImageMap, Modality, merged_patches
from vtc.models.base import Adapter, UnsupportedModelError


class PerceptionLM(Adapter):
    """A tower of timm, pooled. The thumbnail and the tiles are adjacent and form one image, as do
    the frames of a clip."""

    name: ClassVar[str] = "perception_lm"
    model_types: ClassVar[tuple[str, ...]] = ("perception_lm",)
    projects_patches: ClassVar[bool] = False
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    joins: ClassVar[tuple[Modality, ...]] = ("image", "video")
    video: ClassVar[bool] = True
    clips_as_images: ClassVar[bool] = True

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        by, tiles = self.model.config.projector_pooling_ratio, given["pixel_values"].shape[1]
        size, maps = given["pixel_values"].shape[-1], []
        side = size // self.tower.timm_model.patch_embed.patch_size[0]
        for i, own in enumerate(features):
            found = ImageMap(self.grid(len(own), None), group=i // tiles)
            # Other sides are pooled in cells that overlap.
            if side % by == 0 and (side // by) ** 2 == len(own):
                patches = merged_patches(side, side, by, i * side * side)
                found = replace(found, patches=patches)
            maps.append([found])
        return maps

    def join(self, maps: list[ImageMap], modality: Modality) -> ImageMap:
        found = super().join(maps, modality)
        if found.crop is None:
            return found
        count = len(maps)  # here the thumbnail comes first
        return replace(found, crop=(found.crop - 1) % count)

    def tower_attention(self) -> list[Any]:
        found = [getattr(block, "attn", None) for block in self.tower.timm_model.blocks]
        parts = ("q_norm", "k_norm", "scale", "num_prefix_tokens")
        if not all(hasattr(module, part) for module in found for part in parts):
            raise UnsupportedModelError(
                "model: vtc reads timm towers whose attention has "
                f"{', '.join(parts)}, unlike that of {type(self.tower.timm_model).__name__}"
            )
        return found

    def watch_attention(self, module: Any, heard: Callable[..., None]) -> list[Any]:
        seen = threading.local()  # other threads may run the same module

        def keep(name: str) -> Callable[..., None]:
            return lambda module, args, output: setattr(seen, name, output)

        def attend(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            given = dict(zip(("x", "rope", "attn_mask"), args, strict=False)) | kwargs
            query, key = (_turned(module, s, given.get("rope")) for s in (seen.q, seen.k))
            heard(query, key, key, given.get("attn_mask"), {"scaling": module.scale})

        return [
            module.q_norm.register_forward_hook(keep("q")),
            module.k_norm.register_forward_hook(keep("k")),
            module.register_forward_hook(attend, with_kwargs=True),
        ]

    def has_cls(self) -> bool:
        return getattr(self.tower.timm_model, "cls_token", None) is not None

    def prefix(self, given: Mapping[str, Any]) -> int:
        return int(self.model.config.vision_use_cls_token)


def _turned(module: Any, states: torch.Tensor, rope: Any) -> torch.Tensor:
    """(b, h, n, d) queries or keys as timm's attention rotates them, all but the prefix."""
    if rope is None:
        return states
    from timm.layers import apply_rot_embed_cat

    first, rest = states.tensor_split([module.num_prefix_tokens], dim=2)
    half = getattr(module, "rotate_half", False)
    return torch.cat([first, apply_rot_embed_cat(rest, rope, half=half)], dim=2).type_as(states)
