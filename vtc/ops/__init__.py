# SPDX-License-Identifier: Apache-2.0
"""Pure tensor functions shared by methods. `naive` has a slow, readable version of each."""

from __future__ import annotations

from vtc.ops.bipartite import bipartite_match
from vtc.ops.coverage import coverage_greedy
from vtc.ops.density import density_peaks
from vtc.ops.dpp import dpp_greedy
from vtc.ops.greedy import farthest_first, max_min, max_sum, most_isolated
from vtc.ops.merging import merge_into_nearest
from vtc.ops.pooling import Kernel, cell_grid, pool_grid
from vtc.ops.ranking import top_k
from vtc.ops.similarity import unit_rows

__all__ = [
    "Kernel",
    "bipartite_match",
    "cell_grid",
    "coverage_greedy",
    "density_peaks",
    "dpp_greedy",
    "farthest_first",
    "max_min",
    "max_sum",
    "merge_into_nearest",
    "most_isolated",
    "pool_grid",
    "top_k",
    "unit_rows",
]
