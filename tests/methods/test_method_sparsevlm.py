# SPDX-License-Identifier: Apache-2.0
"""SparseVLM as a pure function: raters, counts, recycling, and the rotary correction."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vtc.core import LayerState, make
from vtc.methods.sparsevlm import SparseVLM

START = 3


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def state_of(
    layer: int, vision: int = 40, text: int = 5, heads: int | None = None, **more: Any
) -> LayerState:
    """Three system tokens, one image, then text, about to enter a layer of 32."""
    s = START + vision + text
    image = torch.full((s,), -1)
    image[START : START + vision] = 0
    grid = torch.full((s, 3), -1)
    grid[START : START + vision] = torch.stack(
        [torch.zeros(vision), torch.zeros(vision), torch.arange(vision)], dim=1
    ).long()
    rows = (text, s) if heads is None else (heads, text, s)
    fields: dict[str, Any] = {
        "layer": layer,
        "num_layers": 32,
        "hidden": randn(s, 6, seed=layer),
        "image": image,
        "text": torch.arange(s) >= START + vision,
        "grid": grid,
        "prompt_length": s,
        "original": (vision,),
        "attention": {layer - 1: randn(*rows, seed=layer + 1).softmax(-1)},
        "recorded": {(0, "input"): randn(s, 6, seed=7)},
    }
    return LayerState(**{**fields, **more})


# ---- counts -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("lists", "counts"),
    [
        ((300, 200, 110), (309, 204, 113)),
        ((303, 110, 36), (312, 117, 39)),
        ((238, 48, 26), (249, 55, 27)),
        ((66, 30, 17), (82, 32, 18)),
    ],
)
def test_counts_of_the_published_lists(lists: tuple[int, ...], counts: tuple[int, ...]) -> None:
    method = SparseVLM(keep=lists)
    assert method.prune_layers(32) == (3, 7, 16)
    n, memory = 576, None
    for layer, expected in zip((3, 7, 16), counts, strict=True):
        chosen = method.prune(state_of(layer, n, original=(576,), memory=memory))
        n, memory = len(chosen.indices), chosen.memory
        assert n == expected
    averages = {110: 206.5, 36: 145.4, 26: 114.1, 17: 82.2}
    a, b, c = counts
    mean = (3 * 576 + 4 * a + 9 * b + 16 * c) / 32
    assert mean == pytest.approx(averages[lists[-1]], abs=0.05)


def test_default_is_the_published_list_by_shares_and_scales_with_depth() -> None:
    method = SparseVLM()
    assert [method.left(576, s, 3) for s in range(3)] == [300, 200, 110]
    assert [method.left(2880, s, 3) for s in range(3)] == [1500, 1000, 550]
    assert method.prune_layers(8) == (1, 2, 4)
    assert method.taps(8) == {0: "text", 1: "text", 3: "text"}


def test_one_number_is_reached_by_equal_factors() -> None:
    method = SparseVLM(keep=0.125)
    assert [method.left(512, s, 3) for s in range(3)] == [256, 128, 64]
    assert [SparseVLM(keep=8).left(512, s, 3) for s in range(3)] == [128, 32, 8]


def test_images_of_a_sample_share_one_budget() -> None:
    image = torch.tensor([-1] + [0] * 10 + [-1] + [1] * 20 + [-1] * 4)
    s = len(image)
    state = state_of(3, 30, 4).__class__(
        **{
            **vars(state_of(3, 30, 4)),
            "hidden": randn(s, 6),
            "image": image,
            "text": (image < 0) & (torch.arange(s) > 0),
            "grid": torch.zeros(s, 3, dtype=torch.long),
            "original": (10, 20),
            "attention": {2: randn(5, s, seed=3).softmax(-1)},
            "recorded": {(0, "input"): randn(s, 6)},
        }
    )
    chosen = SparseVLM(keep=(0.5, 0.5, 0.5), recycle=False).prune(state)
    assert len(chosen.indices) == 15


# ---- raters -------------------------------------------------------------------------------------
def entering(vision: Tensor, text: Tensor) -> dict[tuple[int, str], Tensor]:
    return {(0, "input"): torch.cat([torch.zeros(START, vision.shape[1]), vision, text])}


def test_a_word_like_the_image_is_the_only_rater() -> None:
    vision = torch.tensor([[1.0, 0.0]]).expand(40, 2)
    text = torch.tensor([[0.0, 1.0], [5.0, 0.0], [0.0, -1.0], [0.1, 0.0], [0.0, 0.3]])
    state = state_of(3, recorded=entering(vision, text))
    chosen = SparseVLM(keep=(10, 5, 2), recycle=False).prune(state)
    assert chosen.memory.tolist() == [False, True, False, False, False]
    row = state.attention[2][1, START : START + 40]
    best = sorted(sorted(range(40), key=lambda i: (-float(row[i]), i))[:10])
    assert chosen.indices.tolist() == best


def test_equal_words_all_rate() -> None:
    vision, text = randn(40, 6, seed=1), randn(1, 6, seed=2).expand(5, 6)
    state = state_of(3, recorded=entering(vision, text))
    chosen = SparseVLM(keep=(10, 5, 2), recycle=False).prune(state)
    assert chosen.memory.all()
    mean = state.attention[2][:, START : START + 40].mean(0)
    assert chosen.indices.tolist() == mean.topk(10).indices.sort().values.tolist()


def test_raters_stay_the_same_in_later_layers() -> None:
    method = SparseVLM(keep=(10, 5, 2), recycle=False)
    raters = torch.tensor([False, False, True, False, False])
    state = state_of(7, memory=raters)
    chosen = method.prune(state)
    row = state.attention[6][2, START : START + 40]
    assert chosen.indices.tolist() == row.topk(5).indices.sort().values.tolist()
    assert torch.equal(chosen.memory, raters)


def test_raters_are_remembered_where_nothing_goes() -> None:
    state = state_of(3)
    chosen = SparseVLM(keep=(1.0, 0.5, 0.5)).prune(state)
    assert chosen.indices.tolist() == list(range(40))
    assert chosen.features is None
    entered = state.recorded[0, "input"]
    share = (entered[START : START + 40] @ entered[-5:].T).softmax(1).mean(0)
    assert chosen.memory.tolist() == [bool(x > share.mean()) for x in share]


@pytest.mark.parametrize("keep", [(300, 30, 17), (40, 30, 17), (39, 30, 17), 40, 0.999])
@pytest.mark.parametrize("recycle", [True, False])
def test_a_list_longer_than_the_image_drops_one(keep: Any, recycle: bool) -> None:
    """Published is the least of the list's number and n - 1, at every layer."""
    state = state_of(3)
    hidden, row = state.hidden[START : START + 40], state.attention[2][:, START : START + 40]
    chosen = SparseVLM(keep=keep, recycle=recycle).prune(state)
    worst = int(row[chosen.memory].mean(0).argmin())
    rest = [i for i in range(40) if i != worst]
    if not recycle:
        assert chosen.indices.tolist() == rest
        return
    # The one that goes is recycled, and comes last.
    assert chosen.indices.tolist() == list(range(40))
    torch.testing.assert_close(chosen.features, hidden[[*rest, worst]])


def test_only_a_share_of_one_keeps_all_and_one_token_always_stays() -> None:
    whole = SparseVLM(keep=1.0)
    assert [whole.stays(n, (40,), 2, 3) for n in (1, 40)] == [1, 40]
    assert [SparseVLM(keep=(1.0, 50, 1)).stays(20, (40,), stage, 3) for stage in range(3)] == [
        20, 19, 1
    ]  # fmt: skip
    assert SparseVLM(keep=3).stays(1, (40,), 2, 3) == 1
    assert SparseVLM(keep=(9, 9, 9)).stays(60, (40, 20), 0, 3) == 18


def test_without_text_tokens_stay_evenly() -> None:
    chosen = SparseVLM(keep=(10, 5, 2)).prune(state_of(3, text=0))
    assert chosen.indices.tolist() == list(range(0, 40, 4))


# ---- recycling ----------------------------------------------------------------------------------
def two_groups() -> LayerState:
    """Ten tokens that all look at, thirty that fall into two far groups."""
    hidden = torch.zeros(START + 45, 6)
    hidden[START : START + 10] = randn(10, 6, seed=3)
    hidden[START + 10 : START + 25] = 10 + 0.01 * randn(15, 6, seed=4)
    hidden[START + 25 : START + 40] = -10 + 0.01 * randn(15, 6, seed=5)
    attention = torch.full((5, START + 45), 0.001)
    attention[:, START : START + 10] = 0.05
    return state_of(3, hidden=hidden, attention={2: attention})


def test_two_groups_become_their_means() -> None:
    state = two_groups()
    # all thirty that go are recycled, into int(0.05 * 30) + 1 = 2
    chosen = SparseVLM(keep=(10, 5, 2), tau=1.0, theta=0.05).prune(state)
    assert len(chosen.indices) == 12
    vision = state.hidden[START : START + 40]
    assert torch.equal(chosen.features[:10], vision[:10])
    groups = {10: vision[10:25].mean(0), -10: vision[25:].mean(0)}
    found = {round(float(row.mean()), 0): row for row in chosen.features[10:]}
    assert set(found) == {10.0, -10.0}
    for sign, mean in groups.items():
        torch.testing.assert_close(found[float(sign)], mean)


def test_means_follow_the_kept_tokens_or_stand_at_their_centres() -> None:
    state = two_groups()
    contiguous = SparseVLM(keep=(10, 5, 2), tau=1.0, theta=0.05).prune(state)
    assert contiguous.indices.tolist() == [*range(10), 38, 39]
    original = SparseVLM(keep=(10, 5, 2), tau=1.0, theta=0.05, positions="original").prune(state)
    assert original.indices.tolist()[:10] == list(range(10))
    first, second = original.indices.tolist()[10:]
    assert 10 <= first < 25 <= second < 40
    vision = state.hidden[START : START + 40]
    torch.testing.assert_close(original.features[10], vision[10:25].mean(0))
    torch.testing.assert_close(original.features[11], vision[25:].mean(0))


def test_only_the_best_of_what_goes_is_recycled() -> None:
    state = state_of(3)
    chosen = SparseVLM(keep=(10, 5, 2), tau=0.3, theta=1.0).prune(state)
    everything = state.hidden[START : START + 40]
    raters = chosen.memory
    score = state.attention[2][raters][:, START : START + 40].mean(0)
    ranked = sorted(range(40), key=lambda i: (-float(score[i]), i))
    # int(0.3 * 30) + 1 = 10 tokens, 10 + 1 clusters of which there can be 10: each is its own
    assert torch.equal(chosen.features[:10], everything[sorted(ranked[:10])])
    found = {tuple(row.tolist()) for row in chosen.features[10:]}
    assert found == {tuple(everything[i].tolist()) for i in ranked[10:20]}


def test_bfloat16_states() -> None:
    state = state_of(3)
    wide = SparseVLM(keep=(10, 5, 2)).prune(state)
    narrow = state_of(3, hidden=state.hidden.bfloat16())
    chosen = SparseVLM(keep=(10, 5, 2)).prune(narrow)
    assert chosen.features.dtype == torch.bfloat16
    assert torch.equal(chosen.features[:10], wide.features[:10].bfloat16())


# ---- version 2 ----------------------------------------------------------------------------------
def turned_ones(positions: Tensor, size: int, base: float) -> Tensor:
    """A vector of ones, rotated in the "half" layout."""
    angle = positions[:, None] * base ** (-torch.arange(0, size, 2).float() / size)
    return torch.cat([angle.cos() - angle.sin(), angle.cos() + angle.sin()], dim=1)


def rotary_factor(distance: int, size: int, base: float) -> float:
    """2 / sqrt(size) sum_f cos(distance theta_f)."""
    angles = (distance * base ** (-2 * f / size) for f in range(size // 2))
    return 2 / size**0.5 * sum(math.cos(a) for a in angles)


@pytest.mark.parametrize("heads", [1, 2, 3, 5])
def test_v2_divides_by_the_rotary_factor_and_takes_half_of_the_heads(heads: int) -> None:
    size, base, floor = 8, 100.0, 0.5
    state = state_of(3, heads=heads)
    s = state.hidden.shape[0]
    turned = turned_ones(torch.arange(s).float(), size, base)
    state = state_of(3, heads=heads, recorded={**state.recorded, (2, "rotary"): turned})
    method = SparseVLM(keep=(10, 5, 2), version="v2", floor=floor)
    assert method.by_head
    assert method.positions == "original"
    assert method.records(32)[2] == {"rotary"}
    chosen = method.prune(state)
    assert chosen.features is None
    raters = chosen.memory.nonzero().flatten().tolist()
    assert raters

    def corrected(head: int, rater: int, token: int) -> float:
        place = START + 40 + rater
        factor = max(rotary_factor(place - START - token, size, base), floor)
        return float(state.attention[2][head, rater, START + token]) / factor

    mass = [sum(corrected(h, r, i) for r in raters for i in range(40)) for h in range(heads)]
    best = sorted(range(heads), key=lambda h: -mass[h])[: max(1, heads // 2)]
    score = [sum(corrected(h, r, i) for h in best for r in raters) for i in range(40)]
    expected = sorted(sorted(range(40), key=lambda i: (-score[i], i))[:10])
    assert chosen.indices.tolist() == expected
    plain = state.attention[2][:, raters].mean((0, 1))[START : START + 40]
    assert expected != plain.topk(10).indices.sort().values.tolist()


def test_rotary_factor_is_even_and_largest_at_no_distance() -> None:
    size, base = 128, 10000.0
    turned = turned_ones(torch.arange(2000).double(), size, base)
    factor = turned @ turned[1000] / size**0.5
    assert float(factor[1000]) == pytest.approx(size**0.5)
    assert float(factor.argmax()) == 1000
    for distance in (1, 30, 700):
        assert float(factor[1000 + distance]) == pytest.approx(float(factor[1000 - distance]))
        assert float(factor[1000 + distance]) == pytest.approx(
            rotary_factor(distance, size, base), abs=1e-3
        )


# ---- settings -----------------------------------------------------------------------------------
@pytest.mark.parametrize("version", ["v1.5", "v2"])
def test_settings_survive_json(version: str) -> None:
    method = make("sparsevlm", keep=(0.5, 20, 7), version=version, layers=(2, 4, 6))
    again = make(json.loads(json.dumps(method.to_dict())))
    assert again == method
    assert again.recycle is (version == "v1.5")


@pytest.mark.parametrize(
    ("bad", "names"),
    [
        ({"keep": (0.5, 0, 3)}, "keep"),
        ({"keep": "half"}, "keep"),
        ({"version": "v3"}, "version"),
        ({"tau": 1.5}, "tau"),
        ({"theta": "x"}, "theta"),
        ({"floor": 0}, "floor"),
        ({"recycle": 1}, "recycle"),
        ({"layers": (-1,)}, "layers"),
        ({"positions": "same"}, "positions"),
    ],
)
def test_bad_settings(bad: dict[str, Any], names: str) -> None:
    with pytest.raises((TypeError, ValueError), match=names):
        SparseVLM(**bad)


def test_layers_must_fit_the_model_and_the_list() -> None:
    with pytest.raises(ValueError, match="keep"):
        SparseVLM(keep=(9, 8, 7), layers=(2, 4)).prune_layers(8)
    with pytest.raises(ValueError, match="layers"):
        SparseVLM(layers=(2, 7), keep=0.5).prune_layers(8)
