# SPDX-License-Identifier: Apache-2.0
"""The part of an adapter that knows the decoder: positions, masks, and what its layers hold."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.masking_utils import (
    create_causal_mask,
    create_chunked_causal_mask,
    create_recurrent_attention_mask,
    create_sliding_window_causal_mask,
)

from vtc.core.errors import UnsupportedModelError

CACHE = (
    "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
)
"""The name of the cache argument: `past_key_values` up to transformers 5.23, `cache` from 5.24."""


RECURRENT = {"linear_attention": "linear_attn", "conv": "conv"}
"""The kinds of layers that read tokens one after the other and hold a state instead of keys, and
the name of what stands there for attention."""
POINTWISE = ("mlp", "moe")
"""The kinds of layers that read each token by itself, and hold nothing."""


class DecoderPart:
    """Rotation and masks of decoder layers; see `Adapter`.

    Class attributes:
        decoder_parts: norm before attention, feed-forward of a layer, and norm after the last, by
            name.
    """

    decoder_parts: ClassVar[tuple[str, str, str]] = ("input_layernorm", "mlp", "norm")

    decoder: Any

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers."""
        return self.decoder.layers

    @property
    def learned(self) -> bool:
        """Whether positions are learned and added to what enters the decoder."""
        return False

    @property
    def takes_rotation(self) -> bool:
        """Whether decoder layers take position embeddings."""
        return not self.learned

    def attention_name(self, layer: int) -> str:
        """The attribute under which a decoder layer has its attention, if it has one."""
        return "self_attn"

    def attention_of(self, layer: int) -> Any:
        """The attention of a decoder layer, or `None` if it has none."""
        return getattr(self.layers[layer], self.attention_name(layer), None)

    def numbered(self, mask: Tensor | None, past: int, count: int, device: Any) -> Tensor:
        """The positions that the decoder gives tokens without `position_ids`.

        Args:
            mask: (b, past + count) the user's mask, or `None`.
            past: number of cached tokens.
            count: number of new tokens.
            device: of the result.

        Returns:
            (b or 1, count).
        """
        return torch.arange(past, past + count, device=device)[None]

    def rotary(self, layer: int, hidden: Tensor, positions: Tensor) -> Any:
        """The position embeddings of a decoder layer.

        Args:
            layer: 0-based decoder layer.
            hidden: gives dtype and device.
            positions: (b, k), or (axes, b, k) with M-RoPE.

        Returns:
            What the layer takes as `position_embeddings`.
        """
        embed = self.decoder.rotary_emb
        if "layer_type" in inspect.signature(embed.forward).parameters:
            return embed(hidden, positions, self.layer_type(layer))
        return embed(hidden, position_ids=positions)

    def rotary_kind(self, layer: int) -> str:
        """The kind of a decoder layer's rotation: layers of one kind rotate alike."""
        return self.layer_type(layer)

    def rotates(self, layer: int) -> bool:
        """Whether decoder layer `layer` rotates queries and keys by position."""
        attention: Any = self.attention_of(layer)
        if type(attention).__name__.startswith("Cohere2"):
            # Only its sliding-window layers use RoPE.
            return attention.sliding_window is not None or getattr(attention, "force_rope", False)
        return bool(getattr(attention, "use_rope", True))

    def recorded_at(self, layer: int, name: str) -> tuple[str, bool]:
        """Where the record `name` of a decoder layer is taken. Of a layer that does not attend,
        "attention" is what stands there instead.

        Args:
            layer: 0-based decoder layer.
            name: of the record.

        Returns:
            The layer's attribute, "" for the layer, and whether it is the module's input.
        """
        part, _, end = name.partition("_")
        mixer = RECURRENT.get(self.layer_type(layer), self.attention_name(layer))
        return {"attention": mixer, "mlp": self.decoder_parts[1]}.get(part, ""), end == "in"

    def attends(self, layer: int) -> bool:
        """Whether decoder layer `layer` has attention weights that can be read."""
        return hasattr(self.attention_of(layer), "config")

    def can_peek(self, layer: int) -> bool:
        """Whether `attention_input` knows what the attention of decoder layer `layer` receives."""
        return hasattr(self.layers[layer], self.decoder_parts[0])

    @property
    def any_attention(self) -> Any:
        """The attention of the first decoder layer that has one."""
        found: Iterator[Any] = map(self.attention_of, range(len(self.layers)))
        return next(attention for attention in found if attention is not None)

    def attention_input(self, layer: int, hidden: Tensor) -> Tensor:
        """What the attention of a decoder layer receives.

        Args:
            layer: 0-based decoder layer.
            hidden: (b, k, d) the layer's input.

        Returns:
            (b, k, d).
        """
        return getattr(self.layers[layer], self.decoder_parts[0])(hidden)

    def join_streams(self, hidden: Tensor) -> Tensor:
        """What enters or leaves a decoder layer as one row per token.

        Args:
            hidden: (b, k, d), or as the layers of the family take it.

        Returns:
            (b, k, d').
        """
        return hidden

    def part_streams(self, tokens: Tensor) -> Tensor:
        """The inverse of `join_streams`, for what enters a layer."""
        return tokens

    def normed(self, states: Tensor) -> Tensor:
        """`states` (b, k, d) of a layer through the norm behind the last."""
        return getattr(self.decoder, self.decoder_parts[2])(states)

    def attention_arguments(self, layer: int) -> dict[str, Any]:
        """Arguments that the attention of decoder layer `layer` takes beside the usual ones, where
        vtc looks ahead at it."""
        return {}

    def check_rotate(self) -> None:
        """Refuse a decoder whose rotation `rotate` cannot apply.

        Raises:
            UnsupportedModelError: it rotates a part of each key, or has no usual
                `apply_rotary_pos_emb`.
        """
        attention = self.any_attention
        if hasattr(attention, "qk_rope_head_dim"):
            raise UnsupportedModelError(
                f"model: {type(attention).__name__} turns a part of each key only, so "
                "positions, or keys of padded rows, cannot be compared"
            )
        apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        names = list(inspect.signature(apply).parameters)[:4] if apply is not None else []
        if names != ["q", "k", "cos", "sin"]:
            raise UnsupportedModelError(
                f"model: {type(attention).__name__} has no apply_rotary_pos_emb(q, k, cos, sin) "
                "with which to compare positions, or keys of padded rows"
            )

    def rotate(self, layer: int, states: Tensor, rotation: Any) -> Tensor:
        """Rotate states.

        Args:
            layer: 0-based decoder layer.
            states: (b, h, k, d).
            rotation: what `rotary` returned.

        Returns:
            (b, h, k, d).
        """
        attention = self.attention_of(layer)
        apply = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        return apply(states, states, *rotation)[1]

    def layer_type(self, layer: int) -> str:
        """ "full_attention", "sliding_attention", "chunked_attention", or one of `RECURRENT` or
        `POINTWISE`."""
        config = self.decoder.config
        kinds: list[str] | None = getattr(config, "layer_types", None)
        if kinds:
            return kinds[layer]
        sliding = getattr(config, "sliding_window", None) is not None
        return "sliding_attention" if sliding else "full_attention"

    def chunk(self, layer: int) -> int | None:
        """Tokens per attention chunk of decoder layer `layer`; `None` without chunks."""
        if self.layer_type(layer) != "chunked_attention":
            return None
        return int(self.decoder.config.attention_chunk_size)

    def blocks(self, given: Mapping[str, Any]) -> Tensor | None:
        """Blocks of tokens that attend to each other in both directions.

        Args:
            given: the arguments of the base model's forward.

        Returns:
            (b, s) int64 block numbers, -1 at causal tokens; `None` if all are causal.
        """
        return None

    def layer_blocks(self, layer: int, blocks: Tensor | None) -> Tensor | None:
        """The `blocks` that apply in decoder layer `layer`."""
        return blocks

    def injects(self) -> tuple[int, ...]:
        """0-based decoder layers before which features are added to the vision tokens, where these
        enter as zeros; ascending, and empty where they enter with their features."""
        return ()

    def take_injected(self, kwargs: dict[str, Any]) -> tuple[Tensor, dict[int, Tensor]] | None:
        """Take the features of `injects` off the arguments of the decoder, which then adds none.

        Args:
            kwargs: the arguments of the decoder, changed in place.

        Returns:
            (b, s) bool, True at the tokens that receive features, and these by layer: (n, d) in the
            order of the tokens; `None` if there are none.
        """
        return None

    def mask(
        self,
        layer: int,
        embeds: Tensor,
        valid: Tensor | None,
        cache: Any,
        blocks: Tensor | None,
    ) -> Any:
        """The attention mask of a decoder layer.

        Windows and chunks count the tokens that the layer holds, at prefill and in decoding. Of a
        recurrent layer, it marks the new tokens that are no padding.

        Args:
            layer: 0-based decoder layer.
            embeds: (b, q, d) its input.
            valid: (b, k) bool over cached and new tokens, False at padding; `None` without padding.
            cache: the cache, or `None`.
            blocks: (b, k) as `blocks` returns, or `None`.

        Returns:
            The mask in the form that the layer's attention takes.
        """
        kind = self.layer_type(layer)
        if kind in POINTWISE:
            return None
        if kind in RECURRENT:
            return create_recurrent_attention_mask(self.decoder.config, embeds, valid)
        build = {
            "sliding_attention": create_sliding_window_causal_mask,
            "chunked_attention": create_chunked_causal_mask,
        }.get(kind, create_causal_mask)
        extra = {} if blocks is None else {"block_sequence_ids": blocks}
        return build(
            config=self.decoder.config,
            inputs_embeds=embeds,
            attention_mask=valid,
            layer_idx=layer,
            **{CACHE: cache},
            **extra,
        )
