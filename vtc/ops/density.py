# SPDX-License-Identifier: Apache-2.0
"""Clustering by density peaks: centres are dense and far from anything denser."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops.coverage import EQUAL


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
    distance = (squares[:, None] + squares - 2 * wide @ wide.T).clamp_min(0) / width
    distance.fill_diagonal_(0)
    near = distance.topk(neighbours, dim=1, largest=False).values
    density = (-near.mean(1)).exp()
    distance = distance.sqrt()
    gap = density - density[:, None]
    place = torch.arange(n, device=points.device)
    alike = gap.abs() <= EQUAL * density[:, None]
    denser = torch.where(alike, place < place[:, None], gap > 0)
    separation = distance.masked_fill(~denser, torch.inf).amin(1)
    separation = torch.where(denser.any(1), separation, distance.amax())
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
