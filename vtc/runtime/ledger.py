# SPDX-License-Identifier: Apache-2.0
"""What a compressed cache holds, layer group by layer group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Group:
    """Consecutive decoder layers that hold the same tokens.

    Attributes:
        first_layer: 0-based index of the first layer of the group.
        length: tokens held, padding included.
        valid: (b, length) bool, False at padding; `None` while nothing is padding.
        shift: (b, 1) what this group's positions lie below the model's own; `None` for zero.
        diverged: it holds something else than the sequence its user believes in.
    """

    first_layer: int
    length: int = 0
    valid: Tensor | None = None
    shift: Tensor | None = None
    diverged: bool = False

    def extend(self, valid: Tensor | None, count: int) -> None:
        """Append `count` tokens with mask `valid` (b, count); `None` for all valid."""
        if valid is not None or self.valid is not None:
            some = valid if valid is not None else self.valid
            assert some is not None
            rows = some.shape[0]
            old = self.valid if self.valid is not None else some.new_ones(rows, self.length)
            new = valid if valid is not None else some.new_ones(rows, count)
            self.valid = torch.cat([old, new], dim=1)
        self.length += count

    def map_rows(self, index: Tensor) -> None:
        if self.valid is not None:
            self.valid = self.valid[index.to(self.valid.device)]
        if self.shift is not None:
            self.shift = self.shift[index.to(self.shift.device)]

    def repeat_rows(self, repeats: int) -> None:
        if self.valid is not None:
            self.valid = self.valid.repeat_interleave(repeats, dim=0)
        if self.shift is not None:
            self.shift = self.shift.repeat_interleave(repeats, dim=0)


@dataclass
class Ledger:
    """All groups of a cache, and the length its user counts.

    Attributes:
        groups: ascending by `first_layer`, the first starts at layer 0.
        logical: tokens as `generate` counts them.
        croppable: how many of the last tokens can be removed: those after the last compression.
        may_write: a patched model is in a forward whose tokens are counted here.
    """

    groups: list[Group]
    logical: int = 0
    croppable: int = 0
    may_write: bool = False

    @classmethod
    def fresh(cls, first_layers: tuple[int, ...], past: int, valid: Tensor | None) -> Ledger:
        """For a cache that holds `past` uncompressed tokens with mask `valid` (b, past)."""
        groups = [Group(first) for first in first_layers]
        for group in groups:
            group.extend(valid, past)
        return cls(groups, logical=past, croppable=past)

    def group_of(self, layer: int) -> int:
        return max(i for i, group in enumerate(self.groups) if group.first_layer <= layer)
