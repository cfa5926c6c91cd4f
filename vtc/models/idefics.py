# SPDX-License-Identifier: Apache-2.0
"""Idefics 2 and 3, and SmolVLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtc.core.images import ImageMap, Modality, merged_patches
from vtc.models.base import Adapter, UnsupportedModelError
from vtc.models.resampled import Resampled
from vtc.models.shuffled import Shuffled


class Idefics2(Resampled):
    """A perceiver resamples each image to a fixed number of tokens, which have no places."""

    name: ClassVar[str] = "idefics2"
    model_types: ClassVar[tuple[str, ...]] = ("idefics2",)
    merger: ClassVar[str] = "inputs_merger"

    def resampler_attention(self) -> list[nn.Module]:
        return [layer.self_attn for layer in self.projector().layers]

    def tokens_in(self, length: int) -> slice:
        return slice(length - self.queries(), length)  # as keys, behind the patches

    def queries(self) -> int:
        """The number of tokens of an image."""
        return int(self.model.config.perceiver_config.resampler_n_latents)

    def projector(self) -> Any:
        return self.base.connector.perceiver_resampler

    def patch_states(self, given: Tensor, output: Any) -> Tensor:
        return output

    def placeholders(self, output: Any, given: Mapping[str, Any]) -> dict[Modality, Tensor]:
        return placeholder_ids(self, given)

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        n, first, maps = self.queries(), 0, []
        for own in features:
            count = len(own) // n  # one element holds all images of a sample
            maps.append([self.of_queries(n, (first + i) * n) for i in range(count)])
            first += count
        return maps


class Idefics3(Shuffled):
    """Each tile, and each frame of a clip, is a separate image: the model does not know which
    belong together."""

    name: ClassVar[str] = "idefics3"
    model_types: ClassVar[tuple[str, ...]] = ("idefics3",)
    merger: ClassVar[str] = "inputs_merger"

    def per_side(self) -> int:
        return int(self.model.config.scale_factor)

    def projector(self) -> Any:
        return self.base.connector

    def encoder_projectors(self) -> list[Any]:
        return [self.base.connector.modality_projection]

    def check_encoder(self, modality: Modality, given: Mapping[str, Any]) -> None:
        mask, pixels = given.get("pixel_attention_mask"), given["pixel_values"]
        real = (pixels != 0).flatten(2).any(-1)  # the others only pad the batch
        if mask is not None and not bool(mask[real].all()):
            raise UnsupportedModelError(
                "pixel_attention_mask: some patches of an image are padding, which no patch "
                "attends to; merged with others they would be seen in part"
            )

    def placeholders(self, output: Any, given: Mapping[str, Any]) -> dict[Modality, Tensor]:
        return placeholder_ids(self, given)

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        config, by = self.model.config, self.per_side()
        side = config.vision_config.image_size // config.vision_config.patch_size
        n = (side // by) ** 2
        maps, first = [], 0
        for own in features:
            # One element holds all tiles of a sample.
            of_one = []
            for _ in range(own.shape[:-1].numel() // n):
                patches = merged_patches(side, side, by, first)
                first += side * side
                of_one.append(ImageMap(self.grid(n, None), patches=patches))
            maps.append(of_one)
        return maps


class SmolVLM(Idefics3):
    """As Idefics 3, with a placeholder mask."""

    name: ClassVar[str] = "smolvlm"
    model_types: ClassVar[tuple[str, ...]] = ("smolvlm",)
    since: ClassVar[Mapping[str, str]] = {"smolvlm": "5.21"}
    frames: ClassVar[bool] = True
    merger: ClassVar[str] = "get_placeholder_mask"

    def placeholders(self, output: Any, given: Mapping[str, Any]) -> dict[Modality, Tensor]:
        return Adapter.placeholders(self, output, given)


def placeholder_ids(adapter: Adapter, given: Mapping[str, Any]) -> dict[Modality, Tensor]:
    """Locate placeholders by token id, or without ids by embedding, as the model does.

    Args:
        adapter: bound to the model.
        given: the arguments of the base model's forward.

    Returns:
        (b, s) bool under "image".
    """
    ids, place = given.get("input_ids"), adapter.model.config.image_token_id
    if ids is not None:
        return {"image": ids == place}
    embeds = given["inputs_embeds"]
    table = adapter.base.get_input_embeddings()
    mark = table(torch.full((), place, dtype=torch.long, device=embeds.device))
    return {"image": (embeds == mark).all(-1)}
