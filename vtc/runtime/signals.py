# SPDX-License-Identifier: Apache-2.0
"""Signals captured from images and decoder layers, in the form that methods receive."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vtc.core import Rows
from vtc.core.images import ImageMap
from vtc.runtime.layout import Layout


@dataclass(frozen=True)
class TowerSignals:
    """Signals of one layer of the vision tower for the patches of an image.

    Attributes:
        attention: (n,) attention from [CLS], or the mean received from all patches.
        keys: (n, h * d) keys.
        cls_query, cls_key: (h * d,) of [CLS], or `None`.
        heads: h, the number of heads.
        crop_query, crop_key: (c, h * d) of [CLS] in each tile of a tiled image, or `None`.
    """

    attention: Tensor
    keys: Tensor
    cls_query: Tensor | None
    cls_key: Tensor | None
    heads: int
    crop_query: Tensor | None = None
    crop_key: Tensor | None = None

    def without(self, prefix: int, suffix: int = 0) -> TowerSignals:
        """The same without the first `prefix` and the last `suffix` tokens."""
        left = slice(prefix, len(self.attention) - suffix)
        return replace(self, attention=self.attention[left], keys=self.keys[left])

    def of(self, patches: Tensor) -> TowerSignals:
        """The signals of vision tokens, as means over their patches.

        Args:
            patches: (n, m) the patches of each token.
        """
        patches = patches.to(self.attention.device)
        if patches.shape[1] == 1:
            patches = patches[:, 0]
            return replace(self, attention=self.attention[patches], keys=self.keys[patches])
        return replace(
            self,
            attention=self.attention[patches].mean(1),
            keys=self.keys[patches].float().mean(1).to(self.keys.dtype),
        )


@dataclass(frozen=True)
class ImageSignals:
    """Signals captured from one image.

    Attributes:
        map: what its placeholders represent.
        kept: (k,) places that a run on fewer pixels or patches fills; `None` for all.
        passed: by tile, patches that entered each tower layer and left the last, if the tower
            merges.
        tower: signals of the filled tokens, by tower layer that is read.
        encoder: (k, d_v) projector inputs of the filled tokens, if read; else `None`.
        encoder_cls: (d_v,) the [CLS] state of the layer that the projector reads, or `None`.
        crop_cls: (c, d_v) the same for each tile of a tiled image, or `None`.
        open_patches: `patches`, if the user's mask hides some of the image's tokens.
    """

    map: ImageMap
    kept: Tensor | None = None
    passed: tuple[tuple[int, ...], ...] = ()
    tower: dict[int, TowerSignals] = field(default_factory=dict)
    encoder: Tensor | None = None
    encoder_cls: Tensor | None = None
    crop_cls: Tensor | None = None
    open_patches: Tensor | None = None

    @property
    def patches(self) -> Tensor | None:
        """(n, m) tower patches of each vision token, filled or not; `None` if unknown."""
        if self.open_patches is not None or self.map.patches is None:
            return self.open_patches
        separator = self.map.separator
        return self.map.patches if separator is None else self.map.patches[~separator]

    @property
    def filled_patches(self) -> Tensor | None:
        """(k, m) tower patches of the filled tokens; `None` if unknown."""
        whole = self.patches
        return whole if whole is None or self.kept is None else whole[self.kept.to(whole.device)]

    def only(self, seen: Tensor) -> ImageSignals:
        """The signals restricted to some vision tokens, as if there were no others.

        Args:
            seen: (n,) bool over the vision tokens.
        """
        filled = seen if self.kept is None else seen[self.kept.to(seen.device)]
        kept = self.kept
        if kept is not None:
            place = seen.long().cumsum(0) - 1
            kept = place[kept.to(seen.device)[filled]]
        picked = filled.nonzero()
        encoder = self.encoder
        patches = self.patches
        return replace(
            self,
            kept=kept,
            open_patches=None if patches is None else patches[seen.to(patches.device)],
            tower={layer: heard.of(picked) for layer, heard in self.tower.items()},
            encoder=None if encoder is None else encoder[picked[:, 0].to(encoder.device)],
        )


@dataclass(frozen=True)
class ImageSpan:
    """One image of one sample.

    Attributes:
        sample: row of the batch.
        ordinal: number of the image in its sample, from 0.
        index: (n,) places of its vision tokens in the sequence, without masked ones.
        signals: captured from the image.
        grid: (n, 3) their (frame, row, column), or `None` for tokens without places.
        crop: (n,) the tile of each token, or `None`.
        separators: (m,) places of the features that end its rows.
        ends: (m, n) bool, the tokens of the row that each separator ends.
    """

    sample: int
    ordinal: int
    index: Tensor
    signals: ImageSignals
    grid: Tensor | None
    crop: Tensor | None
    separators: Tensor
    ends: Tensor

    @classmethod
    def of(
        cls, sample: int, ordinal: int, place: Tensor, signals: ImageSignals, valid: Tensor
    ) -> ImageSpan:
        """The span of an image. Vision tokens that the mask hides are left out, for methods and in
        all counts.

        Args:
            sample: row of the batch.
            ordinal: number of the image in its sample.
            place: (n,) places of its placeholders in the sequence.
            signals: captured from the image.
            valid: (s,) bool mask of the sample.
        """
        found = signals.map
        grid = None if found.grid is None else found.grid.to(place.device)
        crop = None if found.crop is None else found.crop.to(place.device)
        none = place.new_empty(0)
        ends = torch.zeros(len(place), dtype=torch.bool, device=place.device)
        if found.separator is not None:
            ends = found.separator.to(place.device)
        seen = valid[place]
        if not bool((seen | ends).all()):
            signals, left = signals.only(seen[~ends]), seen | ends
            place, ends = place[left], ends[left]
            grid = None if grid is None else grid[left]
            crop = None if crop is None else crop[left]
        if not bool(ends.any()):
            return cls(sample, ordinal, place, signals, grid, crop, none, none[:, None].bool())
        own_crop = None if crop is None else crop[~ends]
        if grid is None:
            closes = ends.new_ones(int(ends.sum()), int((~ends).sum()))
            left, apart = place[~ends], place[ends]
            return cls(sample, ordinal, left, signals, None, own_crop, apart, closes)
        planes = grid[:, :2]
        if crop is not None:
            # Adjacent tiles share rows; the thumbnail has its own.
            planes = torch.cat([planes, (crop == 0).long()[:, None]], dim=1)
        closes = (planes[ends][:, None] == planes[~ends][None]).all(-1)
        of_frame = grid[ends][:, 1:2] == -1
        closes |= of_frame & (grid[ends][:, None, 0] == grid[~ends][None, :, 0])
        closes |= grid[ends][:, 1:2] == -2
        left, apart = place[~ends], place[ends]
        return cls(sample, ordinal, left, signals, grid[~ends], own_crop, apart, closes)

    def emptied(self, alive: Tensor) -> Tensor:
        """The separators of rows that have lost all tokens. A row without tokens from the start, as
        after unpadding to no columns, does not count.

        Args:
            alive: (n,) bool over the vision tokens, True where one is left.

        Returns:
            Places of the separators in the sequence.
        """
        return self.separators[self.ends.any(1) & ~(self.ends & alive).any(1)]


@dataclass(frozen=True)
class Heard:
    """Captured attention rows of a decoder layer.

    Attributes:
        layout: the tokens held when the layer ran.
        rows: by kind of rows and by sample, their places in that layout.
        captured: [(b, h or 1, r, past + k)] probabilities, per head or averaged; [] if no sample
            has such a row.
        past: number of columns from the cache, which a sliding window may have shortened.
    """

    layout: Layout
    rows: dict[Rows, list[Tensor]]
    captured: list[Tensor]
    past: int

    def at(self, kind: Rows, b: int, index: Tensor, length: int, by_head: bool) -> Tensor:
        """The rows of one sample, over tokens that are still held.

        Args:
            kind: of rows.
            b: the sample.
            index: (s,) places of the tokens in the sequence.
            length: length of the sequence.
            by_head: keep the heads apart.

        Returns:
            (r, s) probabilities, or (h, r, s) by head; r is 0 if nothing was captured. Rows of
            dropped tokens are left out.
        """
        if not self.captured:
            none = torch.zeros(1, 0, len(index), device=index.device)
            return none if by_head else none[0]
        start = 0
        for name, per_sample in self.rows.items():
            if name == kind:
                break
            start += max(len(places) for places in per_sample)
        places = self.rows[kind][b]
        captured = self.captured[0][b, :, start : start + len(places)]
        if not by_head:
            captured = captured.mean(0, keepdim=True)
        held = torch.isin(self.layout.index[b, places], index)
        if not bool(held.all()):  # rows of vision tokens dropped since
            captured = captured[:, held.to(captured.device)]
        # This forward's columns follow the cached ones; a static cache has spare room at the end.
        width = self.layout.index.shape[1]
        first = min(self.past, captured.shape[-1] - width)
        heads, r = captured.shape[:2]
        flat = captured[..., first : first + width].flatten(0, 1).T
        found = still_held(flat, self.layout, b, index, length).T
        return found.reshape(heads, r, len(index)) if by_head else found


def still_held(rows: Tensor, layout: Layout, b: int, index: Tensor, length: int) -> Tensor:
    """The rows of tokens that are still held.

    Args:
        rows: (k, d) rows of the tokens in `layout`.
        layout: the tokens held when the rows were captured.
        b: the sample.
        index: (s,) places in the sequence, all held in `layout`, ascending.
        length: length of the sequence.

    Returns:
        (s, d); `rows` itself if nothing was dropped.
    """
    held, valid = layout.index[b], layout.valid[b]
    if len(index) == len(held):  # both ascend: none dropped, no padding
        return rows
    place = held.new_zeros(length)
    place[held[valid]] = valid.nonzero().squeeze(1)
    return rows[place[index].to(rows.device)]
