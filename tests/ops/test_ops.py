# SPDX-License-Identifier: Apache-2.0
"""The shared tensor functions against their slow twins, definitions and known bounds."""

from __future__ import annotations

import ast
import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import vtc
from vtc.ops import (
    bipartite,
    bipartite_match,
    cell_grid,
    coverage_greedy,
    density,
    density_peaks,
    dpp_greedy,
    farthest_first,
    greedy,
    max_min,
    max_sum,
    merge_into_nearest,
    merging,
    most_isolated,
    naive,
    pool_grid,
    top_k,
    unit_rows,
)
from vtc.ops.batch import together

GREEDY = [
    pytest.param(max_sum, naive.max_sum, id="max_sum"),
    pytest.param(farthest_first, naive.farthest_first, id="farthest_first"),
]
quick = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def tied_tokens(draw: st.DrawFn) -> Tensor:
    """Rows of +-1 in four dimensions: cosines are exact in fp32, so ties and copies abound."""
    n = draw(st.integers(1, 14))
    signs = st.lists(st.sampled_from([-1.0, 1.0]), min_size=4, max_size=4)
    return torch.tensor(draw(st.lists(signs, min_size=n, max_size=n)))


def gaussian(n: int, d: int, seed: int) -> Tensor:
    """Rows without ties, in fp64, where rounding cannot swap two candidates."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64)


# ---- matching -----------------------------------------------------------------------------------
@given(features=tied_tokens(), begins=st.booleans(), ranked=st.booleans(), data=st.data())
@quick
def test_matching_equals_twin_with_ties(features, begins, ranked, data):
    n = len(features)
    a = (n + begins) // 2
    r = data.draw(st.integers(0, a if n > a else 0))
    found = bipartite_match(features, r, begins, ranked)
    assert found.tolist() == naive.bipartite_match(features, r, begins, ranked).tolist()
    assert sorted(set(found.tolist())) == list(range(n - r))


@given(n=st.integers(2, 20), seed=st.integers(0, 10**6), data=st.data())
@quick
def test_matching_equals_twin_without_ties(n, seed, data):
    features, r = gaussian(n, 5, seed), data.draw(st.integers(0, n // 2))
    found = bipartite_match(features, r)
    assert found.tolist() == naive.bipartite_match(features, r).tolist()


def test_matching_refuses():
    for r in (-1, 3):
        with pytest.raises(ValueError, match="r: expected 0 to 2 pairs"):
            bipartite_match(gaussian(4, 2, 0), r)
    with pytest.raises(ValueError, match="0 to 0 pairs of 1"):
        bipartite_match(gaussian(1, 2, 0), 1)


# ---- max-min ------------------------------------------------------------------------------------
@pytest.mark.parametrize("pairs", [1, 4096])
@given(features=tied_tokens(), data=st.data())
@quick
def test_max_min_equals_twin(pairs, features, data):
    k = data.draw(st.integers(1, len(features)))
    with mock.patch.object(greedy, "_PAIRS_UP_TO", pairs):
        assert max_min(features, k).tolist() == naive.max_min(features, k).tolist()


# ---- clustering ---------------------------------------------------------------------------------
@given(features=tied_tokens(), data=st.data())
@quick
def test_density_peaks_equal_twin_with_ties(features, data):
    n = len(features)
    clusters, neighbours = data.draw(st.integers(1, n)), data.draw(st.integers(1, n))
    fast = density_peaks(features, clusters, neighbours)
    slow = naive.density_peaks(features, clusters, neighbours)
    assert [t.tolist() for t in fast] == [t.tolist() for t in slow]


@given(n=st.integers(1, 30), seed=st.integers(0, 10**6), data=st.data())
@quick
def test_density_peaks_equal_twin_without_ties(n, seed, data):
    points = gaussian(n, 3, seed)
    clusters, neighbours = data.draw(st.integers(1, n)), data.draw(st.integers(1, min(n, 4)))
    fast = density_peaks(points, clusters, neighbours)
    slow = naive.density_peaks(points, clusters, neighbours)
    assert [t.tolist() for t in fast] == [t.tolist() for t in slow]


def test_density_peaks_find_separate_groups():
    points = torch.cat([gaussian(7, 4, 1) * 0.1 + 5, gaussian(9, 4, 2) * 0.1 - 5])
    centres, joins = density_peaks(points, 2, 3)
    assert {int(c) < 7 for c in centres} == {True, False}
    assert len(set(joins[:7].tolist())) == len(set(joins[7:].tolist())) == 1
    assert joins[0] != joins[7]
    assert [int(joins[c]) for c in centres] == [0, 1]


@pytest.mark.parametrize("seed", [0, 2, 4, 5])  # of 3, two products are equal within `TIED`
def test_density_peaks_decide_between_what_is_nearly_equal(seed):
    """The definition, without any tolerance, in fp64: of hundreds of points some nearly tie."""
    points = gaussian(300, 64, seed)
    distance = torch.cdist(points, points) / 8
    density = (-distance.topk(31, largest=False).values.square().mean(1)).exp()
    denser = density > density[:, None]
    separation = torch.where(denser, distance, distance.max()).amin(1)
    centres = (density * separation).topk(31).indices
    joins = distance[centres].argmin(0)
    joins[centres] = torch.arange(31)
    found = density_peaks(points, 31, 31)
    assert [t.tolist() for t in found] == [centres.tolist(), joins.tolist()]


@pytest.mark.parametrize("n", [4, 40, 300])
def test_distances_of_a_pair_are_one_and_those_of_copies_none(n):
    """So that ties are exact, whatever the blocks that products are made in round to."""
    points = 5 + torch.randn(n // 2, 1024, generator=torch.Generator().manual_seed(n)).repeat(2, 1)
    with mock.patch.object(density, "_PRODUCTS_AT_ONCE", 100):
        found = density._distances(points)
    assert torch.equal(found, found.T)
    assert torch.equal(found == 0, torch.eye(n // 2).repeat(2, 2) == 1)


@pytest.mark.parametrize(
    ("clusters", "neighbours", "names"), [(0, 1, "clusters"), (4, 1, "clusters"), (1, 4, "neigh")]
)
def test_density_peaks_refuse(clusters, neighbours, names):
    with pytest.raises(ValueError, match=names):
        density_peaks(gaussian(3, 2, 0), clusters, neighbours)


# ---- greedy selection ---------------------------------------------------------------------------
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(("fast", "slow"), GREEDY)
@given(features=tied_tokens(), data=st.data())
@quick
def test_greedy_equals_twin_with_ties(fast, slow, pairs, features, data):
    n = len(features)
    k, pivot = data.draw(st.integers(1, n)), data.draw(st.integers(0, n - 1))
    with mock.patch.object(greedy, "_all_pairs", return_value=pairs):
        assert fast(features, k, pivot).tolist() == slow(features, k, pivot).tolist()


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(("fast", "slow"), GREEDY)
@given(n=st.integers(1, 20), d=st.integers(1, 6), seed=st.integers(0, 10**6), data=st.data())
@quick
def test_greedy_equals_twin_without_ties(fast, slow, pairs, n, d, seed, data):
    if d == 1:  # all cosines are +-1: ties again, exact ones
        features = gaussian(n, 1, seed).sign()
    else:
        features = gaussian(n, d, seed)
    k, pivot = data.draw(st.integers(1, n)), data.draw(st.integers(0, n - 1))
    with mock.patch.object(greedy, "_all_pairs", return_value=pairs):
        assert fast(features, k, pivot).tolist() == slow(features, k, pivot).tolist()


@pytest.mark.parametrize(("fast", "slow"), GREEDY)
def test_greedy_equals_twin_at_working_size(fast, slow):
    features = gaussian(200, 64, 0)
    assert fast(features, 40, 17).tolist() == slow(features, 40, 17).tolist()


def test_each_pick_of_max_sum_attains_the_least_sum():
    features = gaussian(40, 5, 1)
    similarity = naive.cosines(features)
    order = max_sum(features, 40, 3).tolist()
    for step in range(1, 40):
        sums = similarity[order[:step]].sum(0)
        rest = [v for v in range(40) if v not in order[:step]]
        assert sums[order[step]] == pytest.approx(sums[rest].min().item(), abs=1e-12)


@pytest.mark.parametrize(("fast", "slow"), GREEDY)
@given(seed=st.integers(0, 10**6), pivot=st.integers(0, 11))
@quick
def test_greedy_is_a_nested_choice_of_unique_tokens(fast, slow, seed, pivot):
    features = gaussian(12, 4, seed)
    whole = fast(features, 12, pivot).tolist()
    assert whole[0] == pivot
    assert sorted(whole) == list(range(12))
    for k in range(1, 12):
        assert fast(features, k, pivot).tolist() == whole[:k]


@pytest.mark.parametrize(("fast", "slow"), GREEDY)
@given(seed=st.integers(0, 10**6))
@quick
def test_greedy_ignores_row_lengths_and_follows_permutations(fast, slow, seed):
    features = gaussian(15, 4, seed)
    generator = torch.Generator().manual_seed(seed)
    order = fast(features, 7, 4)
    lengths = torch.rand(15, 1, generator=generator, dtype=torch.float64) * 100 + 0.01
    assert torch.equal(fast(features * lengths, 7, 4), order)
    shuffle = torch.randperm(15, generator=generator)
    moved = (shuffle == 4).nonzero().item()
    assert torch.equal(shuffle[fast(features[shuffle], 7, moved)], order)


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest result held."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            self.numbers = max(self.numbers, found.numel())
        return found


@pytest.mark.parametrize(("fast", "slow"), GREEDY)
def test_a_tenth_of_the_tokens_is_chosen_in_steps_and_a_quarter_of_all_pairs(fast, slow):
    """At a tenth, products in steps are faster and no n x n matrix is made."""
    features = gaussian(720, 8, 3).float()
    for k, pairs in ((72, False), (180, True)):
        with Largest() as largest:
            fast(features, k)
        assert (largest.numbers >= 720 * 720) == pairs
    assert not greedy._all_pairs(2880, 288)
    assert not greedy._all_pairs(576, 64)
    assert greedy._all_pairs(2880, 720)


def test_max_sum_and_k_center_differ():
    # The share of different sets among random four-dimensional tokens is about a half.
    differ = sum(
        set(max_sum(x, 3).tolist()) != set(farthest_first(x, 3).tolist())
        for x in (gaussian(10, 4, seed) for seed in range(100))
    )
    assert 30 < differ < 70


@pytest.mark.parametrize("seed", range(40))
def test_k_center_covers_within_twice_the_optimum(seed):
    features = gaussian(9, 3, seed)
    distance = (2 - 2 * naive.cosines(features)).clamp_min(0).sqrt()  # a metric, unlike 1 - cos
    k = 2 + seed % 3

    def radius(chosen):
        return distance[list(chosen)].amin(0).max().item()

    best = min(radius(c) for c in itertools.combinations(range(9), k))
    chosen = farthest_first(features, k, seed % 9).tolist()
    assert radius(chosen) <= 2 * best + 1e-12
    apart = distance[chosen][:, chosen] + torch.eye(k, dtype=torch.float64) * 10
    assert apart.min().item() >= radius(chosen) - 1e-12


@given(features=tied_tokens(), data=st.data())
@quick
def test_k_center_takes_no_copy_while_another_token_remains(features, data):
    distinct = len({tuple(row) for row in features.tolist()})
    chosen = farthest_first(features, data.draw(st.integers(1, distinct)))
    assert len({tuple(row) for row in features[chosen].tolist()}) == len(chosen)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_unit_rows_leave_what_they_are_given(dtype):
    given = gaussian(5, 3, 0).to(dtype)
    before = given.clone()
    unit_rows(given)
    assert torch.equal(given, before)


def test_max_sum_may_take_a_copy_first():
    # a, a copy of it, b opposite, y: after a and b the copy's sum (0.1) beats that of y (0.4).
    a, b, y = (1.0, 0.0, 0.0), (-0.9, 0.4359, 0.0), (0.3, 0.8489, 0.4359)
    features = torch.tensor([a, a, b, y])
    assert max_sum(features, 4).tolist() == [0, 2, 1, 3]
    assert farthest_first(features, 4).tolist() == [0, 2, 3, 1]


@pytest.mark.parametrize(("fast", "slow"), GREEDY)
def test_all_equal_tokens_give_the_lowest_indices(fast, slow):
    assert fast(torch.ones(9, 4), 4).tolist() == [0, 1, 2, 3]
    assert fast(torch.zeros(9, 4), 4, 2).tolist() == [2, 0, 1, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("fast", "slow"), GREEDY)
def test_half_precision_is_summed_in_fp32(fast, slow, dtype):
    # Sums of hundreds of cosines in half precision tie falsely; from fp32 the order is the same
    # as for the same values given in fp32.
    features = gaussian(400, 16, 5).to(dtype)
    assert torch.equal(fast(features, 300), fast(features.float(), 300))
    assert unit_rows(features).dtype == torch.float32


@pytest.mark.parametrize(("fast", "slow"), GREEDY)
def test_greedy_never_waits_for_the_device(fast, slow, monkeypatch):
    # Fake tensors have no values: reading one back, as a wait for a GPU would, raises. The one
    # check for NaN, before the loop, is the exception.
    monkeypatch.setattr(greedy, "unit_rows", lambda x: F.normalize(x, dim=1))
    with FakeTensorMode():
        assert fast(torch.randn(20, 4), 5, torch.randn(20).argmax()).shape == (5,)


@pytest.mark.parametrize(("fast", "slow"), GREEDY)
@pytest.mark.parametrize("k", [1, 40, 200])
def test_many_tokens_on_a_cpu_are_chosen_as_in_steps(fast, slow, k):
    """Rows made some at a time give the order that the naive twin has."""
    features = torch.randn(1500, 12, generator=torch.Generator().manual_seed(k)).double()
    assert torch.equal(fast(features, k, 7), slow(features, k, 7))


@pytest.mark.parametrize("n", [20, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_needs_a_gradient_is_chosen_from_as_what_does_not(n, dtype):
    """In training, and in any forward outside of `torch.no_grad`."""
    plain = torch.randn(n, 8, generator=torch.Generator().manual_seed(n)).to(dtype)
    given = plain.clone().requires_grad_()
    for fast in (max_sum, farthest_first, max_min):
        assert torch.equal(fast(given, 9), fast(plain, 9))
    assert torch.equal(most_isolated(given), most_isolated(plain))
    (unit_rows(given) * plain).sum().backward()
    assert given.grad.isfinite().all()


@pytest.mark.parametrize("d", [3, 40])
def test_the_most_isolated_of_many_tokens(d):
    features = torch.randn(1500, d, generator=torch.Generator().manual_seed(d)).double()
    assert torch.equal(max_min(features, 60), naive.max_min(features, 60))


@pytest.mark.parametrize(("fast", "slow"), GREEDY)
def test_greedy_refuses(fast, slow):
    features = torch.randn(5, 3)
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"k: .* 5 tokens given, got {k}"):
            fast(features, k)
    for pivot in (-1, 5):
        with pytest.raises(ValueError, match=f"pivot: .* 0 to 4, got {pivot}"):
            fast(features, 2, pivot)
    with pytest.raises(ValueError, match="features: expected shape"):
        fast(features[0], 1)
    with pytest.raises(ValueError, match="NaN"):
        fast(features.index_fill(0, torch.tensor([3]), torch.nan), 2)


# ---- ranking ------------------------------------------------------------------------------------
@given(scores=st.lists(st.sampled_from([-1.0, -0.0, 0.0, 0.5, 2.0]), max_size=40), data=st.data())
@quick
def test_top_k_equals_twin(scores, data):
    given_scores = torch.tensor(scores)
    k = data.draw(st.integers(0, len(scores)))
    assert top_k(given_scores, k).tolist() == naive.top_k(given_scores, k).tolist()


def test_top_k_is_stable_in_half_precision_at_size():
    scores = (torch.arange(3000) % 3).to(torch.bfloat16)
    assert top_k(scores, 1000).tolist() == list(range(2, 3000, 3))
    assert top_k(scores, 1002).tolist()[1000:] == [1, 4]


@given(
    scores=st.lists(st.integers(-30, 30), min_size=4, max_size=12),
    batched=st.booleans(),
    data=st.data(),
)
@quick
def test_top_k_of_scores_of_which_few_tie_equals_twin(scores, batched, data):
    given_scores = torch.tensor(scores, dtype=torch.float32)
    k = data.draw(st.integers(0, len(scores)))
    if batched:
        both = torch.stack([given_scores, given_scores.flip(0)])
        expected = [naive.top_k(row, k).tolist() for row in both]
        assert top_k(both, k).tolist() == expected
    else:
        assert top_k(given_scores, k).tolist() == naive.top_k(given_scores, k).tolist()


def test_top_k_keeps_fp64_apart():
    # The two differ only beyond fp32.
    assert top_k(torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64), 1).tolist() == [1]


def test_top_k_refuses():
    for k in (-1, 4):
        with pytest.raises(ValueError, match=f"k: .* 3 scores given, got {k}"):
            top_k(torch.zeros(3), k)
    with pytest.raises(ValueError, match="scores: expected shape"):
        top_k(torch.zeros(3, 1, 1), 1)
    with pytest.raises(ValueError, match="NaN"):
        top_k(torch.tensor([0.0, torch.nan]), 1)


# ---- batches ------------------------------------------------------------------------------------
def spread(x: Tensor, k: int) -> Tensor:
    """k of the n tokens, evenly, of each image."""
    return (torch.arange(k, device=x.device) * x.shape[-2] // k).expand(*x.shape[:-2], k)


def alike(x: Tensor) -> Tensor:
    rows = F.normalize(x, dim=-1)
    return rows @ rows.mT


BATCHED = {
    "unit_rows": lambda x, k: unit_rows(x),
    "top_k": lambda x, k: top_k(x.sum(-1), k),
    "max_sum": max_sum,
    "farthest_first": lambda x, k: farthest_first(x, k, x.sum(-1).argmax(-1)),
    "max_min": max_min,
    "most_isolated": lambda x, k: greedy.most_isolated(x, k),
    "coverage_greedy": lambda x, k: coverage_greedy(x @ x.mT, k),
    "coverage_greedy, weighed": lambda x, k: coverage_greedy(
        alike(x), k, x.square().sum(-1) + 1, x[..., 0].abs()
    ),
    "dpp_greedy": dpp_greedy,
    "merge_into_nearest": lambda x, k: merge_into_nearest(x, x + 1, spread(x, k)),
    "merge_into_nearest, weighed": lambda x, k: merge_into_nearest(
        x, x, spread(x, k), x[..., 0].abs()
    ),
    "bipartite_match": lambda x, k: bipartite_match(x, k // 2),
    "density_peaks": lambda x, k: density_peaks(x, k, min(k, 3)),
}


def parts(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else found


@contextlib.contextmanager
def ways(lockstep: bool, pairs: bool = False) -> Iterator[None]:
    """All images in lockstep whatever their size, as a GPU works, or image by image."""
    names = ("coverage", "density", "dpp", "greedy", "merging")
    with contextlib.ExitStack() as stack:
        for name in names:
            together = mock.patch(
                f"vtc.ops.{name}.together", lambda given, *_: lockstep or given.ndim < 3
            )
            stack.enter_context(together)
        stack.enter_context(mock.patch.object(greedy, "_all_pairs", return_value=pairs))
        stack.enter_context(mock.patch.object(greedy, "_PAIRS_UP_TO", 4096 if pairs else 1))
        yield


def check_batch(name: str, x: Tensor, k: int) -> None:
    each = zip(*(parts(BATCHED[name](image, k)) for image in x), strict=True)
    for found, alone in zip(parts(BATCHED[name](x, k)), each, strict=True):
        expected = torch.stack(alone)
        assert found.dtype == expected.dtype
        if found.is_floating_point():
            torch.testing.assert_close(found, expected)
        else:
            assert found.tolist() == expected.tolist()


@st.composite
def tied_images(draw: st.DrawFn) -> Tensor:
    """Images of equal size, in which copies, ties and zero rows abound."""
    b, n = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    row = st.sampled_from([*itertools.product([-1.0, 1.0], repeat=4), (0.0,) * 4])
    return torch.tensor(draw(st.lists(row, min_size=b * n, max_size=b * n))).view(b, n, 4)


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("name", BATCHED)
@given(images=tied_images(), pairs=st.booleans(), data=st.data())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_each_image_of_a_batch_gets_what_it_gets_alone(name, lockstep, images, pairs, data):
    k = data.draw(st.integers(1, images.shape[1]))
    with ways(lockstep, pairs):
        check_batch(name, images, k)


def test_batches_are_worked_on_together_where_they_are_small_or_not_on_a_cpu():
    ones = torch.ones(2, 3, 4)
    assert together(torch.ones(600, 600))
    assert together(ones)
    assert together(ones, 24)
    assert not together(ones, 23)
    assert not together(torch.ones(2, 3, 2**16))
    assert together(torch.ones(2, 3, 2**16, device="meta"), 23)


def test_batch_of_more_points_than_a_block_of_densities():
    points = gaussian(2 * 140, 4, 1).view(2, 140, 4)
    with ways(lockstep=True):
        check_batch("density_peaks", points, 12)


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("name", BATCHED)
def test_batches_without_ties(name, lockstep):
    """Images of different scales, as what counts as equal or as nothing is each image's own."""
    for b, n, k in ((3, 40, 7), (2, 11, 11), (1, 9, 1)):
        images = gaussian(b * n, 6, n).view(b, n, 6) * torch.tensor([1, 1e-4, 1e4])[:b, None, None]
        with ways(lockstep):
            check_batch(name, images, k)


@pytest.mark.parametrize("name", ["max_sum", "farthest_first", "max_min"])
def test_many_tokens_of_several_images_on_a_cpu(name):
    check_batch(name, gaussian(2 * 1100, 6, 0).view(2, 1100, 6), 50)


def test_products_of_blocks_are_mirrored():
    points = gaussian(2 * 30, 4, 0).view(2, 30, 4)
    with mock.patch.object(density, "_PRODUCTS_AT_ONCE", 7):
        found = density._distances(points)
    torch.testing.assert_close(found, torch.cdist(points, points) / 2)
    assert torch.equal(found.diagonal(dim1=1, dim2=2), torch.zeros(2, 30).double())


@pytest.mark.parametrize("shape", [(12, 4), (3, 12, 4)])
@pytest.mark.parametrize("name", sorted(set(BATCHED) - {"unit_rows"}))
def test_nothing_leaves_the_device(name, shape, monkeypatch):
    """Tensors on "meta" take the way of a GPU and have no values: reading one back raises, as does
    a result whose size depends on values. The checks for NaN, before the loops, are the exception.
    """
    for module in (greedy, bipartite, merging):
        monkeypatch.setattr(module, "unit_rows", lambda x: F.normalize(x, dim=-1))
    if name == "top_k":
        monkeypatch.setattr(torch, "isnan", lambda x: torch.zeros(1))
    expected = parts(BATCHED[name](torch.ones(shape), 3))
    found = parts(BATCHED[name](torch.empty(shape, device="meta"), 3))
    assert [(t.shape, t.device.type) for t in found] == [(t.shape, "meta") for t in expected]


def test_batches_refuse():
    x = torch.randn(2, 5, 3)
    shapes = r"expected shape \(n, d\) or, for b images, \(b, n, d\), b at least 1, got "
    for wrong, given_shape in ((x[None], r"\(1, 2, 5, 3\)"), (x[:0], r"\(0, 5, 3\)")):
        for function in (max_sum, farthest_first, max_min):
            with pytest.raises(ValueError, match="features: " + shapes + given_shape):
                function(wrong, 1)
        with pytest.raises(ValueError, match="features: " + shapes + given_shape):
            unit_rows(wrong)
        with pytest.raises(ValueError, match="metric: " + shapes + given_shape):
            bipartite_match(wrong, 1)
        with pytest.raises(ValueError, match="points: " + shapes + given_shape):
            density_peaks(wrong, 1, 1)
        with pytest.raises(ValueError, match="contents: " + shapes + given_shape):
            merge_into_nearest(wrong, x, spread(x, 2))
    with pytest.raises(ValueError, match=r"pivot: expected shape \(2,\), got \(3,\)"):
        max_sum(x, 2, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"k: .* 5 tokens given, got 6"):
        max_sum(x, 6)
    with pytest.raises(ValueError, match=r"k: .* 5 tokens given, got 6"):
        dpp_greedy(x, 6)
    for name in ("factor", "bonus"):
        with pytest.raises(ValueError, match=rf"{name}: expected shape \(2, 3\), got \(3,\)"):
            coverage_greedy(x, 1, **{name: torch.ones(3)})
    with pytest.raises(ValueError, match=r"metric: expected shape \(2, 5, 3\), got \(2, 4, 3\)"):
        merge_into_nearest(x, x[:, 1:], spread(x, 2))
    with pytest.raises(ValueError, match=r"kept: expected shape \(2, 2\), got \(2,\)"):
        merge_into_nearest(x, x, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"weights: expected shape \(2, 5\), got \(5,\)"):
        merge_into_nearest(x, x, spread(x, 2), torch.ones(5))


# ---- grids --------------------------------------------------------------------------------------
def raster(rows: int, cols: int, frames: int = 1) -> Tensor:
    return torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(cols))


@given(rows=st.integers(1, 14), cols=st.integers(1, 14), data=st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_cell_grid_is_the_best_of_all(rows, cols, data):
    budget = data.draw(st.integers(1, rows * cols))
    r, c = cell_grid(rows, cols, budget)

    def stretch(r, c):
        return max(r * cols, c * rows) / min(r * cols, c * rows)

    every = [(i, j) for i in range(1, rows + 1) for j in range(1, cols + 1) if i * j <= budget]
    assert (r, c) in every
    allowed = max(2.0, min(stretch(*size) for size in every))
    rank = {s: (-s[0] * s[1], stretch(*s), s[0]) for s in every if stretch(*s) <= allowed}
    assert (r, c) == min(rank, key=rank.__getitem__)


@pytest.mark.parametrize(
    ("grid", "budget", "expected"),
    [
        ((24, 24), 144, (12, 12)),
        ((24, 24), 58, (7, 8)),
        ((24, 24), 192, (12, 16)),
        ((24, 24), 576, (24, 24)),
        ((16, 32), 128, (8, 16)),
        ((1, 20), 7, (1, 7)),
        ((20, 1), 7, (7, 1)),
        ((24, 24), 1, (1, 1)),
        ((3, 3), 100, (3, 3)),
    ],
)
def test_cell_grid_examples(grid, budget, expected):
    assert cell_grid(*grid, budget) == expected


@pytest.mark.parametrize("sizes", [(0, 3, 1), (3, 0, 1), (3, 3, 0)])
def test_cell_grid_refuses(sizes):
    with pytest.raises(ValueError, match="expected a whole number of at least 1, got 0"):
        cell_grid(*sizes)


@given(rows=st.integers(1, 9), cols=st.integers(1, 9), data=st.data())
@quick
def test_pooling_equals_twin_on_grids_with_holes(rows, cols, data):
    full = raster(rows, cols)
    there = data.draw(st.lists(st.booleans(), min_size=len(full), max_size=len(full)).filter(any))
    grid = full[torch.tensor(there)]
    grid[:, 1:] -= grid[:, 1:].amin(0)
    budget = data.draw(st.integers(1, len(grid)))
    features = gaussian(len(grid), 3, 0)
    cells = cell_grid(*(grid[:, 1:].amax(0) + 1).tolist(), budget)
    indices, contents = pool_grid(features, grid, budget)
    expected_indices, expected = naive.pool_plane(features, grid[:, 1:], cells)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(contents, expected, rtol=0, atol=1e-12)


def test_pooling_is_average_pooling_where_cells_divide_the_grid():
    features = gaussian(8 * 12, 5, 0).float()
    indices, contents = pool_grid(features, raster(8, 12), 24)
    expected = F.adaptive_avg_pool2d(features.reshape(8, 12, 5).permute(2, 0, 1), (4, 6))
    torch.testing.assert_close(contents, expected.permute(1, 2, 0).reshape(24, 5))
    assert indices.tolist() == [2 * y * 12 + 2 * x for y in range(4) for x in range(6)]


@given(rows=st.integers(1, 12), cols=st.integers(1, 12), data=st.data())
@quick
def test_interpolation_equals_twin(rows, cols, data):
    budget = data.draw(st.integers(1, rows * cols))
    features = gaussian(rows * cols, 3, 0).float()
    indices, contents = pool_grid(features, raster(rows, cols), budget, "bilinear")
    expected = naive.resize_plane(features, rows, cols, cell_grid(rows, cols, budget))
    # Ascending places of a raster are the raster of the cells, so rows correspond.
    assert indices.tolist() == sorted(set(indices.tolist()))
    torch.testing.assert_close(contents, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernel", ["mean", "bilinear"])
@given(frames=st.integers(1, 5), rows=st.integers(1, 6), cols=st.integers(1, 6), data=st.data())
@quick
def test_pooling_keeps_budget_order_and_constants(kernel, frames, rows, cols, data):
    grid = raster(rows, cols, frames)
    n = len(grid)
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any)))
    grid = grid[kept]
    crop = None
    if data.draw(st.booleans()):
        crop = torch.tensor(
            data.draw(st.lists(st.integers(0, 2), min_size=len(grid), max_size=len(grid)))
        )
    budget = data.draw(st.integers(1, len(grid)))
    features = torch.tensor([[2.0, -3.0]]).expand(len(grid), 2)
    indices, contents = pool_grid(features, grid, budget, kernel, crop)
    assert 1 <= len(indices) <= budget
    assert indices.tolist() == sorted(set(indices.tolist()))
    assert contents.shape == (len(indices), 2)
    torch.testing.assert_close(contents, features[: len(indices)])


@pytest.mark.parametrize("kernel", ["mean", "bilinear"])
def test_frames_are_pooled_apart(kernel):
    grid, features = raster(4, 4, 3), gaussian(48, 2, 0)
    indices, contents = pool_grid(features, grid, 12, kernel)
    assert grid[indices, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for frame in range(3):
        own = grid[:, 0] == frame
        alone, alone_contents = pool_grid(features[own], grid[own], 4, kernel)
        mine = grid[indices, 0] == frame
        assert torch.equal(indices[mine] - 16 * frame, alone)
        torch.testing.assert_close(contents[mine], alone_contents)


def test_crops_are_pooled_apart_by_their_share():
    grid = torch.cat([raster(4, 4), raster(4, 8) + torch.tensor([0, 0, 8])])  # global columns
    crop = torch.tensor([0] * 16 + [1] * 32)
    features = torch.arange(48.0)[:, None]
    indices, contents = pool_grid(features, grid, 12, crop=crop)
    assert crop[indices].bincount().tolist() == [4, 8]
    assert torch.equal(contents[:4], pool_grid(features[:16], grid[:16], 4)[1])
    assert torch.equal(contents[4:], pool_grid(features[16:], grid[16:], 8)[1])


def test_fewer_tokens_than_frames_average_neighbouring_frames():
    grid = raster(2, 2, 6)
    features = grid[:, :1].float()
    indices, contents = pool_grid(features, grid, 3)
    assert contents.squeeze(1).tolist() == [0.5, 2.5, 4.5]
    assert grid[indices, 0].tolist() == [0, 2, 4]


@pytest.mark.parametrize("kernel", ["mean", "bilinear"])
def test_pooling_follows_the_grid_not_the_order_of_tokens(kernel):
    grid, features = raster(5, 7), gaussian(35, 3, 0)
    shuffle = torch.randperm(35, generator=torch.Generator().manual_seed(0))
    indices, contents = pool_grid(features, grid, 9, kernel)
    moved, moved_contents = pool_grid(features[shuffle], grid[shuffle], 9, kernel)
    assert moved.tolist() == sorted(moved.tolist())
    back = shuffle[moved]
    assert torch.equal(back.sort().values, indices)  # odd sizes: no ties between anchors
    torch.testing.assert_close(moved_contents[back.argsort()], contents, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kernel", ["mean", "bilinear"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pooling_sums_in_fp32_and_returns_the_given_dtype(kernel, dtype):
    # Weights such as 1/9 rounded to half precision would move results by a last place.
    features = gaussian(81, 50, 0).to(dtype)
    contents = pool_grid(features, raster(9, 9), 9, kernel)[1]
    assert contents.dtype == dtype
    wide = pool_grid(features.float(), raster(9, 9), 9, kernel)[1]
    assert torch.equal(contents, wide.to(dtype))


def test_pooling_refuses():
    features, grid = torch.zeros(6, 2), raster(2, 3)
    for budget in (0, 7):
        with pytest.raises(ValueError, match=f"budget: .* 6 tokens given, got {budget}"):
            pool_grid(features, grid, budget)
    with pytest.raises(ValueError, match=r"^grid: expected shape \(6, 3\)"):
        pool_grid(features, grid[:5], 2)
    with pytest.raises(ValueError, match=r"^crop: expected shape \(6,\)"):
        pool_grid(features, grid, 2, crop=torch.zeros(5))
    with pytest.raises(ValueError, match=r"^features: expected shape \(n, d\)"):
        pool_grid(features[0], grid[:2], 1)


# ---- source -------------------------------------------------------------------------------------
def test_no_model_sizes_in_code():
    """Token counts, grids and prompt lengths of one checkpoint have no place in a method."""
    package = Path(vtc.__file__).parent
    files = [*(package / "ops").glob("*.py"), *(package / "methods").glob("*.py")]
    assert len(files) > 10
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        # A setting may have such a number as its published default, where it is named.
        settings = [
            part
            for node in ast.walk(tree)
            if isinstance(node, ast.AnnAssign) and node.value is not None
            for part in ast.walk(node.value)
        ]
        numbers = {
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and type(node.value) is int and node not in settings
        }
        assert not numbers & {24, 32, 35, 36, 196, 256, 336, 576, 611, 729, 2048, 2880}, file


# ---- benchmark ----------------------------------------------------------------------------------
def test_the_benchmark_covers_every_function_that_selects_or_merges():
    from vtc.eval.bench.ops import bench

    rows = bench(100, 10, 6, torch.float32, 1, twins=True)
    names = {"cell_grid", "pool_grid", "unit_rows", "most_isolated", "Kernel"}
    assert {row[0] for row in rows} == set(vtc.ops.__all__) - names
    assert all(float(row[1]) >= 0 and float(row[-1]) >= 0 for row in rows)
    assert all(row[4] for row in rows if row[0] != "top_k")
    # Both ways are timed wherever there are two.
    assert all(row[2] and row[3] for row in rows if row[0] not in ("top_k", "density_peaks"))


def test_both_ways_of_the_benchmark_do_what_the_library_does():
    from vtc.eval.bench.ops import cases

    x = gaussian(60, 12, 0)
    for case in cases():
        if case.name in ("top_k", "density_peaks", "bipartite_match"):
            continue  # the last returns pairs, not the tokens after merging
        expected = case.ours(x, 9)
        for way in case.ways.values():
            torch.testing.assert_close(way(x, 9), expected)
    (match,) = (case for case in cases() if case.name == "bipartite_match")
    first, second = (way(x, 9) for way in match.ways.values())
    assert [t.tolist() for t in first] == [t.tolist() for t in second]
    target = match.ours(x, 9)
    assert all(target[2 * a] == target[2 * b + 1] for a, b in zip(*first, strict=True))
