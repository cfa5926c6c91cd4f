# SPDX-License-Identifier: Apache-2.0
"""Released code of methods that act between decoder layers, reimplemented.

VScan's second stage ranks and drops like PyramidDrop: `pyramiddrop` covers both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vtc.core import LayerState

from .attention import Heard

Span = tuple[int, int]
"""Start and end of the image in the sequence; released code has constants."""


def fastv(row: Tensor, span: Span, k: int) -> Tensor:
    """The k largest of the last row's image columns, sorted."""
    return row[slice(*span)].topk(k).indices.sort().values


def fastv_attending(heard: Heard, span: Span, k: int) -> Tensor:
    """The layer runs eagerly; its whole map is averaged over the heads, for the last row."""
    attention = heard.whole()
    (attention @ heard.value).transpose(1, 2).contiguous()  # the layer's output
    return fastv(attention.mean(1)[0][-1], span, k)


def pyramiddrop(rows: Tensor, span: Span, k: int) -> Tensor:
    """The mean over the single row, and the k largest, sorted."""
    return rows[:, slice(*span)].mean(0).topk(k).indices.sort().values


def v2drop(state: LayerState, span: Span, k: int) -> Tensor:
    """Gathers candidates before and after the layer, and takes the norm of their difference."""
    candidates = torch.arange(*span)
    now = state.hidden[None][:, candidates]
    before = state.recorded[state.layer - 1, "input"][None][:, candidates]
    change = torch.norm(now - before, p=2, dim=-1)[0]
    return change.topk(k).indices.sort().values


def sparsevlm_raters(state: LayerState, span: Span) -> Tensor:
    """Places of the text tokens above the mean of a softmax of products."""
    start, end = span
    embeds = state.recorded[0, "input"]
    share = (embeds[start:end] @ embeds[end:].T).softmax(1).mean(0)
    return torch.where(share > share.mean())[0] + end


def sparsevlm(rows: Tensor, raters: Tensor, state: LayerState, span: Span, k: int) -> Tensor:
    """Masks of kept and pruned tokens, and density peaks of the best pruned ones from the
    difference vectors of all pairs; returns the image's new tokens.

    `rows` is (r, s); `raters` selects those that count.
    """
    start, end = span
    score = rows[raters][:, start:end].mean(0)
    stays = torch.zeros_like(score, dtype=torch.bool)
    stays[score.topk(min(k, len(score) - 1)).indices] = True
    policy = torch.ones(len(state.image))
    policy[start:end] = stays.float()
    pruned = state.hidden[torch.where(policy == 0)[0]]
    of_pruned = score[torch.where(~stays)[0]]
    best = pruned[of_pruned.topk(int(len(pruned) * 0.3) + 1).indices]
    merged = _clustered(best, len(best) // 10 + 1)
    kept, number = state.hidden[torch.where(policy == 1)[0]], int(stays.sum())
    joined = torch.cat([kept[: start + number], merged, kept[start + number :]])
    return joined[start : start + number + len(merged)]


def _clustered(x: Tensor, clusters: int) -> Tensor:
    t, width = x.shape
    distance = (x[:, None] - x[None]).norm(dim=-1, p=2) / width**0.5
    near = distance.topk(clusters, largest=False).values
    density = (-near.square().mean(-1)).exp()
    density = density + torch.rand(t) * 1e-6
    denser = (density[None] > density[:, None]).to(x.dtype)
    reach = (distance * denser + distance.max() * (1 - denser)).min(-1).values
    centres = (reach * density).topk(clusters).indices
    joins = distance[centres].argmin(0)
    joins[centres] = torch.arange(clusters)
    size = x.new_zeros(clusters, 1).index_add_(0, joins, x.new_ones(t, 1)) + 1e-6
    return x.new_zeros(clusters, width).index_add_(0, joins, x / size[joins])


def sparsevlm_rows(heard: Heard) -> Tensor:
    """(s, s) besides its attention, a softmax of all logits with a new mask, averaged over
    heads."""
    length = heard.query.shape[2]
    bias = torch.zeros(length, length)
    bias.masked_fill_(torch.ones(length, length, dtype=torch.bool).tril().logical_not(), -torch.inf)
    logits = heard.query @ heard.key.transpose(2, 3) * heard.query.shape[3] ** -0.5
    logits += bias
    return logits.softmax(-1).mean(1)[0]


def transition(before: Tensor, after: Tensor) -> Tensor:
    """(s,) from copies: two norms, a cosine, and a normalised exponential."""
    before, after = before.clone(), after.clone()
    ratio = after.norm(dim=-1) / before.norm(dim=-1)
    turned = (1 - cosine_similarity(before, after, dim=-1)).exp()
    return ratio * (turned / turned.sum())


def transprune(
    weights: Sequence[Tensor], rows: Tensor, span: Span, k: int
) -> tuple[Tensor, list[Tensor]]:
    """Accumulated weights of the layers so far, and the mean of the text's rows, each normalised;
    returns the image's k best, and the kept tokens' weights."""
    start, end = span
    variation = torch.zeros(end - start)
    for weight in weights:
        variation += weight[start:end]
    guided = rows[:, start:end].mean(0)
    score = variation / (variation.sum() + 1e-8) + guided / (guided.sum() + 1e-8)
    chosen = score.topk(k).indices.sort().values
    kept = [torch.cat([w[:start], w[chosen + start], w[end:]]) for w in weights]
    return chosen, kept


def dart(state: LayerState, k: int) -> Tensor:
    """For each pivot, its cosines to the remaining tokens, and the lowest of these."""
    vision, text = state.vision, state.text.nonzero().squeeze(1)
    norms = state.recorded[1, "keys"].abs().sum(1)
    states = state.recorded[1, "normed"]
    mine = vision[norms[vision].topk(4).indices]
    kept, each = set(mine.tolist()), (k - 4) // 8
    for pivot in [*mine.tolist(), *text[norms[text].topk(4).indices].tolist()]:
        left = torch.tensor([i for i in vision.tolist() if i not in kept])
        alike = cosine_similarity(states[left], states[pivot][None], dim=1)
        kept |= {*left[alike.topk(each, largest=False).indices].tolist()}
    return torch.tensor(sorted(kept)) - vision[0]
