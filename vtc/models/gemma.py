# SPDX-License-Identifier: Apache-2.0
"""PaliGemma, Gemma 3, ShieldGemma 2, Gemma 3n and Gemma 4: mostly bidirectional attention within an
image, with masks from the base model."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers.masking_utils import (
    blockwise_overlay,
    create_causal_mask,
    sliding_window_overlay,
)

from vtc.core.images import ImageMap, Modality, grid_positions, merged_patches
from vtc.models.base import CACHE, Adapter, UnsupportedModelError


class PaliGemma(Adapter):
    """Attention is bidirectional over the whole prompt (prefix LM) and causal in the answer."""

    name: ClassVar[str] = "paligemma"
    model_types: ClassVar[tuple[str, ...]] = ("paligemma",)
    stages: ClassVar[tuple[str, ...]] = ("encoder", "sequence", "layers")
    masks_in_base: ClassVar[bool] = True
    attention: ClassVar[str] = "both directions, all of the prompt"

    def blocks(self, given: Mapping[str, Any]) -> Tensor | None:
        kinds = given.get("token_type_ids")
        return None if kinds is None else torch.where(kinds == 0, 0, -1)


class Gemma3(Adapter):
    """Attention within an image is bidirectional, limited by a layer's window. A window counts the
    tokens that its layer holds."""

    name: ClassVar[str] = "gemma3"
    model_types: ClassVar[tuple[str, ...]] = ("gemma3",)
    projects_patches: ClassVar[bool] = False
    stages: ClassVar[tuple[str, ...]] = ("encoder", "sequence", "layers")
    masks_in_base: ClassVar[bool] = True
    attention: ClassVar[str] = "both directions"
    kinds: ClassVar[str] = "token_type_ids"

    def encoder_units(self, modality: Modality, n: int) -> Tensor:
        projector = self.base.multi_modal_projector
        return merged_patches(
            projector.patches_per_image, projector.patches_per_image, projector.kernel_size
        )

    def encoder_projectors(self) -> list[Any]:
        return []  # the projector pools the grid

    def blocks(self, given: Mapping[str, Any]) -> Tensor | None:
        kinds = given.get(self.kinds)
        if kinds is None:
            return None
        image = kinds > 0
        before = torch.nn.functional.pad(image, (1, 0))[:, :-1]
        return torch.where(image, (image & ~before).long().cumsum(1) - 1, -1)

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        projector = self.base.multi_modal_projector
        side, by = projector.patches_per_image, projector.kernel_size
        return [
            [
                ImageMap(
                    self.grid(len(own), None),
                    patches=merged_patches(side, side, by, i * side * side),
                )
            ]
            for i, own in enumerate(features)
        ]

    def mask(
        self,
        layer: int,
        embeds: Tensor,
        valid: Tensor | None,
        cache: Any,
        blocks: Tensor | None,
    ) -> Any:
        sliding = self.layer_type(layer) == "sliding_attention"
        if blocks is None or not sliding:
            return super().mask(layer, embeds, valid, cache, blocks)
        # Unlike in the common mask, the window also limits attention within images.
        spare = embeds.shape[1]
        if cache is not None:
            held, offset = cache.get_mask_sizes(embeds.shape[1], layer)
            spare = held + offset
        blocks = torch.nn.functional.pad(blocks, (0, max(spare - blocks.shape[1], 0)), value=-1)
        return create_causal_mask(
            config=self.decoder.config,
            inputs_embeds=embeds,
            attention_mask=valid,
            layer_idx=layer,
            or_mask_function=blockwise_overlay(blocks),
            and_mask_function=sliding_window_overlay(self.decoder.config.sliding_window),
            **{CACHE: cache},
        )


class SharedKeys(Adapter):
    """Decoders whose last layers reuse keys and values of earlier ones."""

    def attention_arguments(self, layer: int) -> dict[str, Any]:
        # A layer before which tokens can be dropped reuses no keys; what it stores is lost here.
        attention = self.attention_of(layer)
        names = inspect.signature(attention.forward).parameters
        return {"shared_kv_states": {}} if "shared_kv_states" in names else {}

    def check_rotate(self) -> None:
        pass

    def rotate(self, layer: int, states: Tensor, rotation: Any) -> Tensor:
        module = sys.modules[type(self.attention_of(layer)).__module__]
        return module.apply_rotary_pos_emb(states, *rotation)

    def check_layers(self, layers: Sequence[int]) -> None:
        config = self.decoder.config
        shared = getattr(config, "num_kv_shared_layers", 0) or 0
        own = config.num_hidden_layers - shared
        sources = [
            max(i for i in range(own) if config.layer_types[i] == kind)
            for kind in set(config.layer_types[own:])
        ]
        late = [layer for layer in layers if layer > min(sources, default=config.num_hidden_layers)]
        if late:
            raise UnsupportedModelError(
                f"model: from decoder layer {own} on, {type(self.decoder).__name__} reuses the "
                f"keys of layers {', '.join(map(str, sorted(sources)))}; tokens cannot be dropped "
                f"before layer {late[0]}, only before layers up to {min(sources)}"
            )


class Gemma3n(SharedKeys):
    """A convolutional tower and causal attention. Hidden states have several streams (AltUp): the
    state of a token between layers is all of them in a row, and what is read of attention and MLP
    is of the stream on which they act. Late layers reuse keys and values of earlier ones, after
    which no token can be dropped."""

    name: ClassVar[str] = "gemma3n"
    model_types: ClassVar[tuple[str, ...]] = ("gemma3n",)
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    projects_patches: ClassVar[bool] = False
    unread: ClassVar[str] = "convolutions mix its places and fuse several resolutions"
    shows_states: ClassVar[bool] = True

    def projector(self) -> Any:
        return self.base.embed_vision

    def placeholders(self, output: Any, given: Mapping[str, Any]) -> dict[Modality, Tensor]:
        return super().placeholders(output[0], given)  # the other output is for audio

    def join_streams(self, hidden: Tensor) -> Tensor:
        return hidden if hidden.dim() == 3 else torch.cat(hidden.unbind(0), dim=-1)

    def part_streams(self, tokens: Tensor) -> Tensor:
        return torch.stack(tokens.chunk(self.decoder.config.altup_num_inputs, dim=-1))

    def attention_input(self, layer: int, hidden: Tensor) -> Tensor:
        streams = self.layers[layer].altup.predict(self.part_streams(hidden))  # type: ignore[operator, union-attr]
        return super().attention_input(layer, streams[self.decoder.config.altup_active_idx])

    def normed(self, states: Tensor) -> Tensor:
        return super().normed(self.part_streams(states)[self.decoder.config.altup_active_idx])


class Gemma4(SharedKeys, Gemma3):
    """As Gemma 3, with pooled images of any size. Late layers reuse keys and values of earlier
    ones, after which no token can be dropped."""

    name: ClassVar[str] = "gemma4"
    model_types: ClassVar[tuple[str, ...]] = ("gemma4",)
    encoder_parts: ClassVar[tuple[str, str, str, str]] = (
        *("input_layernorm", "self_attn"),
        *("pre_feedforward_layernorm", "mlp"),
    )
    attention: ClassVar[str] = "both directions in windows; causal in the small models"
    kinds: ClassVar[str] = "mm_token_type_ids"
    video: ClassVar[bool] = True

    def blocks(self, given: Mapping[str, Any]) -> Tensor | None:
        if self.decoder.config.use_bidirectional_attention != "vision":
            return None
        return super().blocks(given)

    def layer_blocks(self, layer: int, blocks: Tensor | None) -> Tensor | None:
        # Full layers are causal, even within images.
        full = self.layer_type(layer) != "sliding_attention"
        return None if full else blocks

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        video = modality == "video"
        places = self._corners(modality, given)
        frames = given["num_frames_per_video"].tolist() if video else [1] * len(places)
        by = self.per_side()
        maps, first = [], 0
        padded = places.shape[1]
        for own, of_one in zip(features, places.split(frames), strict=True):
            grids, patches = [], []
            for frame, corners in enumerate(of_one):  # (x, y) of each patch, -1 at padding
                rows, columns = _cells(corners, by)
                grid = grid_positions(rows, columns)
                grid[:, 0] = frame
                grids.append(grid)
                patches.append(_pooled(corners, by) + first)
                first += padded
            found = ImageMap(torch.cat(grids), tiles=len(of_one), padded=padded)
            assert len(found) == len(own)
            joined = torch.cat(patches)
            if len(joined) == len(found):  # no incomplete cells
                found = replace(found, patches=joined)
            maps.append([found])
        return maps

    def per_side(self) -> int:
        """Patches along the side of a token's square."""
        return int(self.model.config.vision_config.pooling_kernel_size)

    def encoder_attend(self, layer: Any, hidden: Tensor, given: Mapping[str, Any]) -> Tensor:
        attended, _ = layer.self_attn(layer.input_layernorm(hidden), **given)
        return hidden + layer.post_attention_layernorm(attended)

    def encoder_feed(self, layer: Any, hidden: Tensor) -> Tensor:
        fed = layer.mlp(layer.pre_feedforward_layernorm(hidden))
        return hidden + layer.post_feedforward_layernorm(fed)

    def encoder_given(self, given: Mapping[str, Any], row: int, places: Tensor) -> dict[str, Any]:
        cos, sin = (part[row : row + 1, places] for part in given["position_embeddings"])
        return {
            **super().encoder_given(given, row, places),
            "position_embeddings": (cos, sin),
            "position_ids": given["position_ids"][row : row + 1, places],
        }

    def check_encoder(self, modality: Modality, given: Mapping[str, Any]) -> None:
        by = self.per_side()
        for corners in self._corners(modality, given):
            if not len(_pooled(corners, by)):
                raise UnsupportedModelError(
                    f"{modality}_position_ids: the patches of an image do not fill cells of {by} x "
                    f"{by}, so that tokens have different numbers of patches, and those of one "
                    "cannot be merged with those of another"
                )

    def encoder_tiles(
        self, modality: Modality, given: Mapping[str, Any], rows: int, length: int
    ) -> list[tuple[int, Tensor, Tensor]]:
        # Padding, which nothing attends to, is in no tile and does not run.
        by, none = self.per_side(), torch.empty(0).long()
        return [
            (row, none, _pooled(corners, by))
            for row, corners in enumerate(self._corners(modality, given))
        ]

    def encoder_projectors(self) -> list[Any]:
        return [self.base.embed_vision]

    def _corners(self, modality: Modality, given: Mapping[str, Any]) -> Tensor:
        """(tiles, p, 2) the (x, y) of each patch, -1 at padding."""
        found: Tensor = given[f"{modality}_position_ids"]
        return found.cpu()

    def projector(self) -> Any:
        return self.base.embed_vision

    def states_from(self) -> Any:
        return self.tower.pooler

    def recorded_at(self, layer: int, name: str) -> tuple[str, bool]:
        # What follows a mixture of experts, which runs beside the MLP, is the sum of both.
        if name == "mlp_out":
            return "post_feedforward_layernorm", True
        return super().recorded_at(layer, name)


class Gemma4Unified(Gemma4):
    """Gemma 4 without a vision tower: a linear layer makes a token of each patch. A forward lets
    images attend in both directions in all layers, and no window limits that; for a static cache
    transformers itself builds the masks of Gemma 4 as long as nothing is dropped."""

    name: ClassVar[str] = "gemma4_unified"
    model_types: ClassVar[tuple[str, ...]] = ("gemma4_unified",)
    since: ClassVar[Mapping[str, str]] = {"gemma4_unified": "5.21"}
    masks_alike: ClassVar[bool] = False
    attention: ClassVar[str] = "both directions"
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    unread: ClassVar[str] = "it has none"

    def per_side(self) -> int:
        return 1

    def layer_blocks(self, layer: int, blocks: Tensor | None) -> Tensor | None:
        return blocks

    def mask(
        self,
        layer: int,
        embeds: Tensor,
        valid: Tensor | None,
        cache: Any,
        blocks: Tensor | None,
    ) -> Any:
        return Adapter.mask(self, layer, embeds, valid, cache, blocks)


class ShieldGemma2(Gemma3):
    """Gemma 3 that judges images, with or without the head of the classifier."""

    name: ClassVar[str] = "shieldgemma2"
    model_types: ClassVar[tuple[str, ...]] = ("shieldgemma2",)

    @classmethod
    def bind(cls, model: Any) -> Self:
        inner: Any = getattr(model, "model", None)
        if not hasattr(inner, "lm_head"):
            return super().bind(model)
        return replace(super().bind(inner), model=model)


def _cells(corners: Tensor, by: int) -> tuple[int, int]:
    """Rows and columns of pooled cells of by x by patches at `corners` (p, 2)."""
    columns, rows = ((corners.max(0).values + 1) // by).tolist()
    return rows, columns


def _pooled(corners: Tensor, by: int) -> Tensor:
    """(n, by * by) the patches of each pooled cell, in raster order of the cells; (0, by * by) if
    cells are incomplete.

    Args:
        corners: (p, 2) the (x, y) of each patch, -1 at padding.
        by: side of a cell.
    """
    real = (corners[:, 0] >= 0).nonzero()[:, 0]
    x, y = (corners[real] // by).unbind(1)
    cells = y * _cells(corners, by)[1] + x
    if not bool((cells.bincount() == by * by).all()):
        return corners.new_empty(0, by * by)
    return real[cells.argsort(stable=True)].view(-1, by * by)
