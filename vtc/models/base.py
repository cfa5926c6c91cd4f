# SPDX-License-Identifier: Apache-2.0
"""How transformers implements a family of VLMs, as far as the engine needs to know."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.masking_utils import (
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)

from vtc.core.errors import UnsupportedModelError
from vtc.core.images import ImageMap, Modality, grid_positions

CACHE = (
    "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
)
"""The name of the cache argument: `past_key_values` up to transformers 5.23, `cache` from 5.24."""


_OWN = {
    "rope_deltas": "rotary positions of its vision tokens are places in the picture (m-RoPE)",
    "_deepstack_process": "features of earlier tower layers are added between decoder layers",
}
"""Features outside the common shape, by the attribute that reveals them."""


ADAPTERS: list[type[Adapter]] = []
"""The registered families, in the order of their definition."""


def _register(cls: type[Adapter]) -> None:
    """Register a family; if its module is reloaded, the new class replaces the old one.

    Raises:
        TypeError: the family does not define a name.
        ValueError: another family has its name or one of its model types.
    """
    if "name" not in vars(cls):
        raise TypeError(f"{cls.__name__}: a family with model_types has a name of its own as well")
    same = (cls.__module__, cls.__qualname__)
    others = [a for a in ADAPTERS if (a.__module__, a.__qualname__) != same]
    for other in others:
        shared = sorted({*cls.model_types} & {*other.model_types})
        if shared or other.name == cls.name:
            what = f"model type {shared[0]!r}" if shared else f"name {cls.name!r}"
            raise ValueError(f"{cls.__name__}: {other.__name__} has the {what} already")
    ADAPTERS[:] = [*others, cls]


@dataclass(frozen=True, eq=False)
class Adapter:
    """The common shape: projected features replace placeholder tokens of a causal decoder with
    one-dimensional positions.

    An adapter is bound to one model: it holds the modules and knows how the architecture lays out
    vision tokens. A family is a subclass that overrides what differs.

    Attributes:
        model: the model passed to `vtc.patch`, without wrappers.
        base: merges vision features into the text embeddings.
        decoder: called, directly or not, by `base` with `inputs_embeds`; holds the decoder `layers`
            and their `config`.
        tower: the vision encoder, or `None` if none is found.

    Class attributes:
        name: shown by `vtc models`.
        model_types: the `config.model_type` of its models.
        stages: the stages in which methods can act.
        merger: the method of the base model that merges features into the sequence.
        masks_in_base: the base model builds the attention masks, not the decoder.
        attention: how the tokens of an image attend to one another, for `vtc models`.
        positions: what rotary positions encode, for `vtc models`.
        crosses: the sequence contains no vision tokens; cross-attention layers read them.
        axial: rotary positions have several axes (M-RoPE) and encode a vision token's place in the
            picture, so gaps of dropped tokens cannot close.
        joins: modalities in which adjacent features of one `ImageMap.group` form one image or clip.
        video: clips are compressed as a whole, for `vtc models`.
        frames: clips are sets of images, one per frame, for `vtc models`.
        projects_patches: the projector makes one token of each patch state; otherwise it joins
            patches, and merged tokens are averages of what comes out of it.
        unread: why nothing of the vision tower can be read; empty if it can.
        clips_as_images: the base model encodes clips with `get_image_features`.
        places: its vision tokens have places in the picture.
        encoder_parts: the norm, the attention, the second norm and the feed-forward of a tower
            layer, by name.
        since: by model type, the first transformers version with what vtc hooks, if newer than the
            oldest version that vtc supports.
    """

    name: ClassVar[str] = "generic"
    model_types: ClassVar[tuple[str, ...]] = ()
    since: ClassVar[Mapping[str, str]] = {}
    stages: ClassVar[tuple[str, ...]] = ("pixels", "encoder", "sequence", "layers")
    merger: ClassVar[str] = "get_placeholder_mask"
    masks_in_base: ClassVar[bool] = False
    attention: ClassVar[str] = "causal"
    positions: ClassVar[str] = "one axis"
    crosses: ClassVar[bool] = False
    axial: ClassVar[bool] = False
    joins: ClassVar[tuple[Modality, ...]] = ()
    video: ClassVar[bool] = False
    frames: ClassVar[bool] = False
    projects_patches: ClassVar[bool] = True
    unread: ClassVar[str] = ""
    clips_as_images: ClassVar[bool] = False
    places: ClassVar[bool] = True
    encoder_parts: ClassVar[tuple[str, str, str, str]] = (
        *("layer_norm1", "self_attn"),
        *("layer_norm2", "mlp"),
    )

    model: Any
    base: Any
    decoder: Any
    tower: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "model_types" in vars(cls):
            _register(cls)

    @classmethod
    def readable(cls) -> str:
        """What methods can read of the vision tower, in words."""
        if cls.unread:
            return f"nothing: {cls.unread}"
        return "attention, keys, patch states"

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers."""
        return self.decoder.layers

    # ---- where things are ---------------------------------------------------------------------
    @classmethod
    def bind(cls, model: nn.Module) -> Self:
        """Find the modules of a model.

        Args:
            model: the model, without wrappers.

        Returns:
            The adapter, bound to the model.

        Raises:
            UnsupportedModelError: the model lacks a module that vtc hooks; the message names it.
        """
        base: Any = model if hasattr(model, cls.merger) else getattr(model, "model", None)
        language_model = getattr(base, "language_model", None)
        if language_model is None:
            language_model = getattr(base, "text_model", None)
        missing = [name for name in (cls.merger, "get_image_features") if not hasattr(base, name)]
        if language_model is None:
            missing.append("language_model")
        if base is None or missing:
            raise UnsupportedModelError(
                f"model: {type(model).__name__} lacks {', '.join(missing) or 'a base model'}"
            )
        decoder = language_model
        while not hasattr(decoder, "layers"):
            decoder = getattr(decoder, "model", None) or getattr(decoder, "decoder", None)
            if decoder is None:
                raise UnsupportedModelError(
                    f"model: found no decoder layers in {type(language_model).__name__}"
                )
        towers = (getattr(base, name, None) for name in ("vision_tower", "vision_model", "visual"))
        return cls(model, base, decoder, next((t for t in towers if t is not None), None))

    def check(self) -> None:
        """Refuse a model that this family does not support.

        Raises:
            UnsupportedModelError: the model has its own `generate`, or, in the generic family, a
                feature outside the common shape.
        """
        kind = type(self.model).__name__
        own = getattr(type(self.model), "generate", GenerationMixin.generate)
        if own is not GenerationMixin.generate:
            raise UnsupportedModelError(
                f"model: {kind} has a generate of its own, which needs a family of its own"
            )
        if self.model_types:
            return
        kinds = set(getattr(self.decoder.config, "layer_types", None) or ())
        foreign = kinds - {"full_attention", "sliding_attention"}
        if foreign:
            raise UnsupportedModelError(
                f"model: {type(self.decoder).__name__} has layers of kind "
                f"{', '.join(sorted(foreign))}; supported are full and sliding attention"
            )
        rotary = getattr(self.decoder, "rotary_emb", None)
        if rotary is None or "layer_type" in inspect.signature(rotary.forward).parameters:
            raise UnsupportedModelError(
                f"model: {type(self.decoder).__name__} has not one rotary embedding for all "
                "layers, and so needs a family of its own"
            )
        if 0 in (getattr(self.decoder.config, "layer_rope_theta", None) or ()):
            raise UnsupportedModelError(
                f"model: some layers of {type(self.decoder).__name__} have no rotary positions, "
                "which needs a family of its own"
            )
        if "deepstack_features" in inspect.signature(type(self.decoder).forward).parameters:
            raise UnsupportedModelError(
                f"model: vision tokens enter {type(self.decoder).__name__} as zeros, and features "
                "are added between its layers, which needs a family of its own"
            )
        for name, meaning in _OWN.items():
            if hasattr(self.decoder, name) or hasattr(self.base, name):
                raise UnsupportedModelError(
                    f"model: {kind} has {name}: {meaning}, which needs a family of its own"
                )
        accepted = inspect.signature(type(self.base).forward).parameters
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in accepted:
                raise UnsupportedModelError(
                    f"model: {kind} takes {name}, by which it may mask or place the tokens of an "
                    "image in a way of its own, which needs a family of its own"
                )

    def check_layers(self, layers: Sequence[int]) -> None:
        """Refuse to drop tokens where the family cannot; the common shape can everywhere.

        Args:
            layers: 0-based decoder layers before which tokens would be dropped, ascending.

        Raises:
            UnsupportedModelError: tokens cannot be dropped before one of them.
        """

    # ---- features and placeholders ------------------------------------------------------------
    def features(self, output: Any) -> Any:
        """The features for the placeholders.

        Args:
            output: what `get_image_features` returned.

        Returns:
            A tensor (images, n, d), or a list of (n, d).
        """
        return output.pooler_output

    def placeholders(self, output: Any, given: Mapping[str, Any]) -> dict[Modality, Tensor]:
        """Locate the placeholders.

        Args:
            output: what `merger` returned.
            given: its arguments.

        Returns:
            (b, s) bool by modality, True at placeholders.
        """
        names: tuple[Modality, ...] = ("image", "video")
        masks = output if isinstance(output, tuple) else (output,)
        return {
            name: mask[..., 0] if mask.dim() == 3 else mask
            for name, mask in zip(names, masks, strict=False)
            if mask is not None
        }

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        """What the placeholders of each element of `features` represent.

        Args:
            modality: "image" or "video".
            given: the arguments of `get_image_features` or `get_video_features`.
            features: (images, n, d), or a list of (n, d).

        Returns:
            By element, one map per image.
        """
        maps, first = [], 0
        for i, own in enumerate(features):
            found = self.plain_map(len(own), first, self._size_of(given, i))
            first += len(own)
            maps.append([found])
        return maps

    def _size_of(self, given: Mapping[str, Any], i: int) -> tuple[int, int] | None:
        shapes = given.get("spatial_shapes")  # of an image without padding: NaFlex
        if shapes is not None:
            patch = self.tower.config.patch_size
            return int(shapes[i][0]) * patch, int(shapes[i][1]) * patch
        sizes = given.get("image_sizes")
        return None if sizes is None else (int(sizes[i][0]), int(sizes[i][1]))

    def plain_map(self, n: int, first: int, image_size: tuple[int, int] | None = None) -> ImageMap:
        """A map with one patch per token, in raster order.

        Args:
            n: number of tokens.
            first: number of the first patch.
            image_size: (height, width) in pixels, or `None`.

        Returns:
            The map of the n tokens.
        """
        patches = torch.arange(first, first + n)[:, None]
        return ImageMap(self.grid(n, image_size), patches=patches)

    def join(self, maps: list[ImageMap], modality: Modality) -> ImageMap:
        """Join adjacent maps: the tiles of an image, the thumbnail last, or the frames of a clip.

        Args:
            maps: in sequence order.
            modality: "image" or "video".

        Returns:
            The map of the whole image or clip.
        """
        if len(maps) == 1:
            return maps[0]
        grids, crops = [], []
        for i, own in enumerate(maps):
            if own.grid is not None:
                grid = own.grid.clone()
                if modality == "video":
                    grid[:, 0] = i
                grids.append(grid)
            crops.append(torch.full((len(own),), (i + 1) % len(maps)))
        patches = [own.patches for own in maps if own.patches is not None]
        states = [own.states for own in maps if own.states is not None]
        ends = [own.separator for own in maps if own.separator is not None]
        return ImageMap(
            torch.cat(grids) if len(grids) == len(maps) else None,
            count=sum(map(len, maps)),
            crop=None if modality == "video" else torch.cat(crops),
            separator=torch.cat(ends) if len(ends) == len(maps) else None,
            patches=torch.cat(patches) if len(patches) == len(maps) else None,
            states=torch.cat(states) if len(states) == len(maps) else None,
            tiles=sum(own.tiles for own in maps),
        )

    # ---- vision -------------------------------------------------------------------------------
    def tower_attention(self) -> list[nn.Module]:
        """The attention module of each layer of the vision tower, first to last.

        Raises:
            UnsupportedModelError: the tower's attention cannot be read.
        """
        if self.unread:
            raise UnsupportedModelError(
                f"model: in the vision tower of {type(self.model).__name__} vtc reads no "
                f"attention and no keys: {self.unread}; use a method that needs neither"
            )
        stacks = self._stacks
        if len(stacks) != 1 or not all(hasattr(module, "config") for module in stacks[0]):
            why = (
                "its layers form several stages, whose places differ"
                if stacks
                else "none of its layers attends through the attention functions of transformers"
            )
            raise UnsupportedModelError(
                f"model: cannot read attention in the vision tower {type(self.tower).__name__}: "
                f"{why}"
            )
        return list(stacks[0])

    @cached_property
    def _stacks(self) -> list[list[Any]]:
        # Adapters are bound anew in each call, as modules may be replaced in between.
        return _attention_stacks(self.tower)

    def watch_attention(self, module: Any, heard: Callable[..., None]) -> list[Any] | None:
        """Listen to a tower's attention module that does not attend through the attention functions
        of transformers.

        Args:
            module: one of `tower_attention`.
            heard: to be called with the module's query (b, h, n, d), key and value (b, h_kv, n, d),
                attention mask or `None`, and the options of attention, such as `scaling`.

        Returns:
            The handles of the hooks; `None` if it attends through these functions.
        """
        return None

    def encoder_layers(self) -> list[Any]:
        """The layers of the vision tower, first to last.

        Raises:
            UnsupportedModelError: they lack the parts of a pre-norm ViT layer, or merged patches
                cannot pass what follows the tower.
        """
        encoder = getattr(self.tower, "encoder", None)
        layers = list(getattr(encoder, "layers", None) or ())
        return self._with_parts(layers)

    def _with_parts(self, layers: list[Any]) -> list[Any]:
        """`layers`, all of which have `encoder_parts`.

        Raises:
            UnsupportedModelError: one has not, or its attention cannot be read.
        """
        parts = self.encoder_parts
        if not layers or any(not hasattr(layer, part) for layer in layers for part in parts):
            raise UnsupportedModelError(
                f"model: the layers of the vision tower {type(self.tower).__name__} have not "
                f"the parts {', '.join(parts)} between which patches could be merged"
            )
        self.tower_attention()
        if "spatial_shapes" in inspect.signature(self.tower.forward).parameters:
            raise UnsupportedModelError(
                f"model: {type(self.tower).__name__} pads images to one number of patches, and "
                "merged patches would mix with padding"
            )
        return layers

    def encoder_attend(self, layer: Any, hidden: Tensor, given: Mapping[str, Any]) -> Tensor:
        """The first half of a tower layer: its attention, with the residual.

        Args:
            layer: of `encoder_layers`.
            hidden: (1, t, d) the tokens of one tile.
            given: the further arguments of the layer, for these tokens.

        Returns:
            (1, t, d).
        """
        norm, attention, _, _ = self.encoder_parts
        out = getattr(layer, attention)(getattr(layer, norm)(hidden), **given)
        return hidden + (out[0] if isinstance(out, tuple) else out)

    def encoder_feed(self, layer: Any, hidden: Tensor) -> Tensor:
        """The second half of a tower layer: its feed-forward, with the residual.

        Args:
            layer: of `encoder_layers`.
            hidden: (1, t, d) the tokens of one tile.

        Returns:
            (1, t, d).
        """
        _, _, norm, feed = self.encoder_parts
        return hidden + getattr(layer, feed)(getattr(layer, norm)(hidden))

    def encoder_order(self, given: Mapping[str, Any], places: Tensor) -> Tensor | None:
        """The order in which a tower layer takes the tokens of one tile: window by window.

        Args:
            given: the further arguments of the layer for all tokens, by name.
            places: (t,) of the tokens in the tower's sequence, in any order.

        Returns:
            (t,) indices into `places`, or `None` for the same order.
        """
        return None

    def encoder_given(self, given: Mapping[str, Any], places: Tensor) -> dict[str, Any]:
        """The further arguments of a tower layer for some tokens of one tile.

        Tiles run on their own, so that a mask that keeps tiles apart is left out.

        Args:
            given: the arguments for all tokens, by name.
            places: (t,) of the tokens in the tower's sequence, in their order.

        Returns:
            The arguments that `encoder_attend` receives.
        """
        return {name: value for name, value in given.items() if name != "attention_mask"}

    def check_encoder(self, modality: Modality, given: Mapping[str, Any]) -> None:
        """Refuse inputs whose patches cannot be merged in the tower.

        Args:
            modality: "image" or "video".
            given: the arguments of `get_image_features` or `get_video_features`.

        Raises:
            UnsupportedModelError: what follows the tower mixes the features of patches, or patches
                are hidden from one another.
        """

    def encoder_tiles(
        self, modality: Modality, given: Mapping[str, Any], rows: int, length: int
    ) -> list[tuple[int, Tensor, Tensor]]:
        """The tiles of the tower's sequence, each merged on its own.

        Args:
            modality: "image" or "video".
            given: the arguments of `get_image_features` or `get_video_features`.
            rows: rows of the tower's batch.
            length: tokens of a row, with [CLS].

        Returns:
            For each tile, in the order of their patches: its row; (p,) the places in this row of
            the tokens that are never merged, [CLS] first; and (u, m) the places of the m patches of
            each of its u units, which are what becomes one token each.
        """
        prefix = int(self.has_cls())
        units = self.encoder_units(modality, length - prefix) + prefix
        fixed = torch.ones(length, dtype=torch.bool)
        fixed[units.flatten()] = False
        return [(row, fixed.nonzero()[:, 0], units) for row in range(rows)]

    def encoder_units(self, modality: Modality, n: int) -> Tensor:
        """The patches of a tile that become one token each.

        Args:
            modality: "image" or "video".
            n: number of patches of the tile.

        Returns:
            (u, m) their numbers in the tile.
        """
        return torch.arange(n)[:, None]

    def encoder_projectors(self) -> list[Any]:
        """The modules after the tower that work token by token, so that they can leave out tokens:
        their input has a row for each patch, unit by unit, or for each token. What else follows the
        tower runs on all places."""
        projector = self.projector()
        return [] if projector is None else [projector]

    def encoder_depth(self, given: Mapping[str, Any]) -> int:
        """The number of tower layers that the features pass through.

        Where features of several layers are joined, this is the deepest. A token's features of an
        earlier layer are then those of the token that held its first patch there.

        Args:
            given: the arguments of `get_image_features`, which override the config.

        Returns:
            A number of layers, from 1.

        Raises:
            UnsupportedModelError: the tower is not a plain ViT.
        """
        count = len(self.encoder_layers())
        wanted: Any = setting(self, given, "vision_feature_layer", -1)
        layers = [wanted] if isinstance(wanted, int) else list(wanted)
        return max(layer if layer >= 0 else count + 1 + layer for layer in layers)

    def has_cls(self) -> bool:
        """Whether the tower has a [CLS] token."""
        embeddings = getattr(self.tower, "embeddings", None)
        return any(hasattr(embeddings, name) for name in ("class_embedding", "cls_token"))

    def cls_place(self) -> int | None:
        """The place of [CLS] among the tokens of an image in the tower, negative from the end;
        `None` without [CLS]."""
        return 0 if self.has_cls() else None

    def prefix(self, given: Mapping[str, Any]) -> int:
        """The number of tower tokens before an image's patches that yield no vision token.

        Args:
            given: the arguments of `get_image_features`, which override the config.

        Returns:
            0 or 1: the [CLS] token, unless it counts as a vision token.
        """
        full = setting(self, given, "vision_feature_select_strategy", "default") == "full"
        return int(self.has_cls() and not full)

    def suffix(self) -> int:
        """The number of tower tokens after an image's patches that yield no vision token."""
        return 0

    def tower_of(self, modality: Modality) -> Any:
        """The vision encoder of a modality."""
        return self.tower

    def tower_order(self, given: Mapping[str, Any]) -> Tensor | None:
        """The order of patches in the tower, if it differs from that of `ImageMap.patches`.

        Args:
            given: the arguments of `get_image_features` or `get_video_features`.

        Returns:
            (patches,) the tower's place of each patch, or `None` for the same order.
        """
        return None

    def projector(self) -> nn.Module | None:
        """The module that maps patch states to embeddings; `None` if unknown."""
        return getattr(self.base, "multi_modal_projector", None)

    def states_from(self) -> Any:
        """The module that shows the patch states, where the projector joins patches."""
        return self.projector()

    def patch_states(self, given: Tensor, output: Any) -> Tensor:
        """The states of patches, where the projector joins them.

        Args:
            given: the first argument of the module `states_from`.
            output: what it returned.

        Returns:
            (..., d_v), in the order of the tower; or one row for each token, in which the states of
            its patches stand side by side, if `ImageMap.states` says so.
        """
        return given

    def cls_states(self, output: Any, given: Mapping[str, Any]) -> Tensor | None:
        """The [CLS] states of the layers that the projector reads.

        Args:
            output: of the tower, with hidden states.
            given: the arguments of `get_image_features`, which override the config.

        Returns:
            (images, d_v), or `None` without [CLS].
        """
        if not self.has_cls():
            return None
        several = setting(self, given, "vision_feature_layers", -1)
        wanted: Any = setting(self, given, "vision_feature_layer", several)
        layers = [wanted] if isinstance(wanted, int) else wanted
        return torch.cat([output.hidden_states[layer][:, 0] for layer in layers], dim=-1)

    def grid(self, n: int, image_size: tuple[int, int] | None) -> Tensor:
        """The places of one image's tokens.

        Args:
            n: number of tokens.
            image_size: (height, width) in pixels; `None` for a square.

        Returns:
            (n, 3) int64 (frame, row, column); a single row if the tokens fill no rectangle.
        """
        rows = columns = math.isqrt(n)
        if image_size is not None:
            patch = self.tower.config.patch_size
            rows, columns = image_size[0] // patch, image_size[1] // patch
        if rows * columns != n:
            # Not a full rectangle: one row, which implies no vertical neighbours.
            rows, columns = 1, n
        return grid_positions(rows, columns)

    def check_pixels(self, given: Mapping[str, Any]) -> None:
        """Refuse to reduce pixels where the tower cannot.

        Args:
            given: the arguments of `get_image_features`, which override the config.

        Raises:
            UnsupportedModelError: the tower does not interpolate position embeddings, or [CLS] is a
                vision token.
        """
        tower = self.tower
        for wrapped in ("_orig_mod", "original_module"):  # by torch.compile, by peft
            tower = getattr(tower, wrapped, tower)
        patch = getattr(getattr(tower, "config", None), "patch_size", None)
        if not isinstance(patch, int) or (
            "interpolate_pos_encoding" not in inspect.signature(tower.forward).parameters
        ):
            raise UnsupportedModelError(
                f"model: the vision tower {type(tower).__name__} does not interpolate its position "
                "embeddings, which down-sampling pixels needs; use how='grid'"
            )
        if self.has_cls() and not self.prefix(given):
            raise UnsupportedModelError(
                "model: its vision tokens include [CLS], which has no place on a grid of fewer "
                "pixels; use how='grid'"
            )

    def downsampled_features(
        self, encode: Any, pixel_values: Tensor, method: Any, kwargs: Any
    ) -> tuple[Any, list[tuple[tuple[int, int], tuple[int, int]]]]:
        """Run the tower on fewer pixels.

        Args:
            encode: `base.get_image_features`.
            pixel_values: (images, 3, height, width).
            method: has `target_grid(rows, columns) -> (rows, columns)`.
            kwargs: further arguments of `encode`.

        Returns:
            What `encode` returned, and per image its (rows, columns) before and after.

        Raises:
            UnsupportedModelError: `pixel_values` has another number of dimensions.
        """
        if pixel_values.dim() != 4:
            raise UnsupportedModelError(
                "method: down-sampling pixels needs pixel_values of shape (images, 3, height, "
                f"width), got {tuple(pixel_values.shape)}; use how='grid'"
            )
        patch = self.tower.config.patch_size
        rows, columns = pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch
        r, c = method.target_grid(rows, columns)
        if (r, c) != (rows, columns):
            pixel_values = nn.functional.interpolate(
                pixel_values.float(),
                size=(r * patch, c * patch),
                mode="bilinear",
                align_corners=False,
                antialias=True,
            ).to(pixel_values.dtype)
            kwargs = {**kwargs, "interpolate_pos_encoding": True}
        out = encode(pixel_values=pixel_values, **kwargs)
        return out, [((rows, columns), (r, c))] * pixel_values.shape[0]

    # ---- decoder ------------------------------------------------------------------------------
    def rotary(self, layer: int, hidden: Tensor, positions: Tensor) -> Any:
        """The position embeddings of a decoder layer.

        Args:
            layer: 0-based decoder layer.
            hidden: gives dtype and device.
            positions: (b, k), or (axes, b, k) with M-RoPE.

        Returns:
            What the layer takes as `position_embeddings`.
        """
        embed = self.decoder.rotary_emb
        if "layer_type" in inspect.signature(embed.forward).parameters:
            return embed(hidden, positions, self.layer_type(layer))
        return embed(hidden, position_ids=positions)

    def rotates(self, layer: int) -> bool:
        """Whether decoder layer `layer` rotates queries and keys by position."""
        attention: Any = self.layers[layer].self_attn
        if type(attention).__name__.startswith("Cohere2"):
            # Only its sliding-window layers use RoPE.
            return attention.sliding_window is not None or getattr(attention, "force_rope", False)
        return bool(getattr(attention, "use_rope", True))

    def recorded_at(self, name: str) -> tuple[str, bool]:
        """Where the record `name` of a decoder layer is taken.

        Args:
            name: of the record.

        Returns:
            The layer's attribute, "" for the layer, and whether it is the module's input.
        """
        part, _, end = name.partition("_")
        return {"attention": "self_attn", "mlp": "mlp"}.get(part, ""), end == "in"

    def attention_arguments(self, layer: int) -> dict[str, Any]:
        """Arguments that the attention of decoder layer `layer` takes beside the usual ones, where
        vtc looks ahead at it."""
        return {}

    def check_rotate(self) -> None:
        """Refuse a decoder whose rotation `rotate` cannot apply.

        Raises:
            UnsupportedModelError: it rotates a part of each key, or has no usual
                `apply_rotary_pos_emb`.
        """
        attention = self.layers[0].self_attn
        if hasattr(attention, "qk_rope_head_dim"):
            raise UnsupportedModelError(
                f"model: {type(attention).__name__} turns a part of each key only, so "
                "positions, or keys of padded rows, cannot be compared"
            )
        apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        names = list(inspect.signature(apply).parameters)[:4] if apply is not None else []
        if names != ["q", "k", "cos", "sin"]:
            raise UnsupportedModelError(
                f"model: {type(attention).__name__} has no apply_rotary_pos_emb(q, k, cos, sin) "
                "with which to compare positions, or keys of padded rows"
            )

    def rotate(self, layer: int, states: Tensor, rotation: Any) -> Tensor:
        """Rotate states.

        Args:
            layer: 0-based decoder layer.
            states: (b, h, k, d).
            rotation: what `rotary` returned.

        Returns:
            (b, h, k, d).
        """
        attention = self.layers[layer].self_attn
        apply = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        return apply(states, states, *rotation)[1]

    def layer_type(self, layer: int) -> str:
        """ "full_attention", "sliding_attention", "chunked_attention" or "linear_attention"."""
        config = self.decoder.config
        kinds: list[str] | None = getattr(config, "layer_types", None)
        if kinds:
            return kinds[layer]
        sliding = getattr(config, "sliding_window", None) is not None
        return "sliding_attention" if sliding else "full_attention"

    def chunk(self, layer: int) -> int | None:
        """Tokens per attention chunk of decoder layer `layer`; `None` without chunks."""
        if self.layer_type(layer) != "chunked_attention":
            return None
        return int(self.decoder.config.attention_chunk_size)

    def blocks(self, given: Mapping[str, Any]) -> Tensor | None:
        """Blocks of tokens that attend to each other in both directions.

        Args:
            given: the arguments of the base model's forward.

        Returns:
            (b, s) int64 block numbers, -1 at causal tokens; `None` if all are causal.
        """
        return None

    def layer_blocks(self, layer: int, blocks: Tensor | None) -> Tensor | None:
        """The `blocks` that apply in decoder layer `layer`."""
        return blocks

    def mask(
        self,
        layer: int,
        embeds: Tensor,
        valid: Tensor | None,
        cache: Any,
        blocks: Tensor | None,
    ) -> Any:
        """The attention mask of a decoder layer.

        Windows and chunks count the tokens that the layer holds, at prefill and in decoding.

        Args:
            layer: 0-based decoder layer.
            embeds: (b, q, d) its input.
            valid: (b, k) bool over cached and new tokens, False at padding; `None` without padding.
            cache: the cache, or `None`.
            blocks: (b, k) as `blocks` returns, or `None`.

        Returns:
            The mask in the form that the layer's attention takes.
        """
        build = {
            "sliding_attention": create_sliding_window_causal_mask,
            "chunked_attention": create_chunked_causal_mask,
        }.get(self.layer_type(layer), create_causal_mask)
        extra = {} if blocks is None else {"block_sequence_ids": blocks}
        return build(
            config=self.decoder.config,
            inputs_embeds=embeds,
            attention_mask=valid,
            layer_idx=layer,
            **{CACHE: cache},
            **extra,
        )


def _attention_stacks(tower: Any) -> list[list[Any]]:
    """The attention modules of each stack of layers with one attention, of outermost stacks."""
    stacks: list[list[Any]] = []

    def search(module: Any) -> list[Any]:
        inner = len(stacks)
        by_part = [search(part) for part in _parts(module)]
        found = [attention for of_part in by_part for attention in of_part]
        single = all(len(of_part) == 1 for of_part in by_part)
        if found and single and isinstance(_wrapped(module), nn.ModuleList):
            stacks[inner:] = [found]
        return [module, *found] if _attends(module.__class__) else found

    if tower is not None:
        search(tower)
    return stacks


def _parts(module: nn.Module) -> list[nn.Module]:
    """The child modules; peft's wrapper leads to those of the copy that it runs."""
    found = [getattr(module, name) for name in _wrapped(module)._modules]
    return [part for part in found if part is not None]


def _wrapped(module: nn.Module) -> nn.Module:
    """What peft wraps, or the module itself."""
    inner = module._modules.get("original_module")
    return module if inner is None else inner


@cache
def _attends(kind: Any) -> bool:
    """Whether a class of modules attends through the attention functions of transformers."""
    forwards = [
        inspect.unwrap(vars(cls)["forward"]) for cls in kind.__mro__ if "forward" in vars(cls)
    ]
    return any(
        "ALL_ATTENTION_FUNCTIONS" in code.co_names
        for forward in forwards
        if (code := getattr(forward, "__code__", None)) is not None
    )


def setting(adapter: Adapter, given: Mapping[str, Any], name: str, default: Any) -> Any:
    """A config setting that an argument of the call overrides.

    Args:
        adapter: bound to the model.
        given: the arguments of the call.
        name: of the setting.
        default: the value if neither has it.

    Returns:
        The argument's value unless it is missing or `None`, otherwise the config's.
    """
    value = given.get(name)
    return getattr(adapter.model.config, name, default) if value is None else value
