# SPDX-License-Identifier: Apache-2.0
"""PruMerge and PruMerge+ as pure functions."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vtc.core import VisionTokens, make
from vtc.methods.prumerge import PruMerge, PruMergePlus, _highest

quick = settings(max_examples=40, deadline=None, derandomize=True)


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def vision_tokens(n: int, seed: int = 0, cls: bool = True, **more: Any) -> VisionTokens:
    """Tokens whose projector adds one to every state."""
    states = randn(n, 6, seed=seed)
    fields: dict[str, Any] = {
        "features": states + 1,
        "grid": torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(n)),
        "cls_attention": randn(n, seed=seed + 1).softmax(0),
        "keys": randn(n, 8, seed=seed + 2),
        "heads": 2,
        "cls_query": 3 * randn(8, seed=seed + 3) if cls else None,
        "cls_key": randn(8, seed=seed + 5) if cls else None,
        "encoder": states,
        "encoder_cls": randn(6, seed=seed + 4) if cls else None,
        "project": lambda rows: rows + 1,
    }
    return VisionTokens(**{**fields, **more})


def looking(weights: Tensor, **more: Any) -> VisionTokens:
    """Tokens of a tower without [CLS] that receive the attention given."""
    return vision_tokens(len(weights), cls=False, cls_attention=weights, **more)


def attention_of(tokens: VisionTokens) -> list[float]:
    if tokens.cls_query is None or tokens.cls_key is None:
        return tokens.cls_attention.tolist()
    every = torch.cat([tokens.keys, tokens.cls_key[None]])
    return (every @ tokens.cls_query / tokens.keys.shape[1] ** 0.5).softmax(0).tolist()[:-1]


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = min(int(place), len(ordered) - 2)
    return ordered[low] + (place - low) * (ordered[low + 1] - ordered[low])


def outliers(a: list[float]) -> list[int]:
    q1, q3 = percentile(a, 0.25), percentile(a, 0.75)
    ranked = sorted(range(len(a)), key=lambda i: (-a[i], i))
    return ranked[: max(1, sum(v > q3 + 1.5 * (q3 - q1) for v in a))]


def merged(tokens: VisionTokens, kept: list[int], neighbours: int, aggregate: bool) -> Tensor:
    """The contents by loops over patches, in the order of `kept`, projected."""
    a, n = attention_of(tokens), len(tokens)
    x = tokens.encoder
    rows = []
    for i in kept:
        alike = torch.cosine_similarity(tokens.keys[i : i + 1], tokens.keys).tolist()
        nearest = sorted((j for j in range(n) if j != i), key=lambda j: (-alike[j], j))
        rows.append(x[i] + sum(a[j] * x[j] for j in nearest[:neighbours]))
    rest = [j for j in range(n) if j not in kept]
    if aggregate and rest:
        rows.append(sum(a[j] * x[j] for j in rest))
    return torch.stack(rows) + 1


@pytest.mark.parametrize("cls", [PruMerge, PruMergePlus])
def test_settings_are_documented_kept_and_checked(cls):
    method = cls(keep=9, neighbours=4, aggregate=False, order="raster", positions="original")
    assert make(json.loads(json.dumps(method.to_dict()))) == method
    assert make(cls.name) == cls()
    assert cls().plus == (cls is PruMergePlus)
    for field in dataclasses.fields(cls):
        assert f"{field.name}:" in cls.__doc__
    for setting, wrong, error in (
        ("keep", 0.0, ValueError),
        ("keep", "half", TypeError),
        ("plus", 1, TypeError),
        ("aggregate", None, TypeError),
        ("neighbours", 0, ValueError),
        ("neighbours", None, TypeError),
        ("order", "code", ValueError),
        ("positions", "new", ValueError),
    ):
        with pytest.raises(error, match=f"^{setting}: "):
            cls(**{setting: wrong})


@pytest.mark.parametrize("cls", [PruMerge, PruMergePlus])
def test_missing_signals_are_named(cls):
    for missing in ("keys", "encoder"):
        with pytest.raises(ValueError, match=missing):
            cls(keep=4).select(vision_tokens(9, **{missing: None}))
    with pytest.raises(ValueError, match="cls_attention"):
        cls(keep=4).select(vision_tokens(9, cls=False, cls_attention=None))


@quick
@given(
    st.integers(2, 60),
    st.integers(0, 99),
    st.booleans(),
    st.sampled_from([1, 3, 32]),
    st.booleans(),
    st.booleans(),
)
def test_the_adaptive_form_follows_its_definition(n, seed, cls, neighbours, aggregate, plus):
    tokens = vision_tokens(n, seed, cls)
    kept = outliers(attention_of(tokens))
    if plus:
        stride = max(1, int(int(n / len(kept)) / 3))
        kept = kept + [i for i in range(0, n, stride) if i not in kept]
    method = PruMerge(plus=plus, neighbours=neighbours, aggregate=aggregate)
    found = method.select(tokens)
    expected = merged(tokens, kept, neighbours, aggregate)
    torch.testing.assert_close(found.features, expected)
    indices = found.indices.tolist()
    assert indices == sorted(set(indices))
    assert set(kept) <= set(indices) <= set(range(n))
    assert len(indices) == len(expected)
    twin = PruMergePlus if plus else PruMerge
    again = twin(neighbours=neighbours, aggregate=aggregate).select(tokens)
    assert torch.equal(again.features, found.features)


@quick
@given(st.integers(2, 50), st.integers(0, 99), st.data(), st.booleans(), st.booleans())
def test_a_given_budget_is_met_and_goes_by_attention(n, seed, data, plus, aggregate):
    k = data.draw(st.integers(1, n - 1))
    tokens = vision_tokens(n, seed)
    a = attention_of(tokens)
    found = PruMerge(keep=k, plus=plus, aggregate=aggregate, neighbours=5).select(tokens)
    assert len(set(found.indices.tolist())) == k == len(found.features)
    places = k - 1 if aggregate and k > 1 else k
    kept = sorted(range(n), key=lambda i: (-a[i], i))[: places - (places // 2 if plus else 0)]
    free = sorted(set(range(n)) - set(kept))
    if plus:
        even = places // 2
        grid = [(2 * i + 1) * n // (2 * even) for i in range(even)]
        added = [g for g in grid if g in free]
        for g in (g for g in grid if g not in free):
            left = [i for i in free if i not in added]
            added.append(min(left, key=lambda i: (abs(i - g), i)))
        kept = kept + sorted(added)
    expected = merged(tokens, kept, 5, aggregate and k > 1)
    torch.testing.assert_close(found.features, expected)


@pytest.mark.parametrize("parts", [6, 9, 18])
def test_the_fixed_grid_is_the_one_of_the_training_mode(parts):
    n = 576
    half = n // parts
    step = n // half
    weights = torch.zeros(n, dtype=torch.float64)
    weights[torch.arange(half) * step] = 1.0  # never where the grid is
    method = PruMerge(keep=2 * half + 1, plus=True, order="raster", neighbours=1)
    indices = method.select(looking(weights)).indices.tolist()
    by_code = [*range(0, n, step), *range(step // 2, n, step)]
    assert len(by_code) == 2 * half
    assert len(indices) == 2 * half + 1
    assert set(by_code) < set(indices)


def test_constant_attention_has_no_outliers_and_falls_back_to_one():
    flat = torch.full((12,), 1 / 12, dtype=torch.float64)
    found = PruMerge().select(looking(flat))
    assert found.indices.tolist() == [0, 11]
    torch.testing.assert_close(found.features[1], looking(flat).encoder[1:].mean(0) * 11 / 12 + 1)
    plus = PruMergePlus(aggregate=False).select(looking(flat))
    assert plus.indices.tolist() == [0, 4, 8]


@pytest.mark.parametrize("n", [30, 300])
def test_a_grid_of_every_patch_leaves_nothing_to_sum_up(n):
    weights = torch.zeros(n, dtype=torch.float64)
    weights[: 7 * n // 30] = 1.0  # so many outliers that the grid's step is 1
    tokens = looking(weights)
    found = PruMergePlus(neighbours=1).select(tokens)
    assert found.indices.tolist() == list(range(n))
    torch.testing.assert_close(found.features, merged(tokens, list(range(n)), 1, True))


def test_one_spike_keeps_one():
    spike = torch.full((20,), 0.01, dtype=torch.float64)
    spike[7] = 0.8
    assert PruMerge(aggregate=False).select(looking(spike)).indices.tolist() == [7]


def test_without_attention_outside_the_kept_nothing_is_added():
    weights = torch.zeros(20, dtype=torch.float64)
    weights[5] = 1.0
    tokens = looking(weights)
    found = PruMerge().select(tokens)
    assert found.indices.tolist() == [5, 19]
    torch.testing.assert_close(found.features[0], tokens.features[5])
    assert torch.equal(found.features[1], torch.ones_like(found.features[1]))  # of a sum of 0


def test_orders_hold_the_same_rows():
    weights = torch.tensor([0.1, 0.2, 0.0, 0.9, 0.0, 0.3, 0.0, 0.0], dtype=torch.float64)
    tokens = looking(weights)
    published = PruMerge(keep=4, neighbours=2).select(tokens)
    raster = PruMerge(keep=4, neighbours=2, order="raster").select(tokens)
    original = PruMerge(keep=4, neighbours=2, positions="original").select(tokens)
    assert published.indices.tolist() == [1, 3, 5, 7]
    assert torch.equal(published.features[[2, 0, 1, 3]], raster.features)
    assert torch.equal(original.features, raster.features)


@pytest.mark.parametrize("cls", [PruMerge, PruMergePlus])
def test_all_that_fits_is_left_alone(cls):
    for keep in (1.0, 9, 50):
        found = cls(keep=keep).select(vision_tokens(9))
        assert found.indices.tolist() == list(range(9))
        assert found.features is None
    assert cls().select(vision_tokens(1)).features is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_inputs_stay_and_runs_agree(dtype):
    tokens = vision_tokens(40)
    small = dataclasses.replace(
        tokens,
        features=tokens.features.to(dtype),
        encoder=tokens.encoder.to(dtype),
        keys=tokens.keys.to(dtype),
        cls_query=tokens.cls_query.to(dtype),
    )
    before = [t.clone() for t in (small.encoder, small.keys, small.cls_query)]
    found = PruMergePlus(keep=15).select(small)
    assert found.features.dtype == dtype
    assert torch.isfinite(found.features).all()
    assert torch.equal(PruMergePlus(keep=15).select(small).features, found.features)
    wide = dataclasses.replace(
        small,
        encoder=small.encoder.float(),
        keys=small.keys.float(),
        cls_query=small.cls_query.float(),
    )
    exact = PruMergePlus(keep=15).select(wide)
    assert torch.equal(exact.indices, found.indices)
    torch.testing.assert_close(found.features.float(), exact.features, rtol=2e-2, atol=2e-2)
    for then, now in zip(before, (small.encoder, small.keys, small.cls_query), strict=True):
        assert torch.equal(then, now)


@given(levels=st.integers(1, 5), n=st.integers(2, 12), seed=st.integers(0, 10**6), data=st.data())
@quick
def test_neighbours_tie_to_the_lowest_patch(levels: int, n: int, seed: int, data: Any) -> None:
    """Whatever `topk` makes of ties: as a stable sort has them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, levels, (4, n), generator=generator).float()
    count = data.draw(st.integers(1, n - 1))
    ranked = values.sort(dim=1, descending=True, stable=True).indices[:, :count]
    assert torch.equal(_highest(values, count), ranked.sort(dim=1).values)
