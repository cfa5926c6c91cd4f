# SPDX-License-Identifier: Apache-2.0
"""Attention for methods, as captured by the library and as computed by released code."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from vtc.core.prefill import Stopwatch
from vtc.runtime.hf import taps

HEADS = 16


class Heard:
    """Random queries, keys and values of a causal layer that has run, (1, h, s, d_head) each."""

    def __init__(self, length: int, d: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (1, HEADS, length, d // HEADS)
        self.query, self.key, self.value = (
            torch.randn(*shape, generator=generator) for _ in range(3)
        )
        # The model computes one mask for all layers.
        self.mask = torch.full((length, length), torch.finfo(torch.float32).min).triu_(1)

    def rows(self, places: Tensor) -> Tensor:
        """(r, s) attention of the rows at `places`, mean over heads, by the library's tap."""
        tap = taps.Tap(None)
        taps.listen_rows(tap, places[None], None, 0, Stopwatch())
        assert tap.armed is not None
        tap.armed(self.query, self.key, self.value, None, {})
        return tap.captured[0][0, 0]

    def fused(self) -> Tensor:
        """The layer's attention output, by the fused kernel."""
        return scaled_dot_product_attention(self.query, self.key, self.value, is_causal=True)

    def whole(self) -> Tensor:
        """(1, h, s, s) eager attention: logits, mask and softmax of all rows."""
        logits = self.query @ self.key.transpose(2, 3) / self.query.shape[3] ** 0.5 + self.mask
        return logits.softmax(-1, dtype=torch.float32)


class Ahead:
    """A decoder layer about to run, with random weights: its norm, projections and rotation."""

    def __init__(self, length: int, d: int, seed: int = 0) -> None:
        config = LlamaConfig(
            hidden_size=d, num_attention_heads=HEADS, max_position_embeddings=length
        )
        config._attn_implementation = "sdpa"
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.attend = LlamaAttention(config, 0).eval()
        self.norm, self.rotary = LlamaRMSNorm(d), LlamaRotaryEmbedding(config)
        self.tap = taps.install(self.attend)
        self.turns = self.rotary(torch.empty(0), torch.arange(length)[None])

    def rows(self, hidden: Tensor, places: Tensor) -> Tensor:
        """(r, s) look-ahead rows on `hidden` (s, d), by the library's `peek`."""
        s = hidden.shape[0]
        visible = torch.ones(1, s, dtype=torch.bool)
        taps.listen_rows(self.tap, places[None], visible, 0, Stopwatch())
        with self.tap.alone():
            self.attend(
                hidden_states=self.norm(hidden[None]),
                position_embeddings=self.rotary(hidden, torch.arange(s)[None]),
                attention_mask=None,
            )
        return self.tap.captured[0][0, 0]

    def released(self, hidden: Tensor, rows: slice) -> Tensor:
        """(r, s) the same as in PyramidDrop, VScan and TransPrune: queries, keys and values of a
        copy of all tokens, all rotated, and a mask of all pairs, of which only `rows` are used."""
        s = hidden.shape[0]
        normed = self.norm(hidden.clone()[None])
        parts = (self.attend.q_proj, self.attend.k_proj, self.attend.v_proj)
        query, key, _ = (
            part(normed).view(1, s, HEADS, self.attend.head_dim).transpose(1, 2) for part in parts
        )
        cos, sin = (table[:, :s][:, None] for table in self.turns)
        query, key = (x * cos + _half_turned(x) * sin for x in (query, key))
        least = torch.finfo(hidden.dtype).min
        mask = torch.full((s, s), least)
        place = torch.arange(s)
        mask.masked_fill_(place < (place + 1)[:, None], 0)
        padding = 1.0 - torch.ones(1, 1, 1, s).expand(1, 1, s, s)
        padding = padding.masked_fill(padding.bool(), least)
        mask = mask[None, None].masked_fill(padding.bool(), least)
        logits = query[0, :, rows] @ key[0].transpose(1, 2) / self.attend.head_dim**0.5
        return (logits + mask[0, :, rows]).softmax(-1, dtype=torch.float32).mean(0)


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)
