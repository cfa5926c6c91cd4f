# SPDX-License-Identifier: Apache-2.0
"""Masks, positions and lengths per layer group: the decoder layers that hold the same tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vtc.core import Method
from vtc.core.errors import ArgumentError
from vtc.models import Adapter
from vtc.models.decoder import POINTWISE, RECURRENT
from vtc.runtime.forward import Forward
from vtc.runtime.hf.arguments import ones
from vtc.runtime.hf.cache import cache_in
from vtc.runtime.ledger import Group, Ledger


class LayerGroups:
    """Builds masks and positions for the layers of each group.

    Args:
        adapter: bound to the model.
        method: named in error messages.
        starts: 0-based layers, other than the first, at which a group starts; ascending.

    Attributes:
        first_layers: the first layer of each group.
        group_of: the group of each layer.
    """

    def __init__(self, adapter: Adapter, method: Method, starts: tuple[int, ...]) -> None:
        self.adapter, self.method = adapter, method
        self.num_layers = len(adapter.layers)
        self.first_layers = (0, *starts)
        self.group_of = [
            max(g for g, first in enumerate(self.first_layers) if first <= layer)
            for layer in range(self.num_layers)
        ]

    def padding(self, forward: Forward, kwargs: dict[str, Any]) -> Any:
        """The mask that the caller passed, to the base model or to the decoder.

        Args:
            forward: the forward in progress.
            kwargs: the arguments of the decoder.

        Returns:
            The `attention_mask`, or `None`.
        """
        own = forward.given if self.adapter.masks_in_base else kwargs
        return own.get("attention_mask")

    def of_decoder(self, forward: Forward, embeds: Tensor, cache: Any) -> Any:
        """The masks of the first group, for families whose base model builds the masks.

        Args:
            forward: the forward in progress.
            embeds: (b, s, d) embeddings that enter the decoder.
            cache: the cache, or `None`.

        Returns:
            One mask by layer type, or a single mask if the config has no `layer_types`.
        """
        found = {}
        for layer in range(self.num_layers):
            kind = self.adapter.layer_type(layer)
            if kind not in found:
                found[kind] = self.of_layer(forward, 0, layer, embeds, cache)
        if getattr(self.adapter.decoder.config, "layer_types", None) is None:
            return found.popitem()[1]
        return found

    def of_layer(
        self, forward: Forward, number: int, layer: int, hidden: Tensor, cache: Any
    ) -> Any:
        """The mask of one decoder layer.

        Args:
            forward: the forward in progress.
            number: the layer's group.
            layer: 0-based decoder layer.
            hidden: (b, q, d) the layer's input.
            cache: the cache, or `None`.

        Returns:
            The mask that the layer's attention takes; `None` if it needs none.
        """
        group = forward.ledger.groups[number]
        valid = group.valid
        if valid is None and cache is None and group.diverged:
            # Without a mask, transformers takes gaps in the positions for packed sequences.
            valid = ones(hidden, group.length)
        blocks = None
        if forward.phase == "prefill":
            blocks = forward.gather_blocks(group.length)
            blocks = self.adapter.layer_blocks(layer, blocks)
        return self.adapter.mask(layer, hidden, valid, cache, blocks)

    def adapt_layer(
        self, forward: Forward, layer: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> None:
        """Set a layer's mask and positions to those of the tokens that its group holds.

        The first group keeps what the decoder computed.

        Args:
            forward: the forward in progress.
            layer: 0-based decoder layer.
            hidden: (b, q, d) the layer's input.
            kwargs: the layer's arguments, changed in place.
        """
        number = self.group_of[layer]
        if number == 0:
            return
        kind = self.adapter.layer_type(layer)
        cache = cache_in(kwargs)
        if (number, kind) not in forward.memo:
            forward.memo[number, kind] = self.of_layer(forward, number, layer, hidden, cache)
        kwargs["attention_mask"] = forward.memo[number, kind]
        if kind in (*RECURRENT, *POINTWISE) or not self.adapter.takes_rotation:
            return  # it has no positions, or they were added to what entered
        kind = self.adapter.rotary_kind(layer)
        if (number, kind, "rotary") not in forward.memo:
            positions = forward.rotary_positions(number).to(hidden.device)
            rotation = self.adapter.rotary(layer, hidden, positions)
            forward.memo[number, kind, "rotary"] = positions, rotation
        positions, kwargs["position_embeddings"] = forward.memo[number, kind, "rotary"]
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = positions if positions.dim() == 2 else positions[0]

    def refuse_padding(self, group: Group, valid: Tensor | None) -> None:
        """Refuse padding after cached tokens where a window, a chunk or a recurrent state would
        count it.

        Args:
            group: the layer group, before the new tokens.
            valid: (b, q) bool, False at padding among the new tokens; `None` if there is none.

        Raises:
            ArgumentError: the new tokens contain padding, the group holds tokens, and some layer
                does not use full attention.
        """
        if valid is None or not group.length:
            return
        kinds = {self.adapter.layer_type(i) for i in range(self.num_layers)}
        if kinds - {"full_attention", *POINTWISE}:  # even inside the window: decoding may leave it
            raise ArgumentError(
                "past_key_values",
                "ragged continuation is not supported on this cache: a sliding "
                "window, a chunk or a recurrent state would count the padding; send the rows one "
                "by one, or start with a new cache",
            )

    def check(self, ledger: Ledger) -> None:
        """Refuse a cache that was compressed at other layers.

        Args:
            ledger: the ledger of the cache.

        Raises:
            ArgumentError: the groups of the ledger begin at other layers than those of the plan.
        """
        if tuple(group.first_layer for group in ledger.groups) != self.first_layers:
            raise ArgumentError(
                "past_key_values",
                f"this cache was compressed by a method that acts at other layers "
                f"than {self.method}; start with a new cache after patching anew",
            )

    def open(self, forward: Forward, number: int) -> None:
        """Record in the ledger which tokens of this forward a layer group holds.

        Args:
            forward: the forward in progress, with its current layout.
            number: the layer group.

        Raises:
            ArgumentError: as `refuse_padding`.
        """
        group, layout = forward.ledger.groups[number], forward.layout
        if not forward.whole:
            group.diverged = True
        valid = None if bool(layout.valid.all()) else layout.valid
        self.refuse_padding(group, valid)
        group.extend(valid, layout.index.shape[1])
        total = forward.places.gap.sum(1, keepdim=True)
        if bool(total.any()) and not self.adapter.axial:
            group.shift = total if group.shift is None else group.shift + total
