# SPDX-License-Identifier: Apache-2.0
"""What was seen of an image and of decoder layers, as methods are shown it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vtc.core import Rows
from vtc.core.images import ImageMap
from vtc.runtime.layout import Layout


@dataclass(frozen=True)
class TowerSignals:
    """What one layer of the vision tower shows of the patches of an image.

    Attributes:
        attention: (n,) attention from [CLS], or received from all.
        keys: (n, h * d).
        cls_query, cls_key: (h * d,) or `None`.
        heads: h.
        crop_query, crop_key: (c, h * d) the same of each tile of a tiled image, or `None`.
    """

    attention: Tensor
    keys: Tensor
    cls_query: Tensor | None
    cls_key: Tensor | None
    heads: int
    crop_query: Tensor | None = None
    crop_key: Tensor | None = None

    def without(self, prefix: int) -> TowerSignals:
        """The same without the first `prefix` tokens."""
        return replace(self, attention=self.attention[prefix:], keys=self.keys[prefix:])

    def of(self, patches: Tensor) -> TowerSignals:
        """The means over the patches (n, m) that each vision token is made of."""
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
    """What the vision side left for one image.

    Attributes:
        map: what its placeholders stand for.
        kept: (k,) places filled by a run on fewer pixels or patches, or `None` if all are.
        passed: patches that entered each tower layer and left the last, if they were merged there.
        tower: what each tower layer that is read shows of the tokens that are filled.
        encoder: (k, d_v) what the projector received of these, if it is read.
        cls: (d_v,) state of [CLS] beside it, where there is one.
        open_patches: `patches`, if the user's mask hides some of the image's tokens.
    """

    map: ImageMap
    kept: Tensor | None = None
    passed: tuple[int, ...] = ()
    tower: dict[int, TowerSignals] = field(default_factory=dict)
    encoder: Tensor | None = None
    cls: Tensor | None = None
    crop_cls: Tensor | None = None
    open_patches: Tensor | None = None

    @property
    def patches(self) -> Tensor | None:
        """(n, m) tower patches of each vision token, those that are not filled included."""
        if self.open_patches is not None or self.map.patches is None:
            return self.open_patches
        separator = self.map.separator
        return self.map.patches if separator is None else self.map.patches[~separator]

    @property
    def filled_patches(self) -> Tensor | None:
        """(n, m) those of the tokens that are filled."""
        whole = self.patches
        return whole if whole is None or self.kept is None else whole[self.kept.to(whole.device)]

    def only(self, seen: Tensor) -> ImageSignals:
        """The signals of the vision tokens `seen` (n,) bool, as if there were no others."""
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
        ordinal: which of the sample's images it is.
        index: (n,) places of its vision tokens in the sequence, without those that are masked.
        grid: (n, 3) their (frame, row, column).
        crop: (n,) the tile of each, or `None`.
        separators: (m,) places of the features that end its rows.
        ends: (m, n) bool, the tokens of the row that each of them ends.
    """

    sample: int
    ordinal: int
    index: Tensor
    signals: ImageSignals
    grid: Tensor
    crop: Tensor | None
    separators: Tensor
    ends: Tensor

    @classmethod
    def of(
        cls, sample: int, ordinal: int, place: Tensor, signals: ImageSignals, valid: Tensor
    ) -> ImageSpan:
        """The image whose placeholders are at `place` (n,); of its vision tokens those that `valid`
        (s,) masks are not there for methods, and in no count."""
        found = signals.map
        grid = found.grid.to(place.device)
        crop = None if found.crop is None else found.crop.to(place.device)
        none = place.new_empty(0)
        ends = torch.zeros(len(place), dtype=torch.bool, device=place.device)
        if found.separator is not None:
            ends = found.separator.to(place.device)
        seen = valid[place]
        if not bool((seen | ends).all()):
            signals, left = signals.only(seen[~ends]), seen | ends
            place, grid, ends = place[left], grid[left], ends[left]
            crop = None if crop is None else crop[left]
        if not bool(ends.any()):
            return cls(sample, ordinal, place, signals, grid, crop, none, none[:, None].bool())
        planes = grid[:, :2]
        if crop is not None:
            # Tiles side by side share their rows; the thumbnail has its own.
            planes = torch.cat([planes, (crop == 0).long()[:, None]], dim=1)
        closes = (planes[ends][:, None] == planes[~ends][None]).all(-1)
        of_frame = grid[ends][:, 1:2] == -1
        closes |= of_frame & (grid[ends][:, None, 0] == grid[~ends][None, :, 0])
        closes |= grid[ends][:, 1:2] == -2
        crop = None if crop is None else crop[~ends]
        return cls(sample, ordinal, place[~ends], signals, grid[~ends], crop, place[ends], closes)

    def emptied(self, alive: Tensor) -> Tensor:
        """Places of the separators none of whose row is left, of `alive` (n,) bool. A row that was
        empty from the start, as in a plane cut to no columns, was not emptied."""
        return self.separators[self.ends.any(1) & ~(self.ends & alive).any(1)]


@dataclass(frozen=True)
class Heard:
    """Attention rows of a decoder layer, as the tap of the layer left them.

    Attributes:
        layout: the tokens held when it ran.
        rows: for each kind of rows and each sample, their places in that layout.
        captured: [(b, h or 1, r, past + k)] probabilities, by head or averaged, or [] if no sample
            has such a row.
        past: columns that come from the cache, unless a window lost some.
    """

    layout: Layout
    rows: dict[Rows, list[Tensor]]
    captured: list[Tensor]
    past: int

    def at(self, kind: Rows, b: int, index: Tensor, length: int, by_head: bool) -> Tensor:
        """(r, s) the rows `kind` of sample `b`, over the tokens at the (s,) places `index` of a
        sequence of `length`; (h, r, s) `by_head`."""
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
        if not bool(held.all()):  # rows of vision tokens that have been dropped since
            captured = captured[:, held.to(captured.device)]
        # This forward's columns follow the cache's; a static cache has spare room after them.
        width = self.layout.index.shape[1]
        first = min(self.past, captured.shape[-1] - width)
        heads, r = captured.shape[:2]
        flat = captured[..., first : first + width].flatten(0, 1).T
        found = still_held(flat, self.layout, b, index, length).T
        return found.reshape(heads, r, len(index)) if by_head else found


def still_held(rows: Tensor, layout: Layout, b: int, index: Tensor, length: int) -> Tensor:
    """Of the rows (k, d) of the tokens that `layout` holds of sample `b`, those at `index`, which
    are among them; `rows` itself if that is all."""
    held, valid = layout.index[b], layout.valid[b]
    if len(index) == len(held):  # both ascend, so none has left and none is padding
        return rows
    place = held.new_zeros(length)
    place[held[valid]] = valid.nonzero().squeeze(1)
    return rows[place[index].to(rows.device)]
