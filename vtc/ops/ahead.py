# SPDX-License-Identifier: Apache-2.0
"""Greedy choice on a CPU: rows of similarities are made some at a time, for tokens next in line.

A product of one row and all tokens reads all features for little arithmetic; the product of all
pairs does n / k times too much. When a row is missing it is therefore made together with those of
the tokens that are next in line, most of which are chosen soon after. What is chosen is the same up
to rounding; looking at a result costs nothing on a CPU, unlike on a GPU.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

AHEAD = 4 * 16
"""Rows of similarities that are made at a time: a multiple of what BLAS makes at once."""

SAMPLE: int = 256
"""Tokens to which similarities bound how near the nearest of each token is."""

SEARCHED: int = 160
"""Tokens whose bounds are made exact at a time."""

SLACK = 1e-5
"""What rounding may add to a cosine in fp32, generously."""


def greedy_ahead(
    rows: Tensor,
    k: int,
    pivot: int,
    combine: np.ufunc,
    made: dict[int, np.ndarray] | None = None,
) -> Tensor:
    """(k,) greedy choice among the unit `rows` (n, d) from `pivot` on, in order.

    Args:
        combine: of the running values (n,) and the similarities to the token just chosen, add or
            maximum.
        made: rows of similarities that are there already, by token.
    """
    n, made = rows.shape[0], made or {}
    chosen = [pivot]
    # NumPy's calls cost less than PyTorch's, and here each is for one row.
    running = rows.mv(rows[pivot]).numpy()
    running[pivot] = np.inf
    while len(chosen) < k:
        index = int(running.argmin())
        if index not in made:
            reach = min(n, AHEAD + len(made))
            ahead = np.argpartition(running, reach - 1)[:reach]
            ahead = ahead[running[ahead].argsort(kind="stable")].tolist()
            missing = [index, *(i for i in ahead if i != index and i not in made)][:AHEAD]
            # As columns, which takes two thirds of the time that rows take.
            block = np.ascontiguousarray((rows @ rows[missing].T).numpy().T)
            made.update(zip(missing, block, strict=True))
        chosen.append(index)
        # Infinity stays infinity under + and max, so a chosen token never returns.
        combine(running, made.pop(index), out=running)
        running[index] = np.inf
    return torch.tensor(chosen)


def search_isolated(rows: Tensor) -> tuple[int, dict[int, np.ndarray]]:
    """The most isolated of the unit `rows` (n, d), without most of the pairs: a token that has come
    near some other is out.

    Similarities to a few tokens bound the nearest from below; exact ones are made for those with
    the lowest bounds, and bound all others in turn. Ends when no bound is below the best.

    Returns:
        The index, and the rows of similarities made on the way, -inf to itself.
    """
    n = rows.shape[0]
    made: dict[int, np.ndarray] = {}
    some = torch.arange(0, n, max(1, n // SAMPLE))
    block = rows @ rows[some].T
    block[some, torch.arange(len(some))] = -torch.inf
    bound, nearest = block.amax(1), rows.new_full((n,), torch.inf)
    best = torch.inf
    while True:
        low, index = bound.topk(min(SEARCHED, n), largest=False)
        index = index[low <= best + SLACK]
        if not len(index):
            return int(nearest.argmin()), made
        block = rows[index] @ rows.T
        block[torch.arange(len(index)), index] = -torch.inf
        made.update(zip(index.tolist(), block.numpy(), strict=True))
        nearest[index] = block.amax(1)
        bound = torch.maximum(bound, block.amax(0))
        bound[nearest < torch.inf] = torch.inf
        best = float(nearest.min())
