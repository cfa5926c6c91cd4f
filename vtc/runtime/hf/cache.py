# SPDX-License-Identifier: Apache-2.0
"""A cache whose layers hold fewer tokens than its user fed.

`generate` counts the tokens of the full prompt, while each group of decoder layers holds fewer.
The ledger keeps both lengths, and the cache reports the one that fits: the logical length to code
that feeds tokens, the physical length to code that builds masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vtc.core.errors import ArgumentError
from vtc.runtime.ledger import Ledger


def cache_in(given: Mapping[str, Any]) -> Any:
    """The cache among named arguments or outputs.

    Args:
        given: names and values; the cache is under "cache" or "past_key_values".

    Returns:
        The cache, or `None`.
    """
    found = given.get("cache")
    return given.get("past_key_values") if found is None else found


class CompressedCache:
    """Mixin that gives a cache of transformers a ledger; see `attach`.

    Attributes:
        vtc_ledger: what the cache holds.
        layers: the cache's layers, as transformers keeps them.
    """

    vtc_ledger: Ledger
    layers: list[Any]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens fed so far, dropped ones included; the same for every layer."""
        return self.vtc_ledger.logical

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Append the keys and values of one layer.

        Args:
            key_states: (b, h, q, d) new keys.
            value_states: (b, h, q, d) new values.
            layer_idx: 0-based decoder layer.
            args: passed on.
            kwargs: passed on.

        Returns:
            The keys and values to attend to.

        Raises:
            RuntimeError: the writing model is not patched.
        """
        if not self.vtc_ledger.may_write:
            raise RuntimeError(
                "past_key_values: this cache holds compressed vision tokens, and the model that "
                "writes to it is not patched; go on with the patched model, or start with a new "
                "cache"
            )
        write = super().update  # type: ignore[misc]
        return write(key_states, value_states, layer_idx, *args, **kwargs)

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Tokens that the first layer from `layer_idx` on with a length physically holds, or 0."""
        # Layers with a recurrent state have no length, but transformers asks for it.
        counting = [layer for layer in self.layers[layer_idx:] if hasattr(layer, "get_seq_length")]
        return counting[0].get_seq_length() if counting else 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx` (b,), in the layers and in the ledger."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.vtc_ledger.map_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (k,), in the layers and in the ledger."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.vtc_ledger.map_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times, in the layers and in the ledger."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.vtc_ledger.repeat_rows(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, as assisted decoding does with rejected candidates.

        Args:
            tokens_to_remove: how many, with either sign.

        Raises:
            ArgumentError: negative, and of more tokens than came after the last compressed image.
        """
        ledger, count = self.vtc_ledger, abs(tokens_to_remove)
        if tokens_to_remove <= 0 and count > ledger.croppable:
            raise ArgumentError(
                "tokens_to_remove",
                f"a compressed cache can lose the {ledger.croppable} tokens that "
                f"came after the last compressed image, got {count}: what was dropped before them "
                "cannot be put back",
            )
        super().crop(tokens_to_remove)  # type: ignore[misc]
        ledger.shrink(count)

    def reset(self) -> None:
        """Empty the cache, which becomes an instance of its plain class again."""
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
    """Give `cache` a ledger. Its class changes in place; copies and pickles keep both.

    Args:
        cache: a cache of transformers, plain or compressed.
        ledger: what it holds.
    """
    if not isinstance(cache, CompressedCache):
        cache.__class__ = _compressed_class(type(cache))
    cache.vtc_ledger = ledger


def ledger_of(cache: Any) -> Ledger | None:
    """The ledger of `cache`, or `None` if nothing in it is compressed."""
    return getattr(cache, "vtc_ledger", None)
