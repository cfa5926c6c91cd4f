# SPDX-License-Identifier: Apache-2.0
"""Greedy selection among many tokens on a CPU, without most of the similarities.

A product of one row and all tokens reads all features for little arithmetic; the product of all
pairs does n / k times too much work. Here similarities are computed in blocks: of the tokens likely
to be chosen next (`smallest_sum`), or of those that still can be (`farthest`, `most_isolated`). The
selection is the same up to rounding. Reading a result costs nothing on a CPU, unlike on a GPU.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

AHEAD = 2 * 16
"""Rows of similarities per block: a multiple of BLAS's block size."""

ROOM = 16 * 2**20
"""Approximate limit of similarities computed and not used yet: 64 MiB."""

FRONT = 128
"""Minimum number of tokens compared pairwise to choose the farthest from."""

SLACK = 1e-5
"""Generous bound of the rounding error of a cosine in fp32."""


def smallest_sum(rows: Tensor, k: int, pivot: int) -> Tensor:
    """(k,) greedy selection among the unit `rows` (n, d) from `pivot` on, in order: each step adds
    the token whose similarities to all chosen ones have the smallest sum.

    A missing row of similarities is computed together with those of the next candidates, most of
    which are chosen soon after.
    """
    n, made = rows.shape[0], dict[int, np.ndarray]()
    chosen = [pivot]
    # NumPy's calls have less overhead than PyTorch's, and each handles only one row.
    running = rows.mv(rows[pivot]).numpy()
    running[pivot] = np.inf
    while len(chosen) < k:
        index = int(running.argmin())
        if index not in made:
            if len(made) * n > ROOM:
                made.clear()
            reach = min(n, AHEAD + len(made))
            ahead = np.argpartition(running, reach - 1)[:reach]
            ahead = ahead[running[ahead].argsort(kind="stable")].tolist()
            missing = [index, *(i for i in ahead if i != index and i not in made)][:AHEAD]
            # As columns, which takes two thirds of the time.
            block = np.ascontiguousarray((rows @ rows[missing].T).numpy().T)
            made.update(zip(missing, block, strict=True))
        chosen.append(index)
        running += made.pop(index)
        running[index] = np.inf  # stays infinite, so a chosen token never returns
    return torch.tensor(chosen)


def farthest(rows: Tensor, k: int, pivot: int) -> Tensor:
    """(k,) greedy selection among the unit `rows` (n, d) from `pivot` on, in order: each step adds
    the token whose largest similarity to a chosen one is smallest.

    This largest similarity only grows, so an earlier value is a lower bound. The
    front tokens are updated, compared pairwise and chosen from until a
    token behind them might be farther. Most tokens fall behind early and are not read again.
    """
    n, d = rows.shape
    front = min(max(FRONT, k // 3), n)
    wide = min(2 * front, n)
    # Allocated once: the first access to new memory is slow.
    room, taken = rows.new_empty(wide, d), rows.new_empty(k, d)
    chosen, taken[0] = [pivot], rows[pivot]
    low = rows.mv(rows[pivot]).numpy()
    low[pivot] = np.inf  # stays infinite, so a chosen token never returns
    seen = np.ones(n, dtype=np.int64)  # chosen tokens that `low` covers

    def rows_at(tokens: np.ndarray) -> Tensor:
        # Copies whole rows, while indexing with [] copies single values.
        return torch.index_select(rows, 0, torch.from_numpy(tokens), out=room[: len(tokens)])

    def bring_up_to_date(tokens: np.ndarray) -> int:
        stale = tokens[seen[tokens] < len(chosen)]
        if len(stale):
            since = taken[int(seen[stale].min()) : len(chosen)]
            low[stale] = np.maximum(low[stale], (rows_at(stale) @ since.T).amax(1).numpy())
            seen[stale] = len(chosen)
        return len(stale)

    while len(chosen) < k:
        while 2 * bring_up_to_date(np.argpartition(low, wide - 1)[:wide]) > wide:
            pass  # others may have moved to the front
        order = np.argpartition(low, min(front, n - 1))
        near, behind = np.sort(order[:front]), low[order[front:]].min(initial=np.inf)
        bring_up_to_date(near)  # with ties, these may differ from the first `wide`
        held = rows_at(near)
        pairs, running = (held @ held.T).numpy(), low[near]
        places: list[int] = []
        while len(chosen) + len(places) < k:
            place = int(running.argmin())
            if running[place] > behind:
                break
            places.append(place)
            np.maximum(running, pairs[place], out=running)
            running[place] = np.inf
        taken[len(chosen) : len(chosen) + len(places)] = held[places]
        chosen += near[places].tolist()
        low[near], seen[near] = running, len(chosen)
    return torch.tensor(chosen)


def most_isolated(rows: Tensor) -> int:
    """The token among the unit `rows` (n, d) whose most similar other token is least similar to it.

    Similarities to some tokens bound the nearest one from below; a token whose bound exceeds
    another token's exact value is out. More and more tokens raise the bounds of the remaining ones,
    and the lowest bounds are replaced by exact values.
    """
    n = rows.shape[0]
    apart = max(1, n // AHEAD)
    order = torch.cat([torch.arange(start, n, apart) for start in range(apart)])
    nearest, bound = rows.new_full((n,), torch.inf), rows.new_full((n,), -torch.inf)
    left, held, place, done = torch.arange(n), rows, torch.arange(n), 0

    def find_nearest(tokens: Tensor) -> None:
        block = rows.index_select(0, tokens) @ rows.T
        block[torch.arange(len(tokens)), tokens] = -torch.inf  # itself
        nearest[tokens] = block.amax(1)
        torch.maximum(bound, block.amax(0), out=bound)
        bound[tokens] = torch.inf  # their exact values are known

    while True:
        # Equal work per step: fewer tokens are compared with more others. If few drop out, as
        # among copies, small steps only cost time.
        count = AHEAD * (n // len(left))
        others = order[done : done + (count if 8 * done < n else max(count, 512))]
        done += len(others)
        block = held @ rows.index_select(0, others).T
        own = place[others]
        block[own[own >= 0], (own >= 0).nonzero()[:, 0]] = -torch.inf
        bound[left] = torch.maximum(bound[left], block.amax(1))
        find_nearest(left[bound[left].topk(min(AHEAD // 8 + 1, len(left)), largest=False).indices])
        alive = (bound[left] <= nearest.min() + SLACK) & (nearest[left] == torch.inf)
        some = left[alive]
        if done >= n:
            nearest[some] = bound[some]  # now over all others
            return int(nearest.argmin())
        if len(some) <= AHEAD:
            if len(some):
                find_nearest(some)
            return int(nearest.argmin())
        if 5 * len(some) < 4 * len(left):
            left, held = some, rows.index_select(0, some)
            place = torch.full((n,), -1)
            place[left] = torch.arange(len(left))
