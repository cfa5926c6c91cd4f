# SPDX-License-Identifier: Apache-2.0
"""What a compressed cache holds of the sequence its user believes in.

`generate` counts tokens of the full prompt. Behind it each group of decoder layers holds fewer.
The ledger keeps both lengths, and the cache that carries it answers with the right one: the
logical length to whoever feeds tokens, the physical one to whoever builds masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def cache_in(given: Mapping[str, Any]) -> Any:
    """The cache among named arguments or outputs, under either name, or `None`."""
    found = given.get("cache")
    return given.get("past_key_values") if found is None else found


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


class CompressedCache:
    """Mixin that gives a transformers cache its ledger; see `attach`."""

    vtc_ledger: Ledger
    layers: list[Any]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.vtc_ledger.logical

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        if not self.vtc_ledger.may_write:
            raise RuntimeError(
                "past_key_values: this cache holds compressed vision tokens, and the model that "
                "writes to it is not patched; go on with the patched model, or start with a new "
                "cache"
            )
        write = super().update  # type: ignore[misc]
        return write(key_states, value_states, layer_idx, *args, **kwargs)

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        # Layers with a recurrent state do not count; transformers asks for them all the same.
        counting = [layer for layer in self.layers[layer_idx:] if hasattr(layer, "get_seq_length")]
        return counting[0].get_seq_length() if counting else 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        for group in self.vtc_ledger.groups:
            group.map_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        for group in self.vtc_ledger.groups:
            group.map_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        for group in self.vtc_ledger.groups:
            group.repeat_rows(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        ledger, count = self.vtc_ledger, abs(tokens_to_remove)
        if tokens_to_remove <= 0 and count > ledger.croppable:
            raise ValueError(
                f"tokens_to_remove: a compressed cache can lose the {ledger.croppable} tokens that "
                f"came after the last compressed image, got {count}: what was dropped before them "
                "cannot be put back"
            )
        super().crop(tokens_to_remove)  # type: ignore[misc]
        for group in ledger.groups:
            group.length -= count
            if group.valid is not None:
                group.valid = group.valid[:, : group.length]
        ledger.logical -= count
        ledger.croppable -= count

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        del self.vtc_ledger
        self.__class__ = _plain_class(type(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (_plain_class(type(self)),), self.__dict__


def _plain_class(cls: type) -> Any:
    return cls.__mro__[2]


_CLASSES: dict[Any, Any] = {}


def _compressed_class(cls: Any) -> Any:
    if cls not in _CLASSES:
        _CLASSES[cls] = type(f"Compressed{cls.__name__}", (CompressedCache, cls), {})
    return _CLASSES[cls]


def _rebuild(plain: type) -> Any:
    cls = _compressed_class(plain)
    return cls.__new__(cls)


def attach(cache: Any, ledger: Ledger) -> None:
    """Give `cache` its ledger. The instance changes class; copies and pickles carry both."""
    if not isinstance(cache, CompressedCache):
        cache.__class__ = _compressed_class(type(cache))
    cache.vtc_ledger = ledger


def ledger_of(cache: Any) -> Ledger | None:
    """The ledger of `cache`, or `None` if it holds nothing compressed."""
    return getattr(cache, "vtc_ledger", None)
