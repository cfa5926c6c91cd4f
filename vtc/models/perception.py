# SPDX-License-Identifier: Apache-2.0
"""Perception LM."""

from __future__ import annotations

import math
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
    stages: ClassVar[tuple[str, ...]] = ("encoder", "sequence", "layers")
    encoder_parts: ClassVar[tuple[str, str, str, str]] = ("norm1", "attn", "norm2", "mlp")
    joins: ClassVar[tuple[Modality, ...]] = ("image", "video")
    video: ClassVar[bool] = True
    clips_as_images: ClassVar[bool] = True

    def encoder_layers(self) -> list[Any]:
        from timm.models.eva import EvaBlock

        timm: Any = self.tower.timm_model
        plain = all(isinstance(block, EvaBlock) for block in timm.blocks)
        biases = any(getattr(block.attn, "q_bias", None) is not None for block in timm.blocks)
        if not plain or biases or timm.num_prefix_tokens != self.has_cls():
            raise UnsupportedModelError(
                f"model: patches can be merged in timm's towers of pre-norm EvaBlocks whose one "
                f"special token is [CLS], unlike in {type(timm).__name__} of these settings"
            )
        return self._with_parts(list(timm.blocks))

    def encoder_units(self, modality: Modality, n: int) -> torch.Tensor:
        side = math.isqrt(n)
        return merged_patches(side, side, self.model.config.projector_pooling_ratio)

    def encoder_depth(self, given: Mapping[str, Any]) -> int:
        return len(self.encoder_layers())

    def encoder_projectors(self) -> list[Any]:
        return []  # the projector pools the grid

    def check_encoder(self, modality: Modality, given: Mapping[str, Any]) -> None:
        by, side = self.model.config.projector_pooling_ratio, self._side(given)
        if side % by:
            raise UnsupportedModelError(
                f"pixel_values: the {side} x {side} patches of an image are pooled by {by} in "
                "cells that overlap, so that a patch belongs to several tokens and cannot be "
                "merged or dropped with one"
            )

    def encoder_given(
        self, given: Mapping[str, Any], row: int, places: torch.Tensor
    ) -> dict[str, Any]:
        rope, prefix = given.get("rope"), int(self.has_cls())
        return {"rope": None if rope is None else rope[..., places[prefix:] - prefix, :]}

    def encoder_weighed(self, given: Mapping[str, Any], bias: torch.Tensor) -> dict[str, Any]:
        return {**given, "attn_mask": bias.expand(1, 1, len(bias), -1)}

    def encoder_attend(
        self, layer: Any, hidden: torch.Tensor, given: Mapping[str, Any]
    ) -> torch.Tensor:
        attended = layer.attn(layer.norm1(hidden), **given)
        if layer.gamma_1 is not None:
            attended = layer.gamma_1 * attended
        return hidden + layer.drop_path1(attended)

    def encoder_feed(self, layer: Any, hidden: torch.Tensor) -> torch.Tensor:
        fed = layer.mlp(layer.norm2(hidden))
        if layer.gamma_2 is not None:
            fed = layer.gamma_2 * fed
        return hidden + layer.drop_path2(fed)

    def _side(self, given: Mapping[str, Any]) -> int:
        """Patches along the side of a tile."""
        patch: int = self.tower.timm_model.patch_embed.patch_size[0]
        return int(given["pixel_values"].shape[-1]) // patch

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        by, tiles = self.model.config.projector_pooling_ratio, given["pixel_values"].shape[1]
        side, maps = self._side(given), []
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
            b, h, n, _ = key.shape
            # Together with queries and keys, or apart.
            value = seen.v.view(b, n, -1, h, key.shape[-1])[:, :, -1].transpose(1, 2)
            heard(query, key, value, given.get("attn_mask"), {"scaling": module.scale})

        values = module.v_proj if module.qkv is None else module.qkv
        return [
            module.q_norm.register_forward_hook(keep("q")),
            module.k_norm.register_forward_hook(keep("k")),
            values.register_forward_hook(keep("v")),
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
