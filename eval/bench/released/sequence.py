# SPDX-License-Identifier: Apache-2.0
"""Released code of methods that select before the language model, reimplemented."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtc.core import VisionTokens


def divprune(tokens: VisionTokens, k: int) -> Tensor:
    """All distances; each step recomputes the minimum over the chosen."""
    rows = normalize(tokens.features.float(), dim=1)
    distance = 1.0 - rows @ rows.T
    chosen = torch.empty(k, dtype=torch.long)
    for step in range(k):
        if step == 0:
            nearest = distance.topk(2, dim=0, largest=False).values[1]
        else:
            nearest = distance[chosen[:step]].amin(0)
        chosen[step] = nearest.argmax()
    return chosen.sort().values


def cdpruner(tokens: VisionTokens, k: int) -> Tensor:
    """A kernel of all pairs, and a Cholesky step over all tokens per choice."""
    assert tokens.text is not None
    rows = normalize(tokens.features.float(), dim=1)
    found = (rows @ normalize(tokens.text.float(), dim=1).T).mean(1)
    weight = (found - found.min() + 1e-6) / (found.max() - found.min())
    kernel = weight[:, None] * (rows @ rows.T) * weight
    left, columns = kernel.diagonal().clone(), rows.new_zeros(k, len(rows))
    chosen = torch.empty(k, dtype=torch.long)
    for step in range(k):
        index = left.argmax()
        chosen[step] = index
        spanned = columns[:step, index] @ columns[:step]
        columns[step] = (kernel[index] - spanned) / left[index].sqrt()
        left -= columns[step].square()
        left[index] = -torch.inf
    return chosen.sort().values


def visionzip(tokens: VisionTokens, k: int) -> Tensor:
    """Contextual tokens by a one-hot product; copies all remaining patches."""
    assert tokens.cls_attention is not None
    assert tokens.keys is not None
    assert tokens.encoder is not None
    assert tokens.project is not None
    contextual = round(k * 10 / 64)
    n, dominant = len(tokens), tokens.cls_attention.topk(k - contextual - 1).indices
    free = torch.ones(n, dtype=torch.bool).index_fill_(0, dominant, False)
    metric = normalize(tokens.keys.view(n, tokens.heads, -1).float().mean(1)[free], dim=1)
    states = tokens.encoder[free].float()
    target = torch.arange(0, len(states), max(1, len(states) // contextual))[:contextual]
    others = torch.ones(len(states), dtype=torch.bool).index_fill_(0, target, False)
    similarity = metric[others] @ metric[target].T
    member = torch.zeros_like(similarity).scatter_(1, similarity.argmax(1, keepdim=True), 1)
    mean = member.T @ states[others] / member.sum(0).clamp_min(1)[:, None]
    merged = states[target] + mean
    kept = tokens.encoder[dominant.sort().values]
    tokens.project(torch.cat([tokens.encoder[:1], kept, merged.to(kept.dtype)]))
    return dominant.sort().values


def vispruner(tokens: VisionTokens, k: int) -> Tensor:
    """Each step recomputes all similarities between the two halves of the rest."""
    assert tokens.cls_attention is not None
    assert tokens.encoder is not None
    ranked = tokens.cls_attention.argsort(descending=True)
    first = k // 2
    rows, left = normalize(tokens.encoder.float(), dim=1), ranked[first:]
    while len(left) > k - first:
        a, b = left[::2], left[1::2]
        double = (rows[a] @ rows[b].T).amax(1)
        gone = min(8, len(left) - (k - first))
        left = torch.cat([a[double.argsort(descending=True)[gone:]], b])
    return torch.cat([ranked[:first], left]).sort().values


def _covering(similarity: Tensor, k: int, factor: Tensor | float = 1.0) -> Tensor:
    """Facility location; each step recomputes all gains from all similarities."""
    covered = similarity.new_zeros(len(similarity), 1)
    barred = torch.zeros(similarity.shape[1], dtype=torch.bool)
    for _ in range(k):
        gain = (similarity - covered).clamp_min(0).sum(0) * factor
        index = gain.masked_fill(barred, -torch.inf).argmax()
        barred[index] = True
        covered = torch.maximum(covered, similarity[:, index, None])
    return barred.nonzero().squeeze(1)


def scope(tokens: VisionTokens, k: int) -> Tensor:
    """Coverage weighted by attention."""
    assert tokens.cls_attention is not None
    assert tokens.encoder is not None
    rows = normalize(tokens.encoder.float(), dim=1)
    return _covering(rows @ rows.T, k, tokens.cls_attention)


def mmtok(tokens: VisionTokens, k: int) -> Tensor:
    """Coverage of the text's and the image's softmax."""
    assert tokens.text is not None
    assert tokens.encoder is not None
    states, rows = (normalize(x.float(), dim=1) for x in (tokens.encoder, tokens.features))
    text = (normalize(tokens.text.float(), dim=1) @ rows.T / 0.02).softmax(1) / len(tokens.text)
    image = (states @ states.T / 0.2).softmax(1) / len(rows)
    return _covering(torch.cat([text, 0.5 * image]), k)


def holov(tokens: VisionTokens, k: int) -> Tensor:
    """A variance of cosines per part gives its fraction of the budget; then the best of each
    part."""
    assert tokens.cls_attention is not None
    n, scores = len(tokens), []
    parts = torch.tensor_split(torch.arange(n), max(1, 16 * n // (9 * k)))
    for part in parts:
        rows = normalize(tokens.features[part].float(), dim=1)
        similarity = (rows @ rows.T).fill_diagonal_(0)
        mean = similarity.sum(1, keepdim=True) / (len(part) - 1)
        variance = (similarity - mean).square().sum(1) / (len(part) - 1)
        own = 1e3 * tokens.cls_attention[part]
        share = own.abs().mean() / (variance.abs().mean() + 1e-6)
        scores.append((own + 0.09 * variance * share).mean())
    weight = torch.stack(scores) / torch.stack(scores).sum()
    quota = (weight * k).floor().long()
    quota[weight.argsort(descending=True)[: k - int(quota.sum())]] += 1
    chosen = [
        part[tokens.cls_attention[part].topk(min(int(q), len(part))).indices]
        for part, q in zip(parts, quota, strict=True)
    ]
    return torch.cat(chosen)


def _prumerged(tokens: VisionTokens, attention: Tensor, kept: Tensor) -> Tensor:
    assert tokens.keys is not None
    assert tokens.encoder is not None
    assert tokens.project is not None
    rows, states = normalize(tokens.keys.float(), dim=1), tokens.encoder.float()
    made = []
    for index in kept:
        alike = rows @ rows[index]
        alike[index] = -torch.inf
        near = alike.topk(min(32, len(rows) - 1)).indices
        made.append(states[index] + attention[near] @ states[near])
    rest = torch.ones(len(tokens), dtype=torch.bool).index_fill_(0, kept, False)
    return tokens.project(torch.stack([*made, attention[rest] @ states[rest]]))


def _of_cls(tokens: VisionTokens) -> Tensor:
    """(n,) attention of one head, computed for the [CLS] row only."""
    assert tokens.keys is not None
    assert tokens.cls_query is not None
    assert tokens.cls_key is not None
    every = torch.cat([tokens.cls_key[None], tokens.keys])
    return (tokens.cls_query @ every.T / every.shape[1] ** 0.5).softmax(0)[1:]


def prumerge(tokens: VisionTokens, k: int) -> Tensor:
    """For each kept patch, one after the other, the attention-weighted sum of its neighbours."""
    attention = _of_cls(tokens)
    return _prumerged(tokens, attention, attention.topk(k - 1).indices)


def prumerge_plus(tokens: VisionTokens, k: int) -> Tensor:
    """The same, with half of the patches on an even grid, so that some may be kept twice."""
    attention, even = _of_cls(tokens), (k - 1) // 2
    step = len(tokens) // even
    grid = torch.arange(step // 2, len(tokens), step)[:even]
    kept = torch.cat([attention.topk(k - 1 - even).indices, grid])
    _prumerged(tokens, attention, kept)
    return kept


def vscan(tokens: VisionTokens, k: int) -> Tensor:
    """The best of each of 4 x 4 windows of the early map, then of the rest by the late one; dropped
    tokens are averaged into the most similar kept token."""
    assert tokens.cls_attention is not None
    assert tokens.low_attention is not None
    rows, columns = (int(x) + 1 for x in tokens.places("vscan", "has windows")[-1, 1:])
    parts = rows // 4, columns // 4
    place = torch.arange(rows * columns).view(4, parts[0], 4, parts[1]).transpose(1, 2).flatten(2)
    place = place.reshape(16, -1)
    best = tokens.low_attention[place].topk(k // 2 // 16, dim=1).indices
    stays = torch.zeros(len(tokens), dtype=torch.bool)
    stays[place.gather(1, best).flatten()] = True
    late = tokens.cls_attention.clone()
    late[stays] = 0
    stays[late.topk(k - int(stays.sum())).indices] = True
    kept, gone = tokens.features[stays], tokens.features[~stays]
    alike = normalize(gone, dim=-1) @ normalize(kept, dim=-1).T
    into = alike.argmax(1)
    summed = torch.zeros_like(kept).scatter_add_(0, into[:, None].expand_as(gone), gone)
    number = torch.zeros(len(kept)).scatter_add_(0, into, torch.ones(len(gone)))
    return (kept + summed) / (1 + number)[:, None]


SEQUENCE: dict[str, Callable[[VisionTokens, int], Tensor]] = {
    "divprune": divprune,
    "cdpruner": cdpruner,
    "visionzip": visionzip,
    "vispruner": vispruner,
    "scope": scope,
    "mmtok": mmtok,
    "holov": holov,
    "prumerge": prumerge,
    "prumerge_plus": prumerge_plus,
    "vscan": vscan,
}
