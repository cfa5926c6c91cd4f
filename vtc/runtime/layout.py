# SPDX-License-Identifier: Apache-2.0
"""The tokens of a forward that consecutive decoder layers hold, as rectangular batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The tokens held in each row, left-padded to the longest row.

    Attributes:
        index: (b, k) place of each token in the sequence that enters the forward; 0 at padding.
        valid: (b, k) bool, False at padding.
    """

    index: Tensor
    valid: Tensor

    @classmethod
    def whole(cls, valid: Tensor) -> Layout:
        """The layout of an uncompressed sequence.

        Args:
            valid: (b, s) bool, False at padding.
        """
        index = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
        return cls(index, valid)

    def compact(self, keep: Tensor) -> tuple[Layout, Tensor]:
        """Keep some tokens and close the gaps.

        Args:
            keep: (b, k) bool over this layout's places.

        Returns:
            The new layout (b, k'), and the (b, k') places of its tokens in this layout.
        """
        keep = keep & self.valid
        width = int(keep.sum(1).max())
        place = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
        # Dropped tokens sort first, so the last `width` places are left-padded rows.
        place = torch.where(keep, place, -1).sort(dim=1).values[:, keep.shape[1] - width :]
        valid = place >= 0
        place = place.clamp_min(0)
        index = self.index.gather(1, place).masked_fill(~valid, 0)
        return Layout(index, valid), place

    def places_of(self, index: Tensor, length: int) -> Tensor:
        """Map places in the sequence to places in this layout.

        Args:
            index: (b, m) places in the sequence.
            length: length of the sequence.

        Returns:
            (b, m) places in this layout; 0 for a token that is not held.
        """
        rows, width = self.index.shape
        where = torch.zeros(rows, length, dtype=torch.long, device=self.index.device)
        here = torch.arange(width, device=self.index.device).expand(rows, -1)
        sample = torch.arange(rows, device=self.index.device)[:, None].expand(-1, width)
        where[sample[self.valid], self.index[self.valid]] = here[self.valid]
        return where.gather(1, index)

    def nearest(self, length: int) -> Tensor:
        """For each place of the full sequence, the last held token at or before it.

        Args:
            length: length of the sequence.

        Returns:
            (b, length) places in this layout; the first held token where none comes before.
        """
        rows, width = self.index.shape
        held = torch.zeros(rows, length, dtype=torch.long, device=self.index.device)
        held.scatter_add_(1, self.index, self.valid.long())
        pads = width - self.valid.sum(1, keepdim=True)
        return (held.cumsum(1) - 1).clamp_min(0) + pads.clamp_max(width - 1)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Gather tokens.

    Args:
        x: (b, s, d) or (b, s).
        index: (b, k) places on the second axis.

    Returns:
        (b, k, d) or (b, k).
    """
    if x.dim() == 2:
        return x.gather(1, index)
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def gather_last(x: Tensor, index: Tensor) -> Tensor:
    """Gather on the last axis.

    Args:
        x: (b, s) or (c, b, s).
        index: (b, k) places on the last axis.

    Returns:
        (b, k) or (c, b, k).
    """
    if x.dim() == 3:
        index = index[None].expand(x.shape[0], -1, -1)
    return x.gather(-1, index)
