# SPDX-License-Identifier: Apache-2.0
"""Clustering by density peaks: centres are dense and far from anything denser."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops.coverage import EQUAL

_ROWS_AT_ONCE = 128


def density_peaks(points: Tensor, clusters: int, neighbours: int) -> tuple[Tensor, Tensor]:
    """DPC-KNN (Rodriguez and Laio, 2014; Du et al., 2016).

    The distance of two points is Euclidean, divided by the root of their width. A point's density
    is exp(-m), m the mean squared distance to its nearest points, itself among them. Its separation
    is the distance to the nearest denser point, the largest distance of all if there is none.
    Centres have the largest products of the two; every point joins the nearest centre.

    Two points that are each other's nearest are equally dense in exact arithmetic, and rounding
    must not choose between them. Densities within a share `EQUAL` count as equal, and of these the
    point with the lower index as the denser one; so do products and distances within that share of
    the largest one, of which the first is taken.

    Args:
        points: (n, d).
        clusters: centres to find, 1 <= clusters <= n.
        neighbours: nearest points that a density is taken from, the point itself among them,
            1 <= neighbours <= n.

    Returns:
        (clusters,) indices of the centres, the largest product first, ties to the lowest index; and
        (n,) for each point which of these it joins, ties to the first.

    Raises:
        ValueError: `clusters` or `neighbours` out of range, or points that are no matrix.
    """
    if points.ndim != 2:
        raise ValueError(f"points: expected shape (n, d), got {tuple(points.shape)}")
    n, width = points.shape
    for name, value in (("clusters", clusters), ("neighbours", neighbours)):
        if not 1 <= value <= n:
            raise ValueError(f"{name}: expected a whole number from 1 to the {n} points given")
    wide = points if points.dtype == torch.float64 else points.float()
    # Centred, so that less is lost where squares are subtracted.
    wide = wide - wide.mean(0)
    squares = (wide**2).sum(1)
    distance = torch.addmm(squares[None], wide, wide.T, alpha=-2)
    distance = distance.add_(squares[:, None]).clamp_min_(0).mul_(1 / width)
    distance.fill_diagonal_(0)
    # Some rows at a time, which stay in a CPU's cache.
    blocks = distance.split(_ROWS_AT_ONCE)
    near = torch.cat(
        [rows.topk(neighbours, dim=1, largest=False).values.mean(1) for rows in blocks]
    )
    density = (-near).exp()
    distance = distance.sqrt_()
    place = torch.arange(n, device=points.device)
    found = []
    for at, rows in zip(place.split(_ROWS_AT_ONCE), blocks, strict=True):
        own = density[at, None]
        alike = (density - own).abs() <= EQUAL * own
        denser = torch.where(alike, place < at[:, None], density > own)
        found.append(rows.masked_fill(~denser, torch.inf).amin(1))
    separation = torch.cat(found)
    separation = torch.where(separation.isinf(), distance.amax(), separation)
    score = density * separation
    slack = EQUAL * score.amax()
    centres = torch.empty(clusters, dtype=torch.long, device=points.device)
    for step in range(clusters):
        index = (
            (score >= score.amax(0, keepdim=True) - slack).to(torch.uint8).argmax(0, keepdim=True)
        )
        centres[step : step + 1] = index
        score = score.index_fill(0, index, -torch.inf)
    reach = distance[:, centres]
    nearest = reach.amin(1, keepdim=True) + EQUAL * distance.amax()
    joins = (reach <= nearest).to(torch.uint8).argmax(1)
    joins[centres] = torch.arange(clusters, device=points.device)
    return centres, joins
