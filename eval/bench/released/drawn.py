# SPDX-License-Identifier: Apache-2.0
"""Random tokens and decoder states, with all signals that methods may need."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.core import LayerState, VisionTokens

from .attention import HEADS

BEFORE, AFTER = 16, 48
"""Text tokens before and after the image."""


def tokens_of(n: int, d: int, seed: int = 0) -> VisionTokens:
    """Random tokens of one image, with all signals."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight = draw(d, d) / d**0.5
    attention = (2 * draw(n)).softmax(0)
    keys, query, place = draw(n, d), draw(d), torch.arange(n)
    return VisionTokens(
        features=draw(n, d) + draw(d),
        grid=torch.stack([0 * place, place // 60, place % 60], 1),
        text=draw(32, d) + draw(d),
        cls_attention=attention,
        keys=keys,
        heads=HEADS,
        cls_query=query,
        cls_key=draw(d),
        encoder=draw(n, d) + draw(d),
        encoder_cls=draw(d),
        project=lambda states: states @ weight,
        low_attention=(2 * draw(n)).softmax(0),
    )


def state_of(n: int, d: int, layer: int = 2, seed: int = 0) -> LayerState:
    """A random sample before decoder layer `layer` of 32: 16 text tokens, an image, 48 text
    tokens."""
    generator = torch.Generator().manual_seed(seed)
    length = BEFORE + n + AFTER
    image = torch.full((length,), -1)
    image[BEFORE : BEFORE + n] = 0
    hidden, keys, before = (torch.randn(length, d, generator=generator) for _ in range(3))
    rows = (2 * torch.randn(AFTER, length, generator=generator)).softmax(1)
    return LayerState(
        layer=layer,
        num_layers=32,
        hidden=hidden,
        image=image,
        text=torch.arange(length) >= BEFORE + n,
        grid=torch.zeros(length, 3, dtype=torch.long),
        prompt_length=length,
        original=(n,),
        attention={layer - 1: rows},
        ahead=rows,
        recorded={
            (layer - 1, "keys"): keys,
            (layer - 1, "normed"): hidden,
            (layer - 1, "input"): before,
            (0, "input"): keys / d**0.5,
        },
    )
