# SPDX-License-Identifier: Apache-2.0
"""Readable definitions: slow versions that the tests compare the fast functions with.

They have the same arguments and results, loop over tokens with plain numbers, and choose
by comparing (value, index) pairs.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional as F

# Tolerances, repeated so that a wrong one in a fast function does not carry over to its twin.
EQUAL, SPENT = 1e-6, 1e-9  # of coverage
TIED = 5e-7  # of density peaks
SAME = 1e-9  # of the determinantal process


def cosines(features: Tensor) -> Tensor:
    """(n, n) cosine similarities of all pairs of rows, the matrix that the fast functions avoid."""
    wide = features if features.dtype == torch.float64 else features.float()
    rows = wide / wide.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return rows @ rows.T


def max_sum(features: Tensor, k: int, pivot: int = 0) -> Tensor:
    """Twin of `greedy.max_sum`: recomputes every sum over all chosen tokens."""
    similarity = cosines(features).tolist()
    chosen = [pivot]
    while len(chosen) < k:
        rest = [v for v in range(len(similarity)) if v not in chosen]
        chosen.append(min(rest, key=lambda v: (sum(similarity[c][v] for c in chosen), v)))
    return torch.tensor(chosen, device=features.device)


def farthest_first(features: Tensor, k: int, pivot: int = 0) -> Tensor:
    """Twin of `greedy.farthest_first`: searches the nearest chosen token in every step."""
    similarity = cosines(features).tolist()
    chosen = [pivot]
    while len(chosen) < k:
        rest = [v for v in range(len(similarity)) if v not in chosen]
        chosen.append(min(rest, key=lambda v: (max(similarity[c][v] for c in chosen), v)))
    return torch.tensor(chosen, device=features.device)


def most_isolated(features: Tensor) -> Tensor:
    """Twin of `greedy.most_isolated`."""
    similarity = cosines(features).tolist()
    n = len(similarity)
    nearest = [max([similarity[v][w] for w in range(n) if w != v], default=-1.0) for v in range(n)]
    return torch.tensor(min(range(n), key=lambda v: (nearest[v], v)), device=features.device)


def max_min(features: Tensor, k: int) -> Tensor:
    """Twin of `greedy.max_min`."""
    return farthest_first(features, k, int(most_isolated(features)))


def top_k(scores: Tensor, k: int) -> Tensor:
    """Twin of `ranking.top_k`."""
    values = scores.tolist()
    ranked = sorted(range(len(values)), key=lambda i: (-values[i], i))
    return torch.tensor(ranked[:k], dtype=torch.long, device=scores.device)


def pool_plane(features: Tensor, grid: Tensor, cells: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Twin of `pooling.pool_grid` with kernel "mean" on one plane, divided into the given cells.

    Args:
        features: (n, d) tokens.
        grid: (n, 2) 0-based row and column of each token.
        cells: rows and columns of cells.
    """
    places = [(int(y), int(x)) for y, x in grid.tolist()]
    rows = max(y for y, _ in places) + 1
    cols = max(x for _, x in places) + 1
    height, width = Fraction(rows, cells[0]), Fraction(cols, cells[1])
    half = Fraction(1, 2)
    found: dict[int, Tensor] = {}
    for i in range(cells[0]):
        for j in range(cells[1]):
            inside = [
                t
                for t, (y, x) in enumerate(places)
                if i * height <= y + half < (i + 1) * height
                and j * width <= x + half < (j + 1) * width
            ]
            if not inside:
                continue
            distance = {
                t: (places[t][0] + half - (i + half) * height) ** 2
                + (places[t][1] + half - (j + half) * width) ** 2
                for t in inside
            }
            anchor = min(inside, key=lambda t: (distance[t], t))
            found[anchor] = features[inside].double().mean(0)
    indices = sorted(found)
    contents = torch.stack([found[t] for t in indices]).to(features.dtype)
    return torch.tensor(indices, device=features.device), contents


def resize_plane(features: Tensor, rows: int, cols: int, cells: tuple[int, int]) -> Tensor:
    """Twin of `pooling.pool_grid` with kernel "bilinear" on one full plane in raster order."""
    plane = features.float().reshape(1, rows, cols, -1).permute(0, 3, 1, 2)
    small = F.interpolate(plane, size=cells, mode="bilinear", antialias=True)
    return small.permute(0, 2, 3, 1).reshape(cells[0] * cells[1], -1).to(features.dtype)


def coverage_greedy(
    similarity: Tensor, k: int, factor: Tensor | None = None, bonus: Tensor | None = None
) -> Tensor:
    """Twin of `coverage.coverage_greedy`: recomputes every gain from all chosen columns."""
    rows, n = similarity.tolist(), similarity.shape[1]
    chosen: list[int] = []

    def gain(j: int) -> float:
        added = sum(max(0.0, row[j] - max([0.0, *(row[c] for c in chosen)])) for row in rows)
        if added < SPENT * sum(max(0.0, row[j]) for row in rows):
            added = 0.0
        added *= 1.0 if factor is None else float(factor[j])
        return added + (0.0 if bonus is None else float(bonus[j]))

    while len(chosen) < k:
        rest = [j for j in range(n) if j not in chosen]
        gains = {j: gain(j) for j in rest}
        best = max(gains.values())
        chosen.append(min(j for j in rest if gains[j] >= best - EQUAL * abs(best)))
    return torch.tensor(chosen, dtype=torch.long, device=similarity.device)


def dpp_greedy(kernel: Tensor, k: int) -> Tensor:
    """Twin of `dpp.dpp_greedy` for a kernel of full rank: recomputes every determinant."""
    n, chosen = kernel.shape[0], list[int]()
    while len(chosen) < k:
        rest = [j for j in range(n) if j not in chosen]
        value = {j: float(torch.linalg.det(kernel[[*chosen, j]][:, [*chosen, j]])) for j in rest}
        best = max(value.values())
        chosen.append(min(j for j in rest if value[j] >= (1 - SAME) * best))
    return torch.tensor(chosen, dtype=torch.long, device=kernel.device)


def merge_into_nearest(
    contents: Tensor, metric: Tensor, kept: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Twin of `merging.merge_into_nearest`."""
    similarity, stays = cosines(metric).tolist(), kept.tolist()
    groups: dict[int, list[int]] = {i: [i] for i in stays}
    for i in range(len(similarity)):
        if i not in groups:
            groups[max(stays, key=lambda j: (similarity[i][j], -stays.index(j)))].append(i)
    rows = []
    for members in groups.values():
        shares = [1.0 if weights is None else float(weights[i]) for i in members]
        if sum(shares) == 0:
            shares = [1.0] * len(members)
        parts = [s * contents[i] for s, i in zip(shares, members, strict=True)]
        rows.append(torch.stack(parts).sum(0) / sum(shares))
    return torch.stack(rows)


def density_peaks(points: Tensor, clusters: int, neighbours: int) -> tuple[Tensor, Tensor]:
    """Twin of `density.density_peaks`."""
    n, width = points.shape
    values = points.double()
    distance = [[float((a - b).norm()) / width**0.5 for b in values] for a in values]
    density = [
        math.exp(-sum(d**2 for d in sorted(distance[i])[:neighbours]) / neighbours)
        for i in range(n)
    ]

    def denser(j: int, i: int) -> bool:
        if abs(density[j] - density[i]) <= TIED * density[i]:
            return j < i
        return density[j] > density[i]

    farthest = max(max(row) for row in distance)
    score = []
    for i in range(n):
        above = [distance[i][j] for j in range(n) if denser(j, i)]
        score.append(density[i] * (min(above) if above else farthest))
    centres: list[int] = []
    while len(centres) < clusters:
        rest = [i for i in range(n) if i not in centres]
        best = max(score[i] for i in rest)
        centres.append(min(i for i in rest if score[i] >= best * (1 - TIED)))

    def nearest(i: int) -> int:
        reach = [distance[i][c] for c in centres]
        return next(c for c, d in enumerate(reach) if d <= min(reach) * (1 + TIED))

    joins = [centres.index(i) if i in centres else nearest(i) for i in range(n)]
    device = points.device
    return torch.tensor(centres, device=device), torch.tensor(joins, device=device)


def bipartite_match(
    metric: Tensor, r: int, begins_with_a: bool = True, ranked: bool = False
) -> Tensor:
    """Twin of `bipartite.bipartite_match`."""
    similarity, n = cosines(metric).tolist(), metric.shape[0]
    a = [i for i in range(n) if (i % 2 == 0) == begins_with_a]
    b = [i for i in range(n) if i not in a]
    partner = {i: min(b, key=lambda j: (-similarity[i][j], j)) for i in a} if b else {}
    best = sorted(partner, key=lambda i: (-similarity[i][partner[i]], i))
    merged, left = best[:r], best[r:] if ranked and r else [i for i in a if i not in best[:r]]
    order = left + b
    target = [order.index(partner[i] if i in merged else i) for i in range(n)]
    return torch.tensor(target, device=metric.device)
