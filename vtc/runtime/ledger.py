# SPDX-License-Identifier: Apache-2.0
"""What a compressed cache holds, by layer group."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Group:
    """Consecutive decoder layers that hold the same tokens.

    Attributes:
        first_layer: 0-based index of the first layer of the group.
        length: number of tokens held, padding included.
        valid: (b, length) bool, False at padding; `None` without padding.
        shift: (b, 1) how far this group's positions lie below the model's own; `None` for zero.
        diverged: the group holds other tokens than its user fed.
    """

    first_layer: int
    length: int = 0
    valid: Tensor | None = None
    shift: Tensor | None = None
    diverged: bool = False

    def extend(self, valid: Tensor | None, count: int) -> None:
        """Append tokens.

        Args:
            valid: (b, count) bool, False at padding; `None` for all valid.
            count: number of tokens per row.
        """
        if valid is not None or self.valid is not None:
            some = valid if valid is not None else self.valid
            assert some is not None
            rows = some.shape[0]
            old = self.valid if self.valid is not None else some.new_ones(rows, self.length)
            new = valid if valid is not None else some.new_ones(rows, count)
            self.valid = torch.cat([old, new], dim=1)
        self.length += count

    def map_rows(self, index: Tensor) -> None:
        """Take the rows `index` (b',)."""
        if self.valid is not None:
            self.valid = self.valid[index.to(self.valid.device)]
        if self.shift is not None:
            self.shift = self.shift[index.to(self.shift.device)]

    def repeat_rows(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        if self.valid is not None:
            self.valid = self.valid.repeat_interleave(repeats, dim=0)
        if self.shift is not None:
            self.shift = self.shift.repeat_interleave(repeats, dim=0)


@dataclass
class Ledger:
    """The groups of a cache, and the length that its user counts.

    Attributes:
        groups: ascending by `first_layer`; the first starts at layer 0.
        logical: number of tokens as `generate` counts them.
        croppable: number of last tokens that can be removed: those after the last compressed image.
        may_write: a patched model is in a forward that counts its tokens here.
        rows: (b, ...) values that a stage keeps with the cache, by name; they follow its rows, as
            beams do.
    """

    groups: list[Group]
    logical: int = 0
    croppable: int = 0
    may_write: bool = False
    rows: dict[str, Tensor] = field(default_factory=dict)

    def shrink(self, count: int) -> None:
        """Forget the last `count` tokens."""
        for group in self.groups:
            group.length -= count
            if group.valid is not None:
                group.valid = group.valid[:, : group.length]
        self.logical -= count
        self.croppable -= count

    def map_rows(self, index: Tensor) -> None:
        """Take the rows `index` (b',) of everything."""
        for group in self.groups:
            group.map_rows(index)
        self.rows = {name: kept[index.to(kept.device)] for name, kept in self.rows.items()}

    def repeat_rows(self, repeats: int) -> None:
        """Repeat each row of everything `repeats` times."""
        for group in self.groups:
            group.repeat_rows(repeats)
        self.rows = {n: kept.repeat_interleave(repeats, dim=0) for n, kept in self.rows.items()}

    @classmethod
    def fresh(cls, first_layers: tuple[int, ...], past: int, valid: Tensor | None) -> Ledger:
        """The ledger of a cache of uncompressed tokens.

        Args:
            first_layers: the first layer of each group.
            past: number of tokens that the cache holds.
            valid: (b, past) bool, False at padding; `None` for all valid.
        """
        groups = [Group(first) for first in first_layers]
        for group in groups:
            group.extend(valid, past)
        return cls(groups, logical=past, croppable=past)

    def group_of(self, layer: int) -> int:
        """The number of the group of a 0-based decoder layer."""
        return max(i for i, group in enumerate(self.groups) if group.first_layer <= layer)
