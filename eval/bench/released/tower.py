# SPDX-License-Identifier: Apache-2.0
"""Released code of methods that act inside the vision tower, reimplemented.

FlowCut's repository was unavailable at the time of writing: `flowcut` follows the library's notes
on it, with the cheaper variant where these are ambiguous.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.core import EncoderState

from .attention import HEADS


@dataclass(frozen=True)
class TowerLayer:
    """A tower layer's queries, keys and values for [CLS] and n patches, (1, h, n + 1, d_head) each,
    and its attention output, (n + 1, d)."""

    query: Tensor
    key: Tensor
    value: Tensor
    hidden: Tensor

    @classmethod
    def drawn(cls, n: int, d: int, seed: int = 0) -> TowerLayer:
        generator = torch.Generator().manual_seed(seed)
        shape = (1, HEADS, n + 1, d // HEADS)
        query, key, value = (torch.randn(*shape, generator=generator) for _ in range(3))
        return cls(query, key, value, torch.randn(n + 1, d, generator=generator))

    def whole(self) -> Tensor:
        """(1, h, n + 1, n + 1) eager attention."""
        logits = self.query @ self.key.transpose(2, 3) * self.query.shape[3] ** -0.5
        return logits.softmax(-1)


def tome(layer: TowerLayer, r: int) -> Tensor:
    """Keys averaged over heads and normalised, all products of the two halves, a sort of each row's
    best; contents and sizes are gathered, summed by a scatter, and divided. (n + 1 - r, d)"""
    metric = layer.key.mean(1)
    metric = metric / metric.norm(dim=-1, keepdim=True)
    first, second = metric[:, ::2], metric[:, 1::2]
    scores = first @ second.transpose(1, 2)
    scores[:, 0] = -math.inf
    best, partner = scores.max(-1)
    order = best.argsort(dim=-1, descending=True)[..., None]
    stay, leave = order[:, r:].sort(dim=1).values, order[:, :r]
    into = partner[..., None].gather(1, leave)

    def merged(x: Tensor) -> Tensor:
        a, b, width = x[:, ::2], x[:, 1::2], x.shape[2]
        kept = a.gather(1, stay.expand(-1, -1, width))
        gone = a.gather(1, leave.expand(-1, -1, width))
        b = b.scatter_reduce(1, into.expand(-1, -1, width), gone, reduce="sum")
        return torch.cat([kept, b], 1)

    x = layer.hidden[None]
    size = torch.ones_like(x[..., :1])
    return (merged(x * size) / merged(size))[0]


def flowcut(layer: TowerLayer, state: EncoderState, k: int) -> Tensor:
    """Softmax of the products of [CLS]'s value with all, L1 norm of the mean value, the average
    with earlier scores, an entropy for the number to drop, the best of the rest, sorted."""
    assert state.memory is not None
    n, relation, values = len(state), state.attention, layer.value[0]
    products = values[:, :1] @ values.transpose(1, 2)
    semantic = products.softmax(-1).mean(0)[0, 1:]
    density = values.mean(0)[1:].norm(p=1, dim=-1)
    share = relation / relation.sum()
    score = (share + semantic / semantic.sum()) * density
    score = 0.5 * state.memory + 0.5 * score
    entropy = float(-(share * share.log()).sum()) / math.log(n)
    gone = round((n - k) / math.sqrt(state.num_layers - 2 - state.layer) * (1 - entropy**2))
    chosen = score.topk(max(n - gone, k)).indices.sort().values
    score.gather(0, chosen)
    return chosen


def flowcut_attention(layer: TowerLayer) -> Tensor:
    """(n,) the layer runs eagerly; its map's [CLS] row, mean over heads."""
    attention = layer.whole()
    (attention @ layer.value).transpose(1, 2).contiguous()  # the layer's output
    return attention[0, :, 0].mean(0)[1:]
