# SPDX-License-Identifier: Apache-2.0
"""Greedy selection of a set with a large determinant: relevant, dissimilar tokens."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vtc.ops.batch import check_count, check_shape, rows_at, times, together
from vtc.ops.greedy import PLAINLY

SAME = 1e-9
"""Gains within this fraction of the best count as equal: they differ only by rounding."""

_ROUNDING = 1e-13
"""Bound of the rounding error of a gain, as a fraction of its first value."""

SPANNED = 1e-10
"""A gain below this fraction of the token's first gain is 0: the chosen tokens span it."""

_FRONT = 192
"""Number of next candidates with all pairs computed, so that choosing among them is cheap."""

_AT_ONCE = 1024
"""Tokens updated at a time: products of fewer rows take nearly as long."""

_IN_BLOCKS_FROM = 250
"""Number of tokens from which a CPU works in blocks (`_Blocks`)."""


def dpp_greedy(rows: Tensor, k: int) -> Tensor:
    """Greedy MAP of a determinantal point process (Chen et al., 2018).

    Repeatedly adds the token that most increases the determinant of the chosen tokens' kernel: the
    one with the largest remainder of its row after projecting out the chosen rows. Once the rank is
    exhausted, all remaining tokens tie and the lowest index wins; no token is chosen twice. The
    kernel, rows @ rows.T, is never computed. Everything is in fp64: rounding is then far below any
    difference of tokens in half or single precision, so that only equal tokens tie.

    Args:
        rows: (n, d) rows whose inner products are the kernel, or (b, n, d) for b images: unit rows
            give cosines, unit rows times weights a weighted kernel.
        k: how many of the n to choose, 0 <= k <= n.

    Returns:
        (k,) or (b, k) indices in order of selection, ties to the lowest index.

    Raises:
        ArgumentError: `k` out of range, or rows of another shape.
    """
    check_shape("rows", rows, "n", "d")
    n = rows.shape[-2]
    check_count("k", k, 0, n)
    many = rows.device.type == "cpu" and n >= _IN_BLOCKS_FROM and not PLAINLY.get()
    if rows.ndim > 2 and (many or not together(rows)):
        return torch.stack([dpp_greedy(one, k) for one in rows])
    wide = rows.detach().double()
    return torch.from_numpy(_Blocks(wide.numpy()).choose(k)) if many else _in_steps(wide, k)


def _in_steps(rows: Tensor, k: int) -> Tensor:
    """One step of a Cholesky factorisation per choice, without waiting for the device."""
    first = rows.square().sum(-1)
    left = first.clone()
    chosen = torch.empty(*left.shape[:-1], k, dtype=torch.long, device=rows.device)
    columns = rows.new_zeros(*left.shape, k)
    for step in range(k):
        left = torch.where(left <= SPANNED * first, 0.0, left)
        left.scatter_(-1, chosen[..., :step], -torch.inf)
        least = left.amax(-1, keepdim=True) * (1 - SAME)
        # argmax of booleans is the first true one: the tie rule.
        index = (left + _ROUNDING * first >= least).to(torch.uint8).argmax(-1, keepdim=True)
        chosen[..., step : step + 1] = index
        before = columns[..., :step]
        spanned = times(before, rows_at(before, index).squeeze(-2))
        inner = times(rows, rows_at(rows, index).squeeze(-2))
        gain = left.gather(-1, index)
        column = torch.where(gain > 0, (inner - spanned) / gain.sqrt(), 0.0)
        columns[..., step] = column
        left = left - column.square()
    return chosen


def _times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Matrix product by PyTorch: the threads of NumPy's BLAS busy-wait, and with PyTorch's threads
    each product would take several times as long."""
    return (torch.from_numpy(a) @ torch.from_numpy(b)).numpy()


class _Blocks:
    """The same on a CPU for many tokens: gains only fall as tokens are chosen, so an old gain
    bounds the current one, and only candidates for the best are updated.

    The next candidates (the front) are updated with all their pairs: their part
    of the kernel with the chosen tokens projected out. Tokens are chosen from it alone until one
    outside the front could be as good. Everything else is matrix products, few of them over all
    tokens.

    Attributes:
        left: (n,) gains, possibly outdated; -inf for chosen tokens.
        known: (n,) number of chosen tokens for which `columns` is filled.
        columns: (n, k) rows of the Cholesky factor.
        chosen: indices in order of selection.
    """

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows
        self.first = np.einsum("ij,ij->i", rows, rows)
        self.left = self.first.copy()
        self.known = np.zeros(len(rows), dtype=np.int64)
        self.chosen: list[int] = []

    def choose(self, k: int) -> np.ndarray:
        """(k,) indices in order of selection."""
        self.columns = np.empty((len(self.rows), k))
        while len(self.chosen) < k:
            front = self._front()
            if self.left[front[0]] <= 0:
                rest = np.flatnonzero(self.left > -np.inf)
                self.chosen += rest[: k - len(self.chosen)].tolist()
                break
            self._choose_in(front, k)
        return np.array(self.chosen, dtype=np.int64)

    def _front(self) -> np.ndarray:
        """Tokens with the largest gains, all current; the first is the next choice."""
        size = min(_FRONT, len(self.left) - len(self.chosen))
        while True:
            near = np.argpartition(-self.left, size - 1)[:size]
            best = self.left[near].max()
            # Every candidate for the best, or for a tie with it, must be current.
            tied = np.flatnonzero(self._reaches(self.left, best))
            either = np.union1d(near, tied)
            old = either[self.known[either] < len(self.chosen)]
            if not len(old):
                return np.concatenate([tied[:1], near[near != tied[0]]])
            if len(old) > 1:
                more = np.argpartition(-self.left, min(_AT_ONCE, len(self.left)) - 1)[:_AT_ONCE]
                more = more[(self.known[more] < len(self.chosen)) & (self.left[more] > -np.inf)]
                old = np.union1d(old, more)
            self._update(old)

    def _reaches(
        self, left: np.ndarray, best: float, index: np.ndarray | None = None
    ) -> np.ndarray:
        """Whether gains equal the best up to rounding."""
        first = self.first if index is None else self.first[index]
        return left + _ROUNDING * first >= best * (1 - SAME)

    def _update(self, old: np.ndarray) -> None:
        """Update the tokens `old` with all chosen ones."""
        now = len(self.chosen)
        for since in np.unique(self.known[old]):
            some = old[self.known[old] == since]
            new = np.array(self.chosen[since:now])
            if 2 * len(some) > len(self.rows):  # gathering most rows is slower than the product
                inner = _times(self.rows, self.rows[new].T)[some]
            else:
                inner = _times(self.rows[some], self.rows[new].T)
            inner -= _times(self.columns[some, :since], self.columns[new, :since].T)
            lower = torch.from_numpy(self.columns[new, since:now])
            found = torch.linalg.solve_triangular(
                lower.T, torch.from_numpy(inner), upper=True, left=False
            ).numpy()
            self.columns[some, since:now] = found
            gain = self.left[some] - np.einsum("ij,ij->i", found, found)
            self.left[some] = np.where(gain <= SPANNED * self.first[some], 0.0, gain)
            self.known[some] = now

    def _choose_in(self, front: np.ndarray, k: int) -> None:
        """Choose from the `front`, starting with its first token, while no other may be as good."""
        now = len(self.chosen)
        mine, rows = self.columns[front, :now], self.rows[front]
        pairs = _times(rows, rows.T) - _times(mine, mine.T)
        outside = self.left.copy()
        outside[front] = -np.inf
        # Gains outside the front may be outdated, and are then upper bounds.
        limit = outside.max() + _ROUNDING * self.first[outside.argmax()]
        left, found = self.left[front], np.empty((len(front), k - now))
        place, step = 0, 0
        while True:
            spanned = _times(found[:, :step], found[place, :step])
            column = (pairs[place] - spanned) / left[place] ** 0.5
            found[:, step] = column
            left = left - column * column
            left[(left > -np.inf) & (left <= SPANNED * self.first[front])] = 0.0
            self.chosen.append(int(front[place]))
            self.columns[front[place], now : now + step + 1] = found[place, : step + 1]
            self.left[front[place]] = left[place] = -np.inf
            step += 1
            best = left.max()
            if len(self.chosen) == k or best <= 0 or limit >= best * (1 - SAME):
                break
            tied = np.flatnonzero(self._reaches(left, best, front))
            place = int(tied[front[tied].argmin()])
        # Keep what was computed for the front.
        stays = left > -np.inf
        self.columns[front[stays], now : now + step] = found[stays, :step]
        self.left[front[stays]] = left[stays]
        self.known[front[stays]] = now + step
