# SPDX-License-Identifier: Apache-2.0
"""What methods receive and return: tensors of one sample, without padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .settings import budget

if TYPE_CHECKING:
    from torch import Tensor

Positions = Literal["original", "contiguous"]

Rows = Literal["last", "text", "vision", "vision_text"]
"""Query rows whose attention a method may request: the prompt's last token, all of its text after
the first vision token, all vision tokens still held, or both of the latter in sequence order."""

Record = Literal[
    "input",
    "output",
    "normed",
    "attention_in",
    "attention_out",
    "mlp_in",
    "mlp_out",
    "keys",
    "rotary",
]
"""What a method may capture of a decoder layer: its input and output hidden states, the output also
after the decoder's final norm ("normed"); the inputs and outputs of its attention and its MLP,
without the residual; its attention keys, heads concatenated; and "rotary", a vector of ones as
wide as a head. The last two are rotated to each token's position, as if the sample began at 0."""


@dataclass(frozen=True)
class VisionTokens:
    """The vision tokens of one image (or clip), as the language model would receive them.

    Attributes:
        features: (n, d) embeddings after the projector, in sequence order.
        grid: (n, 3) integers, the (frame, row, column) of each token, or `None` if tokens
            have no places, as after a resampler; methods read it with `places`.
        image: 0-based ordinal of this image in its sample.
        text: (m, d) embeddings of the prompt's text after the first image. Only on request.
        cls_attention: (n,) attention of [CLS] to each token in the vision tower, averaged over
            heads; for towers without [CLS], the attention each token receives, averaged over
            heads and queries. Only on request.
        keys: (n, d_k) keys of the vision tower's attention, heads concatenated. Only on request.
        heads: number of attention heads in `keys` and `cls_query`.
        low_attention: like `cls_attention`, at the method's `low_layer`. Only on request.
        cls_query: (d_k,) query of [CLS], heads concatenated, or `None` in towers without [CLS].
            Only on request.
        cls_key: (d_k,) key of [CLS]. Comes with `cls_query`.
        encoder: (n, d_v) patch states that the projector receives; of a token that joins several
            patches, their mean. Only on request.
        encoder_cls: (d_v,) state of [CLS] in the same layer, or `None` in towers without. Comes
            with `encoder`.
        project: the projector, (k, d_v) to (k, d), which turns merged patch states into embeddings;
            `None` if it joins patches. Comes with `encoder`.
        segment: (m, d) embeddings of the text between this image and the next, or the prompt's
            end. Only on request.
        patches: (n, m) the tower patches that make up each token, numbered through all tiles
            encoded in one call, or `None` if unknown. Only on request.
        crop: (n,) integers, the tile of each token (0 is the thumbnail), or `None`
            if the image is not tiled.
        every_grid, every_crop: (N, 3) and (N,), `grid` and `crop` of all original tokens of the
            image, before any method acted; `None` if none was dropped, or without places and tiles.
        total: N; `None` if it is `every_grid`'s length, or no token was dropped.
        crop_cls, crop_query, crop_key: (c, ...) `encoder_cls`, `cls_query` and `cls_key` of each of
            the tiles 0 to c - 1 (the plain fields hold the thumbnail's), or `None` if the image is
            not tiled or the tower has no [CLS]. Come with the plain fields.
    """

    features: Tensor
    grid: Tensor | None
    image: int = 0
    text: Tensor | None = None
    cls_attention: Tensor | None = None
    keys: Tensor | None = None
    crop: Tensor | None = None
    heads: int = 1
    low_attention: Tensor | None = None
    cls_query: Tensor | None = None
    cls_key: Tensor | None = None
    encoder: Tensor | None = None
    encoder_cls: Tensor | None = None
    project: Callable[[Tensor], Tensor] | None = None
    segment: Tensor | None = None
    crop_cls: Tensor | None = None
    crop_query: Tensor | None = None
    crop_key: Tensor | None = None
    patches: Tensor | None = None
    every_grid: Tensor | None = None
    every_crop: Tensor | None = None
    total: int | None = None

    @classmethod
    def among(
        cls,
        features: Tensor,
        grid: Tensor | None,
        crop: Tensor | None,
        current: Tensor,
        total: int,
        **rest: Any,
    ) -> VisionTokens:
        """The tokens `current` of an image.

        Args:
            features: (n, d) their contents.
            grid: (N, 3) places of all tokens of the image, or `None`.
            crop: (N,) tiles of all tokens, or `None`.
            current: (n,) indices into these.
            total: N.
            rest: further fields.
        """
        grid, crop = (None if every is None else every.to(current.device) for every in (grid, crop))
        return cls(
            features=features,
            grid=None if grid is None else grid[current],
            crop=None if crop is None else crop[current],
            every_grid=grid,
            every_crop=crop,
            total=total,
            **rest,
        )

    def __len__(self) -> int:
        return self.features.shape[0]

    @property
    def original(self) -> int:
        """Tokens of the image before any method acted."""
        if self.total is not None:
            return self.total
        return len(self) if self.every_grid is None else self.every_grid.shape[0]

    def places(self, method: str, reason: str) -> Tensor:
        """(n, 3) `grid`, for a method that requires it.

        Args:
            method: name of the method.
            reason: what the method does with places, to follow "it".

        Raises:
            ValueError: the tokens have no places.
        """
        if self.grid is None:
            raise ValueError(
                f"{method}: it {reason}, and the vision tokens of this model have no places"
            )
        return self.grid

    @property
    def mergeable(self) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """What a method averages to merge tokens, for one that requests `encoder`.

        Returns:
            (n, d_m) rows, and a function of (k, d_m) averages to (k, d) contents: the patch states
            and the projector; where the projector joins patches, `features`, whose averages are
            contents already. Official ports to such models merge after the projector, too.
        """
        if self.encoder is None or self.project is None:
            return self.features, lambda averages: averages
        return self.encoder, self.project

    def budget(self, keep: float | int) -> int:
        """Tokens that a method with this `keep` leaves, at most those there are: a fraction refers
        to `original`, a whole number is a number of tokens."""
        return min(budget(keep, self.original), len(self))


@dataclass(frozen=True)
class LayerState:
    """One sample between two decoder layers, without padding.

    Tensors may be the model's own: never write to them.

    Attributes:
        layer: 0-based index of the decoder layer about to run.
        num_layers: decoder layers in all.
        hidden: (s, d) hidden states entering the layer.
        image: (s,) ordinal of the image each token belongs to, -1 for text.
        text: (s,) bool, the prompt's text after the first vision token.
        grid: (s, 3) integers, the (frame, row, column) of each vision token, -1 for text.
        prompt_length: tokens of the prompt; any after them are an answer being scored.
        original: vision tokens of each image before any compression.
        attention: for each layer in `taps` that has run, (r, s) attention probabilities
            of the requested rows, softmax over all keys in fp32, averaged over heads, or (h, r, s)
            if the method is `by_head`. Columns are the tokens still held; tokens dropped before
            are left out.
        ahead: (r, s) look-ahead attention of the layer about to run, as if nothing were dropped
            now. Only if requested by `peeks`.
        recorded: (s, d) the states requested by `records`, by layer and name, of the tokens still
            held.
        memory: what the method returned as memory in its last selection for this sample, or `None`.
    """

    layer: int
    num_layers: int
    hidden: Tensor
    image: Tensor
    text: Tensor
    grid: Tensor
    prompt_length: int
    original: tuple[int, ...]
    attention: Mapping[int, Tensor]
    ahead: Tensor | None = None
    recorded: Mapping[tuple[int, Record], Tensor] = dataclasses.field(default_factory=dict)
    memory: Tensor | None = None

    @property
    def vision(self) -> Tensor:
        """(n,) indices of the vision tokens in the sequence."""
        return (self.image >= 0).nonzero().squeeze(1)

    def of_vision(self, rows: Tensor) -> Tensor:
        """(n, ...) the `rows` (s, ...) of vision tokens; a view if these are consecutive."""
        vision = self.vision
        if not len(vision):
            return rows[:0]
        start, end = int(vision[0]), int(vision[-1]) + 1
        return rows[start:end] if end - start == len(vision) else rows[vision]


@dataclass(frozen=True)
class EncoderState:
    """The patches of one tile, image or frame inside the vision tower, between a layer's attention
    and its MLP.

    Where the projector joins patches, a group that yields one vision token takes the place of a
    patch: attention, keys and values are means over the group. [CLS], which is never merged or
    dropped, is not included.

    Attributes:
        layer: 0-based index of the tower layer.
        num_layers: tower layers whose output is used.
        original: patches before anything was merged or dropped.
        has_cls: whether a [CLS] token precedes the patches.
        attention: (n,) attention from [CLS] in this layer, or received from all queries (of its
            window) in towers without [CLS], averaged over heads.
        keys: (n, h, d) keys of this layer's attention.
        values: (n, h, d) its values.
        cls_value: (h, d) the value of [CLS], or `None`.
        size: (n,) patches that each token stands for.
        memory: (n,) what the method returned as memory in the layer before, or `None`.
    """

    layer: int
    num_layers: int
    original: int
    has_cls: bool
    attention: Tensor
    keys: Tensor
    values: Tensor
    cls_value: Tensor | None
    size: Tensor
    memory: Tensor | None = None

    def __len__(self) -> int:
        return self.keys.shape[0]


@dataclass(frozen=True)
class Merging:
    """Which tokens of a tower layer are merged.

    Attributes:
        target: (n,) for each token the index, from 0 to m - 1, of the token it is merged into,
            -1 for dropped tokens. Contents are averaged, weighted by size.
        memory: (m,) numbers that the method receives again in the next layer.
    """

    target: Tensor
    memory: Tensor | None = None


@dataclass(frozen=True)
class Selection:
    """Which tokens stay, in ascending order, and their contents.

    Attributes:
        indices: (k,) ascending integers into the tokens that the method received: the
            image's tokens in `select`, the sample's vision tokens (all images) in `prune`.
        features: (k, d) new contents if tokens were merged or replaced, by codes for example, else
            `None`.
        memory: layers stage only: what the method receives in its next selection for this sample.
        sources: (n,) integers, for each token that the method received the one of the k tokens into
            which it went, -1 if it is dropped. For pictures and reports of merges, where each
            token goes into one; `None` if only the tokens in `indices` stay, each as itself.
    """

    indices: Tensor
    features: Tensor | None = None
    memory: Tensor | None = None
    sources: Tensor | None = None
