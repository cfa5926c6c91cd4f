# SPDX-License-Identifier: Apache-2.0
"""What methods see and what they answer: tensors of one sample, without padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .settings import budget

if TYPE_CHECKING:
    from torch import Tensor

Positions = Literal["original", "contiguous"]

Rows = Literal["last", "text", "vision", "vision_text"]
"""Query rows whose attention a method may ask for: the prompt's last token, all of its text after
the first vision token, all vision tokens held now, or both of these in sequence order."""

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
"""What a method may have recorded of a decoder layer: the hidden states that enter and leave it,
the latter also through the decoder's final norm; what enters and leaves its attention and its MLP,
without the residual; its attention's keys, heads concatenated; and "rotary", a vector of ones as
wide as a head. The last two are rotated to each token's position, as if the sample began at 0."""


@dataclass(frozen=True)
class VisionTokens:
    """The vision tokens of one image (or clip), as the language model would receive them.

    Attributes:
        features: (n, d) embeddings after the projector, in sequence order.
        grid: (n, 3) whole numbers, the (frame, row, column) of each token, or `None` where tokens
            have no places, as those of a resampler; methods read it by `places`.
        image: ordinal of this image within its sample, from 0.
        text: (m, d) embeddings of the prompt's text after the first image. Only if asked for.
        cls_attention: (n,) attention of [CLS] to each token in the vision tower, averaged over
            heads; for towers without [CLS], the attention each token receives, averaged over
            heads and queries. Only if asked for.
        keys: (n, d_k) keys of the vision tower's attention, heads concatenated. Only if asked for.
        heads: attention heads that `keys` and `cls_query` hold.
        low_attention: like `cls_attention`, of the method's `low_layer`. Only if asked for.
        cls_query: (d_k,) query of [CLS], heads concatenated, or `None` in towers without [CLS].
            Only if asked for.
        cls_key: (d_k,) its key. Comes with `cls_query`.
        encoder: (n, d_v) patch states that the projector receives. Only if asked for.
        encoder_cls: (d_v,) state of [CLS] in the same layer, or `None` in towers without. Comes
            with `encoder`.
        project: the projector, (k, d_v) to (k, d), to turn merged patch states into embeddings.
            Comes with `encoder`.
        segment: (m, d) embeddings of the text between this image and the next, or the prompt's
            end. Only if asked for.
        patches: (n, m) the tower's patches that each token is made of, numbered through all tiles
            that it encoded in one call, or `None` where they are not known. Only if asked for.
        crop: (n,) whole numbers, the tile each token belongs to (0 is the thumbnail), or `None`
            where an image is not tiled.
        every_grid, every_crop: (N, 3) and (N,), `grid` and `crop` of all tokens that the image had
            at first, before any method acted; `None` if these are all.
        crop_cls, crop_query, crop_key: (c, ...) what `encoder_cls`, `cls_query` and `cls_key` are,
            of each of the tiles 0 to c - 1 (these are the thumbnail's), or `None` where an image is
            not tiled or the tower has no [CLS]. Come with them.
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

    def __len__(self) -> int:
        return self.features.shape[0]

    @property
    def original(self) -> int:
        """Tokens that the image had at first, before any method."""
        return len(self) if self.every_grid is None else self.every_grid.shape[0]

    def places(self, method: str, reason: str) -> Tensor:
        """(n, 3) `grid`, for a method that cannot do without.

        Args:
            method: its name.
            reason: what it does with places, to follow "it".

        Raises:
            ValueError: the tokens have no places.
        """
        if self.grid is None:
            raise ValueError(
                f"{method}: it {reason}, and the vision tokens of this model have no places"
            )
        return self.grid

    def budget(self, keep: float | int) -> int:
        """Tokens that a method with this `keep` leaves: a fraction is one of `original`, a whole
        number is a number, and neither is more than there are."""
        return min(budget(keep, self.original), len(self))


@dataclass(frozen=True)
class LayerState:
    """One sample on its way between two decoder layers, without padding.

    Tensors may be the model's own: they are read, never written to.

    Attributes:
        layer: 0-based index of the decoder layer about to run.
        num_layers: decoder layers in all.
        hidden: (s, d) hidden states entering the layer.
        image: (s,) ordinal of the image each token belongs to, -1 for text.
        text: (s,) bool, the prompt's text after the first vision token.
        grid: (s, 3) whole numbers, the (frame, row, column) of each vision token, -1 for text.
        prompt_length: tokens of the prompt; any after them are an answer being scored.
        original: vision tokens of each image before any compression.
        attention: for each layer asked for by `taps` that has run, (r, s) attention probabilities
            of the rows asked for, softmax over all keys in fp32, averaged over heads, or (h, r, s)
            if the method reads them `by_head`. Columns are the tokens held now; what layers before
            dropped is left out.
        ahead: (r, s) the same of the layer about to run, as it would be if nothing were dropped
            now. Only if asked for by `peeks`.
        recorded: (s, d) what was asked for by `records`, by layer and name, for the tokens held
            now.
        memory: what the method handed on when it last chose in this sample, or `None`.
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
        """(n, ...) those of the `rows` (s, ...) that belong to vision tokens; where these follow
        one another, a view."""
        vision = self.vision
        if not len(vision):
            return rows[:0]
        start, end = int(vision[0]), int(vision[-1]) + 1
        return rows[start:end] if end - start == len(vision) else rows[vision]


@dataclass(frozen=True)
class EncoderState:
    """The patches of one image inside the vision tower, between a layer's attention and its MLP.

    [CLS], where there is one, is not among them: it is never merged nor dropped.

    Attributes:
        layer: 0-based index of the tower layer.
        num_layers: tower layers whose output is used.
        original: patches before anything was merged or dropped.
        has_cls: whether a [CLS] token stands before the patches.
        attention: (n,) attention from [CLS] in this layer, or received from all, mean over heads.
        keys: (n, h, d) keys of this layer's attention.
        values: (n, h, d) its values.
        cls_value: (h, d) the value of [CLS], or `None`.
        size: (n,) patches that each token stands for.
        memory: (n,) what the method handed on from the layer before, or `None`.
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
    """Which tokens of a tower layer become one.

    Attributes:
        target: (n,) for each token the index, out of 0 to m - 1, of the token it becomes part of,
            -1 for those that are dropped. Contents are averaged by size.
        memory: (m,) numbers that the method wants to see again in the next layer.
    """

    target: Tensor
    memory: Tensor | None = None


@dataclass(frozen=True)
class Selection:
    """Which tokens stay, in ascending order, and what they hold.

    Attributes:
        indices: (k,) ascending whole numbers into the tokens that the method was given: the
            image's tokens in `select`, the sample's vision tokens (all images) in `prune`.
        features: (k, d) new contents where tokens were merged or replaced, else `None`.
        memory: layers stage: what the method wants to see again when it next chooses here.
    """

    indices: Tensor
    features: Tensor | None = None
    memory: Tensor | None = None
