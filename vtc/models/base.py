# SPDX-License-Identifier: Apache-2.0
"""How transformers implements a family of VLMs, as far as the engine needs to know."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from vtc.core.errors import UnsupportedModelError
from vtc.core.images import ImageMap, Modality, grid_positions
from vtc.models.decoder import CACHE, DecoderPart
from vtc.models.merging import MergingPart

_OWN = {
    "rope_deltas": "rotary positions of its vision tokens are places in the picture (m-RoPE)",
    "_deepstack_process": "features of earlier tower layers are added between decoder layers",
}
"""Features outside the common shape, by the attribute that reveals them."""
_BY_PLACE = (
    "; they choose blocks of adjacent keys by their place in the cache, and a dropped token moves "
    "all later keys to other blocks, so that no mask gives the same result"
)
_BY_INDEX = (
    "; an index chooses their keys among those that are visible, so that dropping tokens would be "
    "the same as masking them, but vtc does not read attention under an index, nor move the "
    "choices that some layers hand on, which needs a family of its own"
)


__all__ = ["ADAPTERS", "CACHE", "Adapter", "UnsupportedModelError"]

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
class Adapter(MergingPart, DecoderPart):
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
        masks_alike: the masks that `generate` prepares for a static cache are those of a forward.
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
        joins_frames: the frames of an image's map attend to one another, as one tile.
        unread: why nothing of the vision tower can be read; empty if it can.
        unmerged: why patches cannot be merged in a tower that can be read; empty if they can.
        shows_states: for each token the projector receives a state that can be read, though
            nothing else of the tower can.
        clips_as_images: the base model encodes clips with `get_image_features`.
        places: its vision tokens have places in the picture.
        own_generate: its model has a `generate` of its own that vtc knows.
        nested: its language model is a model of its own, whose `generate` it calls.
        seq2seq: vision tokens enter an encoder, which `decoder` is.
        merges_in_decoder: the base model is the decoder, and merges features in with `merged`.
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
    masks_alike: ClassVar[bool] = True
    attention: ClassVar[str] = "causal"
    positions: ClassVar[str] = "one axis"
    crosses: ClassVar[bool] = False
    axial: ClassVar[bool] = False
    joins: ClassVar[tuple[Modality, ...]] = ()
    video: ClassVar[bool] = False
    frames: ClassVar[bool] = False
    clips_as_images: ClassVar[bool] = False
    places: ClassVar[bool] = True
    own_generate: ClassVar[bool] = False
    nested: ClassVar[bool] = False
    seq2seq: ClassVar[bool] = False
    merges_in_decoder: ClassVar[bool] = False

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
            what = "the projector's input" if cls.shows_states else "nothing"
            return f"{what}: {cls.unread}"
        return "attention, keys, patch states"

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
        decoder = decoder_in(language_model)
        towers = (getattr(base, name, None) for name in ("vision_tower", "vision_model", "visual"))
        return cls(model, base, decoder, next((t for t in towers if t is not None), None))

    @property
    def generator(self) -> Any:
        """The model whose `generate` decodes."""
        return self.model

    @property
    def holder(self) -> Any:
        """The object whose `merger`, `get_image_features` and `get_video_features` are called."""
        return self.base

    def check(self) -> None:
        """Refuse a model that this family does not support.

        Raises:
            UnsupportedModelError: the model has its own `generate`, or, in the generic family, a
                feature outside the common shape.
        """
        kind = type(self.model).__name__
        own = getattr(type(self.model), "generate", GenerationMixin.generate)
        if own is not GenerationMixin.generate and not self.own_generate:
            raise UnsupportedModelError(
                f"model: {kind} has a generate of its own, which needs a family of its own"
            )
        if self.model_types:
            return
        kinds = set(getattr(self.decoder.config, "layer_types", None) or ())
        foreign = kinds - {"full_attention", "sliding_attention"}
        if foreign:
            pooled = (
                getattr(self.decoder.config, "index_kpool", 1) > 1
            )  # of GLM-5 Next: into blocks
            why = ""
            if "minimax_m3_sparse" in foreign or ("indexed_attention" in foreign and pooled):
                why = _BY_PLACE
            elif "indexed_attention" in foreign:
                why = _BY_INDEX
            raise UnsupportedModelError(
                f"model: {type(self.decoder).__name__} has layers of kind "
                f"{', '.join(sorted(foreign))}; supported are full and sliding attention{why}"
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

    def replace_features(self, output: Any, features: Any) -> None:
        """Set the features for the placeholders in place.

        Args:
            output: what `get_image_features` returned.
            features: as `features` returns them.
        """
        output.pooler_output = features

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

    def merged(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Merge features in, where `merges_in_decoder`.

        Args:
            given: the arguments of the base model's forward.

        Returns:
            The same with the prompt as `inputs_embeds`, without images.
        """
        raise NotImplementedError

    def ignores_images(self, given: Mapping[str, Any]) -> bool:
        """Whether the model makes nothing of the images among its arguments.

        Args:
            given: the arguments of the base model's forward.
        """
        return False

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

    # ---- fewer pixels -------------------------------------------------------------------------
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


def require(model: nn.Module, part: Any, names: Sequence[str]) -> None:
    """Refuse a model of which a part lacks something.

    Args:
        model: named in the error.
        part: of the model.
        names: attributes that it must have.

    Raises:
        UnsupportedModelError: it lacks some; the message names them.
    """
    if missing := [name for name in names if not hasattr(part, name)]:
        raise UnsupportedModelError(f"model: {type(model).__name__} lacks {', '.join(missing)}")


def decoder_in(language_model: Any) -> Any:
    """The module in a language model that has its decoder layers.

    Args:
        language_model: with or without a head.

    Raises:
        UnsupportedModelError: there is none.
    """
    found = language_model
    while not hasattr(found, "layers"):
        found = getattr(found, "model", None) or getattr(found, "decoder", None)
        if found is None:
            raise UnsupportedModelError(
                f"model: found no decoder layers in {type(language_model).__name__}"
            )
    return found
