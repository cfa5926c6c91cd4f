# SPDX-License-Identifier: Apache-2.0
"""The part of an adapter that knows the decoder: positions, masks, and what its layers hold."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import (
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)

from vtc.core.errors import UnsupportedModelError

CACHE = (
    "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
)
"""The name of the cache argument: `past_key_values` up to transformers 5.23, `cache` from 5.24."""


class DecoderPart:
    """Rotation and masks of decoder layers; see `Adapter`."""

    decoder: Any

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers."""
        return self.decoder.layers

    @property
    def learned(self) -> bool:
        """Whether positions are learned and added to what enters the decoder."""
        return False

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

    def rotates(self, layer: int) -> bool:
        """Whether decoder layer `layer` rotates queries and keys by position."""
        attention: Any = self.layers[layer].self_attn
        if type(attention).__name__.startswith("Cohere2"):
            # Only its sliding-window layers use RoPE.
            return attention.sliding_window is not None or getattr(attention, "force_rope", False)
        return bool(getattr(attention, "use_rope", True))

    def recorded_at(self, name: str) -> tuple[str, bool]:
        """Where the record `name` of a decoder layer is taken.

        Args:
            name: of the record.

        Returns:
            The layer's attribute, "" for the layer, and whether it is the module's input.
        """
        part, _, end = name.partition("_")
        return {"attention": "self_attn", "mlp": "mlp"}.get(part, ""), end == "in"

    def attention_norm(self, layer: int) -> Any:
        """The module between the input of decoder layer `layer` and its attention; `None` if it is
        unknown."""
        return getattr(self.layers[layer], "input_layernorm", None)

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
        attention = self.layers[0].self_attn
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
        attention = self.layers[layer].self_attn
        apply = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        return apply(states, states, *rotation)[1]

    def layer_type(self, layer: int) -> str:
        """ "full_attention", "sliding_attention", "chunked_attention" or "linear_attention"."""
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

    def mask(
        self,
        layer: int,
        embeds: Tensor,
        valid: Tensor | None,
        cache: Any,
        blocks: Tensor | None,
    ) -> Any:
        """The attention mask of a decoder layer.

        Windows and chunks count the tokens that the layer holds, at prefill and in decoding.

        Args:
            layer: 0-based decoder layer.
            embeds: (b, q, d) its input.
            valid: (b, k) bool over cached and new tokens, False at padding; `None` without padding.
            cache: the cache, or `None`.
            blocks: (b, k) as `blocks` returns, or `None`.

        Returns:
            The mask in the form that the layer's attention takes.
        """
        build = {
            "sliding_attention": create_sliding_window_causal_mask,
            "chunked_attention": create_chunked_causal_mask,
        }.get(self.layer_type(layer), create_causal_mask)
        extra = {} if blocks is None else {"block_sequence_ids": blocks}
        return build(
            config=self.decoder.config,
            inputs_embeds=embeds,
            attention_mask=valid,
            layer_idx=layer,
            **{CACHE: cache},
            **extra,
        )
