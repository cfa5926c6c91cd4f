# SPDX-License-Identifier: Apache-2.0
"""CDPruner, VisPruner, VScan and token correlation as pure functions, and what they share."""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vtc
from vtc.core import LayerState, VisionTokens
from vtc.methods import vispruner
from vtc.ops import merge_into_nearest, merging, naive

quick = settings(max_examples=40, deadline=None, derandomize=True)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rand(n: int, seed: int) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


def vision_tokens(rows: int, columns: int, seed: int = 0, **more: Any) -> VisionTokens:
    n = rows * columns
    signals: dict[str, Any] = {
        "features": randn(n, 6, seed=seed),
        "grid": torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)),
        "cls_attention": rand(n, seed + 1),
        "low_attention": rand(n, seed + 2),
        "keys": randn(n, 8, seed=seed + 3),
        "encoder": randn(n, 5, seed=seed + 4),
        "text": randn(4, 6, seed=seed + 5),
    }
    return VisionTokens(**{**signals, **more})


@pytest.mark.parametrize("name", ["cdpruner", "vispruner", "vscan", "correlation"])
def test_everything_stays_and_nonsense_is_refused(name: str) -> None:
    tokens = vision_tokens(4, 4)
    assert vtc.make(name, keep=1.0).select(tokens).indices.tolist() == list(range(16))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="keep"):
        vtc.make(name, keep=1.5)
    bare = VisionTokens(features=tokens.features, grid=tokens.grid)
    with pytest.raises(ValueError, match="needed"):
        vtc.make(name, keep=4).select(bare)  # type: ignore[attr-defined]


# ---- the ops ------------------------------------------------------------------------------------
@quick
@given(st.integers(2, 14), st.integers(0, 9), st.booleans())
def test_merging_is_the_naive_one(n: int, seed: int, weighted: bool) -> None:
    contents, metric = randn(n, 3, seed=seed), randn(n, 4, seed=seed + 1)
    kept = torch.arange(0, n, 3)
    weights = rand(n, seed + 2).double() if weighted else None
    if weights is not None:
        weights[::2] = 0
    found = merge_into_nearest(contents, metric, kept, weights)
    torch.testing.assert_close(found, naive.merge_into_nearest(contents, metric, kept, weights))


@quick
@given(st.integers(1, 20), st.integers(1, 9), st.integers(0, 9))
def test_sums_of_groups_are_the_same_by_a_product_as_on_gpus(n: int, k: int, seed: int) -> None:
    values, group = randn(n, 3, seed=seed), (rand(n, seed) * k).long()
    summed = merging.sums(values, group, k)
    torch.testing.assert_close(merging._product_sums(values, group, k), summed)
    torch.testing.assert_close(summed.sum(0), values.sum(0))


def test_merging_alike_tokens_changes_nothing() -> None:
    contents = torch.ones(6, 3)
    assert torch.equal(
        merge_into_nearest(contents, contents, torch.tensor([1, 4])), torch.ones(2, 3)
    )
    every = randn(5, 3)
    assert torch.equal(merge_into_nearest(every, every, torch.arange(5)), every)


# ---- CDPruner -----------------------------------------------------------------------------------
def test_cdpruner_without_relevance_is_a_plain_dpp() -> None:
    tokens = vision_tokens(4, 4)
    expected = naive.dpp_greedy(naive.cosines(tokens.features), 5).sort().values
    found = vtc.CDPruner(keep=5, relevance="none").select(tokens)
    assert found.indices.tolist() == expected.tolist()
    assert 0 in found.indices.tolist()


def test_cdpruner_wants_what_the_text_names_and_no_doubles() -> None:
    features = randn(16, 20, seed=2)
    features[9] = features[4]
    text = features[4:5] * 3
    tokens = vision_tokens(4, 4, features=features, text=text)
    chosen = vtc.CDPruner(keep=4).select(tokens).indices.tolist()
    assert 4 in chosen
    assert 9 not in chosen
    rows = torch.nn.functional.normalize(features, dim=1)
    found = rows @ rows[4]
    scaled = (found - found.min() + 1e-6) / (found.max() - found.min())
    kernel = scaled[:, None] * (rows @ rows.T) * scaled
    assert chosen[0:4] == naive.dpp_greedy(kernel, 4).sort().values.tolist()


# ---- VisPruner ----------------------------------------------------------------------------------
@quick
@given(
    st.integers(4, 20), st.integers(0, 9), st.integers(1, 9), st.sampled_from([0.0, 0.5, 0.75, 1.0])
)
def test_vispruner_follows_its_definition(n: int, seed: int, at_once: int, share: float) -> None:
    tokens, k = vision_tokens(1, n, seed), n // 2
    assert tokens.cls_attention is not None
    assert tokens.encoder is not None
    similarity = naive.cosines(tokens.encoder)
    ranked = sorted(range(n), key=lambda i: -float(tokens.cls_attention[i]))  # type: ignore[index]
    first = int(k * share)
    left = ranked[first:]
    while len(left) > k - first:
        if k == first:
            left = []
            break
        a, b = left[0::2], left[1::2]
        double = {i: max(float(similarity[i, j]) for j in b) for i in a}
        count = min(at_once, len(left) - (k - first), len(a))
        a = sorted(a, key=lambda i: -double[i])[count:]
        left = a + b
    method = vtc.VisPruner(keep=k, important=share, at_once=at_once)
    assert method.select(tokens).indices.tolist() == sorted(ranked[:first] + left)


def test_vispruner_drops_doubles_first_and_odd_numbers_work() -> None:
    encoder = torch.eye(9).double()
    encoder[2] = encoder[1]
    attention = torch.linspace(1, 0.1, 9)
    tokens = vision_tokens(3, 3, encoder=encoder, cls_attention=attention)
    found = vtc.VisPruner(keep=8, important=0.0).select(tokens).indices.tolist()
    assert found == [0, 1, 3, 4, 5, 6, 7, 8]
    same = vision_tokens(3, 3, encoder=torch.ones(9, 4).double())
    assert len(vtc.VisPruner(keep=4).select(same).indices) == 4


@quick
@given(st.integers(8, 60), st.integers(0, 9), st.integers(1, 9), st.integers(1, 4))
def test_vispruner_chooses_the_same_however_many_neighbours_it_remembers(
    n: int, seed: int, at_once: int, nearest: int
) -> None:
    """Sets hold few of the nearest tokens towards the end, and then all are looked at."""
    tokens = vision_tokens(1, n, seed)
    assert tokens.cls_attention is not None
    assert tokens.encoder is not None
    cosines = naive.cosines(tokens.encoder)
    left = tokens.cls_attention.argsort(descending=True)
    method = vtc.VisPruner(at_once=at_once)
    with mock.patch.object(vispruner, "_NEAREST", nearest):
        found = method.without_doubles(cosines, left, n // 4)
    expected = left
    while len(expected) > n // 4:  # as published
        a, b = expected[::2], expected[1::2]
        count = min(at_once, len(expected) - n // 4, len(a))
        double = cosines[a][:, b].amax(1)
        expected = torch.cat([a[double.argsort(descending=True, stable=True)[count:]], b])
    assert found.tolist() == expected.tolist()


@pytest.mark.slow
def test_vispruner_is_quick_at_2880_tokens() -> None:
    tokens = vision_tokens(1, 2880, encoder=randn(2880, 64).float())
    since = time.process_time()
    assert len(vtc.VisPruner(keep=288).select(tokens).indices) == 288
    assert time.process_time() - since < 3


# ---- VScan --------------------------------------------------------------------------------------
@quick
@given(st.integers(0, 9), st.sampled_from([32, 64, 96, 33]))
def test_vscan_scans_windows_and_the_whole(seed: int, k: int) -> None:
    tokens = vision_tokens(24, 24, seed)
    assert tokens.low_attention is not None
    assert tokens.cls_attention is not None
    found = vtc.VScan(keep=k).select(tokens)
    chosen = found.indices.tolist()
    assert len(chosen) == k
    window = [r // 6 * 4 + c // 6 for _, r, c in tokens.grid.tolist()]
    local = set()
    for one in range(16):
        inside = [i for i in range(576) if window[i] == one]
        best = sorted(inside, key=lambda i: -float(tokens.low_attention[i]))  # type: ignore[index]
        local |= set(best[: k // 2 // 16])
    assert local <= set(chosen)
    missing = k // 2 - len(local)
    rest = [i for i in range(576) if i not in local]
    local |= set(sorted(rest, key=lambda i: -float(tokens.low_attention[i]))[:missing])  # type: ignore[index]
    rest = [i for i in range(576) if i not in local]
    seen = sorted(rest, key=lambda i: -float(tokens.cls_attention[i]))[: k - len(local)]  # type: ignore[index]
    assert set(chosen) == local | set(seen)
    expected = naive.merge_into_nearest(tokens.features, tokens.features, found.indices)
    torch.testing.assert_close(found.features, expected)


@quick
@given(st.integers(0, 99), st.integers(1, 40))
def test_vscan_s_means_weighted_by_their_counts_sum_to_all_tokens(seed: int, k: int) -> None:
    """Each mean times the tokens it stands for, added up, is the sum of the image."""
    tokens = vision_tokens(7, 7, seed)
    found = vtc.VScan(keep=k, then=1).select(tokens)
    assert found.features is not None
    cosines = naive.cosines(tokens.features)
    group = cosines[:, found.indices].argmax(1)
    group[found.indices] = torch.arange(k)
    counts = torch.bincount(group, minlength=k)
    assert int(counts.sum()) == 49
    total = (counts[:, None] * found.features).sum(0)
    torch.testing.assert_close(total, tokens.features.sum(0))


def test_vscan_cuts_in_the_middle_by_the_last_token() -> None:
    method = vtc.VScan(keep=96)
    assert method.prune_layers(32) == (16,)
    image = torch.tensor([-1] * 3 + [0] * 96 + [-1] * 4)
    state = LayerState(
        layer=16,
        num_layers=32,
        hidden=torch.zeros(103, 4),
        image=image,
        text=torch.arange(103) >= 99,
        grid=torch.full((103, 3), -1),
        prompt_length=103,
        original=(576,),
        attention={},
        ahead=rand(103, 5)[None],
    )
    found = method.prune(state)
    assert found is not None
    assert state.ahead is not None
    assert found.indices.tolist() == state.ahead[0, 3:99].topk(32).indices.sort().values.tolist()
    for other in (method, vtc.PyramidDrop(keep=0.1, layers=(16,)), vtc.TransPrune(keep=0.1)):
        deaf = dataclasses.replace(state, ahead=None, layer=other.prune_layers(32)[0])
        with pytest.raises(ValueError, match="ahead"):
            other.prune(deaf)
    assert vtc.VScan(then=1).stages == ("sequence",)
    assert vtc.VScan(keep=1.0).stages == ("sequence",)
    assert vtc.VScan(layer=3).prune_layers(8) == (3,)


# ---- correlation --------------------------------------------------------------------------------
def test_density_is_the_share_that_does_not_repeat_itself() -> None:
    method = vtc.Correlation()
    assert method.density(torch.ones(32, 8)) == pytest.approx(0.1)
    assert method.density(torch.eye(32)) == 1
    keys = torch.cat([torch.ones(24, 40), 5 * torch.eye(40)[:8]])
    assert method.density(keys) == pytest.approx(8 / 32)
    assert method.density(keys.flip(0)) == method.density(7 * keys) == method.density(keys)


def test_density_counts_the_others_and_strictly_more() -> None:
    """A patch is not its own double, and as many as the threshold says are not too many."""
    for group, redundant in ((5, False), (6, True)):  # beta of 32 patches are 4 others
        keys = torch.cat([torch.ones(group, 40), 9 * torch.eye(40)[: 32 - group]])
        expected = 1 - group / 32 if redundant else 1.0
        assert vtc.Correlation().density(keys) == pytest.approx(expected)
    assert vtc.Correlation(beta=0).density(torch.eye(8)) == 1
    # As similar as alpha itself is not more similar.
    right = torch.eye(4).repeat_interleave(2, 0)
    assert vtc.Correlation(alpha=1.0, beta=0).density(right) == 1
    assert vtc.Correlation(alpha=0.0, beta=0, least=0.5).density(torch.eye(4)) == 1
    assert vtc.Correlation(alpha=0.99, beta=0, least=0.5).density(right) == 0.5


@quick
@given(st.integers(0, 9), st.floats(0, 1), st.floats(0, 1))
def test_density_falls_with_stricter_thresholds(seed: int, alpha: float, beta: float) -> None:
    keys = randn(30, 3, seed=seed)
    base = vtc.Correlation(alpha=alpha, beta=beta).density(keys)
    assert vtc.Correlation(alpha=alpha / 2, beta=beta).density(keys) <= base
    assert vtc.Correlation(alpha=alpha, beta=min(1, beta + 0.2)).density(keys) >= base


def test_outliers_stay_whatever_the_density() -> None:
    attention = torch.full((36,), 0.01)
    attention[20] = 0.5
    low = torch.linspace(1, 0, 36)
    alike = torch.ones(36, 8).double()
    tokens = vision_tokens(6, 6, cls_attention=attention, low_attention=low, keys=alike)
    found = vtc.Correlation().select(tokens)
    assert found.indices.tolist() == [0, 1, 2, 3, 20]  # round(0.1 * 36) and the outlier
    even = vision_tokens(6, 6, cls_attention=torch.full((36,), 0.1), low_attention=low, keys=alike)
    assert vtc.Correlation().select(even).indices.tolist() == [0, 1, 2, 3]
    expected = naive.merge_into_nearest(tokens.features, alike, found.indices, attention)
    torch.testing.assert_close(found.features, expected)


@pytest.mark.parametrize("keep", [None, 5])
def test_correlation_s_means_weigh_the_attention_of_the_last_layer(keep: int | None) -> None:
    """Not the early layer's, and not evenly: attention differs within every group."""
    tokens = vision_tokens(6, 6, seed=4, low_attention=rand(36, 8))
    assert tokens.keys is not None
    assert tokens.cls_attention is not None
    groups = tokens.keys[:6].repeat_interleave(6, 0) + 0.01 * tokens.keys
    tokens = dataclasses.replace(tokens, keys=groups)
    found = vtc.Correlation(keep=keep).select(tokens)
    cosine, kept = naive.cosines(groups), found.indices.tolist()
    assert len(kept) < 12
    joins = [i if i in kept else max(kept, key=lambda j: float(cosine[i, j])) for i in range(36)]
    assert found.features is not None
    for row, own in zip(found.features, kept, strict=True):
        members = [i for i in range(36) if joins[i] == own]
        shares = tokens.cls_attention[members].double()
        mean = (shares[:, None] * tokens.features[members]).sum(0) / shares.sum()
        torch.testing.assert_close(row, mean, atol=1e-5, rtol=1e-5)


def test_correlation_compresses_crops_one_by_one_and_needs_its_signals() -> None:
    """Interleaved tiles are in order again, each with its own number and means."""
    crop = torch.tensor([0, 1] * 18)
    tokens = vision_tokens(6, 6, seed=2, crop=crop)
    found = vtc.Correlation(keep=4).select(tokens)
    assert found.features is not None
    for tile in (0, 1):
        places = torch.arange(tile, 36, 2)
        alone = dataclasses.replace(
            tokens,
            features=tokens.features[places],
            crop=None,
            **{name: getattr(tokens, name)[places]
               for name in ("keys", "cls_attention", "low_attention")},
        )  # fmt: skip
        own = vtc.Correlation(keep=4).select(alone)
        of_tile = crop[found.indices] == tile
        assert found.indices[of_tile].tolist() == places[own.indices].tolist()
        torch.testing.assert_close(found.features[of_tile], own.features)
    assert found.indices.tolist() == sorted(found.indices.tolist())
    assert len(found.indices) == 8
    for name in ("keys", "cls_attention", "low_attention"):
        with pytest.raises(ValueError, match="cls_attention, low_attention, keys: needed"):
            vtc.Correlation().select(dataclasses.replace(tokens, **{name: None}))
    assert vtc.Correlation(keep=36).select(tokens).features is None


def test_correlation_s_outliers_lie_above_the_quartiles() -> None:
    """Q3 + 1.5 (Q3 - Q1) by linear interpolation, itself not above it."""
    attention = torch.arange(1.0, 9.0)
    low = torch.zeros(8)
    low[0] = 1.0
    keys = torch.ones(8, 4).double()
    for largest, outlier in ((11.4, False), (11.6, True)):  # 6.25 + 1.5 * 3.5 = 11.5
        attention[7] = largest
        tokens = vision_tokens(2, 4, cls_attention=attention, low_attention=low, keys=keys)
        kept = vtc.Correlation().select(tokens).indices.tolist()
        assert kept == ([0, 7] if outlier else [0])


def test_blank_crops_collapse_and_dense_ones_stay() -> None:
    keys = torch.cat([torch.ones(16, 40), 9 * torch.eye(40)[:16]]).double()
    crop = torch.tensor([0] * 16 + [1] * 16)
    even = torch.full((32,), 0.1)
    tokens = vision_tokens(4, 8, keys=keys, crop=crop, cls_attention=even)
    found = vtc.Correlation().select(tokens).indices
    assert int((found < 16).sum()) == 2
    assert int((found >= 16).sum()) == 16


def test_sampling_repeats_itself_by_its_seed() -> None:
    tokens = vision_tokens(6, 6)

    def drawn(seed: int) -> list[int]:
        return (
            vtc.Correlation(keep=9, sampler="multinomial", seed=seed)
            .select(tokens)
            .indices.tolist()
        )

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    second = dataclasses.replace(tokens, image=1)
    method = vtc.Correlation(keep=9, sampler="multinomial", seed=1)
    assert method.select(second).indices.tolist() != drawn(1)


@quick
@given(st.integers(0, 30), st.floats(-1, 1), st.floats(0, 1), st.floats(0.05, 1))
def test_a_crop_keeps_its_density_and_at_most_its_outliers_besides(
    seed: int, alpha: float, beta: float, least: float
) -> None:
    method = vtc.Correlation(alpha=alpha, beta=beta, least=least)
    tokens = vision_tokens(6, 6, seed, cls_attention=rand(36, seed).double() ** 6)
    assert tokens.keys is not None
    assert tokens.cls_attention is not None
    low, high = tokens.cls_attention.quantile(torch.tensor([0.25, 0.75]).double())
    outliers = int((tokens.cls_attention > high + 1.5 * (high - low)).sum())
    sampled = max(1, round(method.density(tokens.keys) * 36))
    kept = len(method.select(tokens).indices)
    assert max(sampled, outliers) <= kept <= min(36, sampled + outliers)


def test_a_tiled_image_without_redundancy_stays_as_it_is() -> None:
    crop = torch.arange(3).repeat_interleave(12)
    tokens = vision_tokens(6, 6, keys=torch.eye(36).double(), crop=crop)
    found = vtc.Correlation().select(tokens)  # D = 1 in every crop
    assert found.indices.tolist() == list(range(36))
    assert found.features is None
    assert tokens.keys is not None
    keys = tokens.keys.clone()
    keys[:12] = 1.0
    some = vtc.Correlation().select(dataclasses.replace(tokens, keys=keys))
    assert some.features is not None
    stays = some.indices >= 12
    assert some.indices[stays].tolist() == list(range(12, 36))
    torch.testing.assert_close(some.features[stays], tokens.features[12:])


@pytest.mark.parametrize(
    ("name", "accepted"), [("alpha", "[-1, 1]"), ("beta", "[0, 1]"), ("least", "(0, 1]")]
)
def test_thresholds_say_what_they_accept(name: str, accepted: str) -> None:
    wrong: Any
    for wrong, error in ((1.5, ValueError), (float("nan"), ValueError), ("1", TypeError)):
        with pytest.raises(error, match=re.escape(f"{name}: expected a number in {accepted}, got")):
            vtc.Correlation(**{name: wrong})
    if name == "least":
        with pytest.raises(ValueError, match=r"least: expected a number in \(0, 1\], got 0"):
            vtc.Correlation(least=0)


@pytest.mark.parametrize("sampler", ["topk", "multinomial"])
def test_a_fixed_budget_holds_the_outliers(sampler: Any) -> None:
    attention = torch.full((36,), 0.01)
    attention[[20, 30]] = torch.tensor([0.5, 0.4])
    low = torch.linspace(1, 0, 36)
    tokens = vision_tokens(6, 6, cls_attention=attention, low_attention=low)

    def kept(keep: int) -> list[int]:
        return vtc.Correlation(keep=keep, sampler=sampler).select(tokens).indices.tolist()

    assert kept(1) == [20]
    assert kept(2) == [20, 30]
    assert len(kept(5)) == 5
    assert {20, 30} < set(kept(5))
    if sampler == "topk":
        assert kept(5) == [0, 1, 2, 20, 30]
    bare = VisionTokens(tokens.features, tokens.grid)
    assert len(vtc.Correlation(keep=1.0).select(bare).indices) == 36
