# SPDX-License-Identifier: Apache-2.0
"""Greedy choice without most of the similarities (`vtc.ops.ahead`) is the greedy choice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vtc.ops import ahead, max_min, max_sum


def gaussian(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64)


KINDS: dict[str, Callable[[int, int], Tensor]] = {
    "wide": lambda n, seed: gaussian(n, 32, seed),
    "flat": lambda n, seed: gaussian(n, 3, seed) @ gaussian(3, 32, seed + 1),
    "heaps": lambda n, seed: (
        gaussian(1 + n // 9, 32, seed).repeat(9, 1)[:n] + 0.3 * gaussian(n, 32, seed + 1)
    ),
    "aside": lambda n, seed: gaussian(n, 32, seed) + 3 * gaussian(1, 32, seed + 1),
    "line": lambda n, seed: torch.stack([torch.arange(n) / n, torch.ones(n)], 1).double(),
}


def rows_of(kind: str, n: int, seed: int = 0) -> Tensor:
    found = KINDS[kind](n, seed)
    return found / found.norm(dim=1, keepdim=True)


@contextmanager
def sizes(front: int, at_once: int) -> Iterator[None]:
    """So few that even small inputs take every way through the code."""
    with mock.patch.multiple(ahead, FRONT=front, AHEAD=at_once):
        yield


def attained(rows: Tensor, chosen: Tensor, combine: str) -> None:
    """Every choice has the smallest value of what was left, in exact arithmetic; where two have it,
    either may be chosen."""
    similarity = rows @ rows.T
    order = chosen.tolist()
    assert len({*order}) == len(order)
    for step in range(1, len(order)):
        held = similarity[order[:step]]
        values = held.sum(0) if combine == "sum" else held.amax(0)
        rest = values.clone()
        rest[order[:step]] = torch.inf
        assert values[order[step]] <= rest.min() + 1e-12, step


@pytest.mark.parametrize(("front", "at_once"), [(1, 4), (4, 4), (16, 8), (128, 32)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 7, 60, 250])
def test_every_choice_is_the_smallest(kind: str, n: int, front: int, at_once: int) -> None:
    rows = rows_of(kind, n, n)
    for k in {1, min(2, n), n // 3 + 1, n}:
        with sizes(front, at_once):
            attained(rows, ahead.smallest_sum(rows, k, n // 2), "sum")
            attained(rows, ahead.farthest(rows, k, n // 2), "max")


@pytest.mark.parametrize("choose", [ahead.smallest_sum, ahead.farthest])
@pytest.mark.parametrize("kind", ["wide", "flat", "heaps", "aside"])
def test_it_is_the_plain_loop(choose: Any, kind: str) -> None:
    rows, chosen = rows_of(kind, 200, 3), [11]
    similarity = rows @ rows.T
    while len(chosen) < 90:
        held = similarity[chosen]
        values = held.sum(0) if choose is ahead.smallest_sum else held.amax(0)
        values[chosen] = torch.inf
        chosen.append(int(values.argmin()))
    for front, at_once in ((1, 4), (8, 8), (64, 32)):
        with sizes(front, at_once):
            assert choose(rows, 90, 11).tolist() == chosen


@pytest.mark.parametrize("at_once", [4, 8, 32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [2, 3, 5, 40, 333])
def test_the_most_isolated_has_the_least_similar_nearest(kind: str, n: int, at_once: int) -> None:
    rows = rows_of(kind, n, n + 1)
    nearest = (rows @ rows.T).fill_diagonal_(-torch.inf).amax(1)
    with sizes(4, at_once):
        found = ahead.most_isolated(rows)
    assert nearest[found] <= nearest.min() + 1e-12


def test_copies_are_chosen_once_each_and_the_isolated_one_is_found() -> None:
    rows = rows_of("wide", 50, 5).repeat(4, 1)
    rows = torch.cat([rows, rows_of("wide", 1, 9)])
    with sizes(8, 8):
        assert ahead.most_isolated(rows) == 200
        order = ahead.farthest(rows, 201, 200)
        attained(rows, order, "max")
        assert len({i % 50 for i in order[1:51].tolist()}) == 50  # no copy before all kinds
        attained(rows, ahead.smallest_sum(rows, 201, 200), "sum")


def test_what_is_held_for_later_is_bounded() -> None:
    rows, most = rows_of("wide", 400, 2), 0

    def watched(x: np.ndarray, kth: int) -> np.ndarray:
        nonlocal most
        most = max(most, kth + 1 - ahead.AHEAD)  # as many rows were held
        return argpartition(x, kth)

    argpartition, free = np.argpartition, ahead.smallest_sum(rows, 300, 0)
    few = mock.patch.object(ahead, "ROOM", 20 * 400)
    with sizes(4, 8), few, mock.patch.object(np, "argpartition", watched):
        bounded = ahead.smallest_sum(rows, 300, 0)
    assert 0 < most <= 20
    assert bounded.tolist() == free.tolist()


class Products(TorchDispatchMode):
    """Counts the numbers that matrix products return."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.mv.default):
            self.count += found.numel()
        return found


@pytest.mark.parametrize("kind", KINDS)
def test_most_similarities_are_not_made(kind: str) -> None:
    """At most half as many again as the chosen tokens' own; for the first, never much more than
    all, and a small part of them where tokens are unlike one another to different degrees."""
    rows, k = rows_of(kind, 2048).float(), 204
    with Products() as products:
        ahead.farthest(rows, k, 0)
    assert products.count < 1.5 * k * 2048
    with Products() as products:
        ahead.most_isolated(rows)
    assert products.count < (1.3 if kind == "line" else 0.35) * 2048 * 2048
    if kind in ("aside", "line"):
        with Products() as products:
            ahead.smallest_sum(rows, k, 0)
        assert products.count < 1.5 * k * 2048


def test_the_choosers_of_many_tokens_on_a_cpu_are_these() -> None:
    rows = KINDS["aside"](1100, 2)
    unit = rows / rows.norm(dim=1, keepdim=True)
    assert max_sum(rows, 50, 3).tolist() == ahead.smallest_sum(unit, 50, 3).tolist()
    first = ahead.most_isolated(unit)
    assert max_min(rows, 50).tolist() == ahead.farthest(unit, 50, first).tolist()
