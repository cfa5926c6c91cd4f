# SPDX-License-Identifier: Apache-2.0
"""How long methods take to choose, beside the algorithms of their released code, stated anew.

    python -m vtc.eval.bench_ops --official --threads 1

Each function does, with the same products in the same precision and the same loops, what the
method's released code does to the same tensors, and returns which tokens it keeps. They are for
timing: where that code has a defect (DivPrune and CDPruner do not bar chosen tokens), so have they.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

import vtc
from vtc.methods.base import LayerState, Method, VisionTokens


def divprune(tokens: VisionTokens, k: int) -> Tensor:
    """All distances; the minimum over those chosen is taken anew at each step."""
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
    """A kernel of all pairs, and a step of Cholesky over all tokens for each choice."""
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
    """Contextual tokens by a one-hot product; all of the patches that are left are copied."""
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
    """All similarities of the two halves of what is left are made anew at each step."""
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
    """Facility location; every gain is taken anew from all similarities at each step."""
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
    """A variance of cosines for each part, a share of the budget, and the best of each part."""
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


def prumerge(tokens: VisionTokens, k: int) -> Tensor:
    """For each kept patch in turn its neighbours among all others, added by attention."""
    assert tokens.cls_attention is not None
    assert tokens.keys is not None
    assert tokens.encoder is not None
    rows, attention = normalize(tokens.keys.float(), dim=1), tokens.cls_attention
    kept, states = attention.topk(k - 1).indices, tokens.encoder.float()
    made = []
    for index in kept:
        alike = rows @ rows[index]
        alike[index] = -torch.inf
        near = alike.topk(32).indices
        made.append(states[index] + attention[near] @ states[near])
    rest = torch.ones(len(tokens), dtype=torch.bool).index_fill_(0, kept, False)
    torch.stack([*made, attention[rest] @ states[rest]])
    return kept.sort().values


def dart(state: LayerState, k: int) -> Tensor:
    """For each pivot the cosines to all that is left, and the lowest of them."""
    vision, text = state.vision, state.text.nonzero().squeeze(1)
    norms = state.recorded[1, "keys"].abs().sum(1)
    states = state.recorded[1, "normed"]
    mine = vision[norms[vision].topk(4).indices]
    kept, each = set(mine.tolist()), (k - 4) // 8
    for pivot in [*mine.tolist(), *text[norms[text].topk(4).indices].tolist()]:
        left = torch.tensor([i for i in vision.tolist() if i not in kept])
        alike = torch.nn.functional.cosine_similarity(states[left], states[pivot][None], dim=1)
        kept |= {*left[alike.topk(each, largest=False).indices].tolist()}
    return torch.tensor(sorted(kept)) - vision[0]


SEQUENCE: dict[str, Callable[[VisionTokens, int], Tensor]] = {
    "divprune": divprune,
    "cdpruner": cdpruner,
    "visionzip": visionzip,
    "vispruner": vispruner,
    "scope": scope,
    "mmtok": mmtok,
    "holov": holov,
    "prumerge": prumerge,
}


def tokens_of(n: int, d: int, seed: int = 0) -> VisionTokens:
    """Random tokens of one image, with all that a method may ask for."""
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
        heads=16,
        cls_query=query,
        cls_key=draw(d),
        encoder=draw(n, d) + draw(d),
        encoder_cls=draw(d),
        project=lambda states: states @ weight,
    )


def state_of(n: int, d: int, seed: int = 0) -> LayerState:
    """A random sample before decoder layer 2: 16 words, an image, 48 words."""
    generator = torch.Generator().manual_seed(seed)
    length = n + 64
    image = torch.full((length,), -1)
    image[16 : 16 + n] = 0
    text = torch.arange(length) >= 16 + n
    hidden, keys = (torch.randn(length, d, generator=generator) for _ in range(2))
    return LayerState(
        layer=2,
        num_layers=32,
        hidden=hidden,
        image=image,
        text=text,
        grid=torch.zeros(length, 3, dtype=torch.long),
        prompt_length=length,
        original=(n,),
        attention={},
        recorded={(1, "keys"): keys, (1, "normed"): hidden},
    )


def pairs(n: int, k: int, d: int) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """For each method, vtc's choice and that of the released code, on the same tensors."""
    tokens, state = tokens_of(n, d), state_of(n, d)

    def pair(name: str) -> tuple[Callable[[], object], Callable[[], object]]:
        method: Method = vtc.make(name, keep=k)
        return lambda: method.select(tokens), lambda: SEQUENCE[name](tokens, k)

    found = {name: pair(name) for name in SEQUENCE}
    method = vtc.DART(keep=k)
    found["dart"] = lambda: method.prune(state), lambda: dart(state, k)
    return found


def measure(n: int, k: int, d: int, repeats: int) -> dict[str, tuple[float, float, float]]:
    """Medians of vtc's and the released code's milliseconds, and of the quotients of pairs.

    Times are of the process, not of the clock, so that what else runs on the machine counts less;
    the two take turns.
    """
    found = {}
    with torch.no_grad():
        for name, runs in pairs(n, k, d).items():
            taken: list[list[float]] = [[], []]
            for turn in range(repeats + 1):
                for times, run in zip(taken, runs, strict=True):
                    since = time.process_time()
                    run()
                    if turn:
                        times.append((time.process_time() - since) * 1e3)
            ratios = [theirs / ours for ours, theirs in zip(*taken, strict=True)]
            ours, theirs = map(statistics.median, taken)
            found[name] = ours, theirs, statistics.median(ratios)
    return found
