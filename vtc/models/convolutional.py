# SPDX-License-Identifier: Apache-2.0
"""GOT-OCR 2, PP-Chart2Table and FastVLM: attention within or before convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.core.images import ImageMap, Modality, merged_patches
from vtc.models.base import Adapter, UnsupportedModelError


class GotOcr2(Adapter):
    """The ViT of SAM, then a neck and two convolutions that halve its map.

    A token's patches are the 4 x 4 that the strides map to it, and it is shown means over these, as
    in all towers that join patches. The 3 x 3 convolutions also read patches around them, which do
    not count. Windows at the edge are padded: patches attend to the padding, and their attention is
    what is left of it; what the padding attends to does not count.
    """

    name: ClassVar[str] = "got_ocr2, pp_chart2table"
    model_types: ClassVar[tuple[str, ...]] = ("got_ocr2", "pp_chart2table")
    projects_patches: ClassVar[bool] = False
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    unmerged: ClassVar[str] = (
        "its layers take whole grids, and the norm before its convolutions gives places without a "
        "patch a state all the same"
    )
    by: ClassVar[int] = 4

    @property
    def side(self) -> int:
        """Patches along the side of an image; the tower takes one size."""
        return int(self.tower.config.image_size // self.tower.config.patch_size)

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        side, maps = self.side, []
        for i, own in enumerate(features):
            # Of other sizes, convolutions make tokens of less than a square.
            whole = side % self.by == 0
            patches = merged_patches(side, side, self.by, i * side**2) if whole else None
            maps.append([ImageMap(self.grid(len(own), None), patches=patches)])
        return maps

    def tower_attention(self) -> list[Any]:
        return [layer.attn for layer in self.tower.layers]

    def patches_at(self, layer: int, patches: Tensor, given: Mapping[str, Any]) -> Tensor:
        size = self.tower.layers[layer].window_size
        if not size:
            return patches
        # Rows of the batch are windows, filled up with padding.
        side, across = self.side, math.ceil(self.side / size)
        image, place = patches // side**2, patches % side**2
        row, column = place // side, place % side
        window = (image * across + row // size) * across + column // size
        return window * size**2 + row % size * size + column % size

    def watch_attention(self, module: Any, heard: Callable[..., None]) -> list[Any]:
        window = next(layer.window_size for layer in self.tower.layers if layer.attn is module)
        real = _real_places(self.side, window) if window else None

        def attend(qkv: Any, args: Any, output: Tensor) -> None:
            b, rows, columns, _ = output.shape
            parts = output.view(b, rows * columns, 3, module.num_attention_heads, -1)
            query, key, value = parts.permute(2, 0, 3, 1, 4)
            options: dict[str, Any] = {"scaling": module.scale}
            if module.use_rel_pos:
                size = rows, columns
                bias = module.get_decomposed_rel_pos(
                    query.flatten(0, 1), module.rel_pos_h, module.rel_pos_w, size, size
                )
                options["position_bias"] = bias.reshape(*query.shape[:3], -1)
            mask = None
            if real is not None and not bool(real.all()):
                attends = real.to(output.device).repeat(b // len(real), 1)
                mask = attends[:, None, :, None].expand(-1, 1, -1, attends.shape[1])
            heard(query, key, value, mask, options)

        return [module.qkv.register_forward_hook(attend)]

    def states_from(self) -> Any:
        return self.tower.layers[-1]

    def patch_states(self, given: Tensor, output: Any) -> Tensor:
        return output


class FastVLM(Adapter):
    """FastViTHD: stages of convolutions, then stages of attention. The places of the last stage are
    the vision tokens, and only its layers are read; a convolution over these places follows."""

    name: ClassVar[str] = "fast_vlm"
    model_types: ClassVar[tuple[str, ...]] = ("fast_vlm",)
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    unmerged: ClassVar[str] = "convolutions mix its places, before, between and after attention"

    def tower_attention(self) -> list[Any]:
        timm: Any = self.tower.timm_model
        stages = getattr(timm, "stages", None)
        blocks = getattr(stages[-1], "blocks", ()) if stages else ()
        found = [getattr(block, "token_mixer", None) for block in blocks]
        parts = ("qkv", "num_heads", "head_dim", "scale")
        if not found or not all(hasattr(module, part) for module in found for part in parts):
            raise UnsupportedModelError(
                "model: vtc reads FastViT towers whose last stage has attention with "
                f"{', '.join(parts)}, unlike {type(timm).__name__} of these settings"
            )
        return found

    def watch_attention(self, module: Any, heard: Callable[..., None]) -> list[Any]:
        def attend(qkv: Any, args: Any, output: Tensor) -> None:
            b, n, _ = output.shape
            parts = output.view(b, n, 3, module.num_heads, module.head_dim)
            heard(*parts.permute(2, 0, 3, 1, 4), None, {"scaling": module.scale})

        return [module.qkv.register_forward_hook(attend)]


def _real_places(side: int, window: int) -> Tensor:
    """(windows, window ** 2) bool, False at padding: a square map divided into windows."""
    across = math.ceil(side / window)
    inside = torch.arange(across * window) < side
    real = (inside[:, None] & inside).view(across, window, across, window)
    return real.transpose(1, 2).reshape(across**2, window**2)
