# SPDX-License-Identifier: Apache-2.0
"""Greedy choice in a determinantal point process, in steps and in blocks, and its definition."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vtc
from vtc.core import VisionTokens
from vtc.ops import dpp, dpp_greedy, naive, unit_rows

quick = settings(max_examples=60, deadline=None, derandomize=True)


@contextmanager
def blocks(front: int = 3, at_once: int = 4) -> Iterator[None]:
    """Work in blocks however few tokens there are, with small ones."""
    with mock.patch.multiple(dpp, _IN_BLOCKS_FROM=1, _FRONT=front, _AT_ONCE=at_once):
        yield


def both(rows: Tensor, k: int) -> list[int]:
    """The choice in steps, which that in blocks of several sizes has to equal."""
    with mock.patch.object(dpp, "_IN_BLOCKS_FROM", 10**9):
        chosen: list[int] = dpp_greedy(rows, k).tolist()
    for front, at_once in ((1, 1), (3, 4), (8, 64)):
        with blocks(front, at_once):
            assert dpp_greedy(rows, k).tolist() == chosen
    return chosen


def plain(rows: Tensor, k: int) -> list[int]:
    """The largest gain each time, and nothing else: no two are taken for equal."""
    kernel = rows.double() @ rows.double().T
    left, columns = kernel.diagonal().clone(), torch.zeros(len(rows), k, dtype=torch.float64)
    chosen: list[int] = []
    for step in range(k):
        chosen.append(int(left.argmax()))
        column = kernel[chosen[-1]] - columns @ columns[chosen[-1]]
        columns[:, step] = column / left[chosen[-1]].sqrt()
        left = left - columns[:, step].square()
        left[chosen] = -torch.inf
    return chosen


@st.composite
def tied_rows(draw: st.DrawFn) -> Tensor:
    """Rows of -1, 0 and 1, by whole numbers: copies, ties and dependent rows abound."""
    n, d = draw(st.integers(1, 14)), draw(st.integers(1, 5))
    row = st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=d, max_size=d)
    return torch.tensor(draw(st.lists(row, min_size=n, max_size=n)))


@given(rows=tied_rows(), data=st.data())
@quick
def test_the_choice_is_greedy_in_the_determinant_with_ties(
    rows: Tensor, data: st.DataObject
) -> None:
    k = data.draw(st.integers(0, len(rows)))
    chosen, rank = both(rows, k), int(torch.linalg.matrix_rank(rows.double()))
    assert len(set(chosen)) == k
    spanning, rest = chosen[:rank], chosen[rank:]
    expected = naive.dpp_greedy((rows @ rows.T).double(), min(k, rank))
    assert spanning == expected.tolist()
    assert rest == [i for i in range(len(rows)) if i not in spanning][: len(rest)]


@given(n=st.integers(1, 16), d=st.integers(1, 20), seed=st.integers(0, 10**6), data=st.data())
@quick
def test_the_choice_is_greedy_in_the_determinant_without_ties(
    n: int, d: int, seed: int, data: st.DataObject
) -> None:
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    k = data.draw(st.integers(0, min(n, d)))
    chosen = both(rows, k)
    assert chosen == naive.dpp_greedy(rows @ rows.T, k).tolist()
    assert both(3.0 * rows, k) == chosen
    for fewer in range(k):
        assert both(rows, fewer) == chosen[:fewer]


def test_beyond_the_rank_nothing_repeats() -> None:
    rows = torch.eye(3)[[0, 0, 1, 1, 2, 2]]
    assert both(rows, 6) == [0, 2, 4, 1, 3, 5]
    assert both(torch.zeros(4, 4), 3) == [0, 1, 2]
    wide = torch.randn(300, 20, generator=torch.Generator().manual_seed(0))
    chosen = dpp_greedy(wide, 64).tolist()
    assert len(set(chosen)) == 64
    assert chosen[20:] == [i for i in range(300) if i not in chosen[:20]][:44]


def test_near_ties_are_no_ties() -> None:
    """A thousandth, or a hundred-thousandth, more than the first is more."""
    for more in (1e-3, 1e-5, 1e-6):
        rows = torch.eye(4, dtype=torch.float64)
        rows[2] *= 1 + more
        assert both(rows, 4) == [2, 0, 1, 3]


def features(seed: int, n: int = 300, d: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) + torch.randn(d, generator=generator)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("weighted", [False, True])
def test_what_no_tolerance_chooses_is_chosen(weighted: bool, seed: int) -> None:
    rows = unit_rows(features(seed).double())
    if weighted:
        weight = torch.rand(len(rows), 1, generator=torch.Generator().manual_seed(seed)).double()
        rows = (weight + 1e-6) * rows
        assert dpp_greedy(rows, 48).tolist() == plain(rows, 48)
        return
    # Without weights all begin equal, up to rounding: the first is a tie, the rest is not.
    chosen = dpp_greedy(rows, 48).tolist()
    rows[0] *= 1 + 1e-12
    assert chosen == plain(rows, 48)


@pytest.mark.parametrize("n", [300, 700])
def test_many_tokens_are_chosen_in_blocks_as_in_steps(n: int) -> None:
    rows = features(n, n, 40)
    rows[n // 2 :] = rows[: n - n // 2]  # every token has a double
    for weight in (torch.ones(n, 1), torch.linspace(1, 0, n)[:, None]):
        with blocks(192, 1024):
            found = dpp_greedy(rows * weight, 60)
        assert torch.equal(found, dpp._in_steps((rows * weight).double(), 60))


@pytest.mark.parametrize("seed", range(6))
def test_cdpruner_chooses_by_its_kernel_and_by_no_tolerance(seed: int) -> None:
    """Every prefix of the choice, as the greedy of a plain kernel has it."""
    rows = unit_rows(features(seed).double())
    text = features(seed + 100, 7).double()
    found = (rows @ unit_rows(text).T).mean(1)
    weight = (found - found.min() + 1e-6) / (found.max() - found.min())
    expected = plain(weight[:, None] * rows, 40)
    tokens = VisionTokens(features=features(seed), grid=torch.zeros(300, 3).long(), text=text)
    for k in range(1, 41):
        assert vtc.CDPruner(keep=k).select(tokens).indices.tolist() == sorted(expected[:k])


def test_nonsense_is_refused() -> None:
    for wrong in (-1, 7):
        with pytest.raises(ValueError, match=r"k: expected .* 6 tokens given, got"):
            dpp_greedy(torch.eye(6), wrong)
    with pytest.raises(ValueError, match="rows"):
        dpp_greedy(torch.ones(3), 1)
