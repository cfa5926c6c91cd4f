# SPDX-License-Identifier: Apache-2.0
"""TransPrune as a pure function, and its published figures."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from tests.reference.models import collate, samples, shared_model
from vtc.core import LayerState

PARTS = ("attention", "mlp")


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def state_of(layer: int, vision: int = 16, layers: int = 32, **more: Any) -> LayerState:
    """Two system tokens, the image, three of text; what layers 6 to 11 did is random."""
    s = 5 + vision
    image = torch.full((s,), -1)
    image[2 : 2 + vision] = 0
    recorded = {
        (at, f"{part}_{end}"): randn(s, 6, seed=100 * at + 10 * p + e)
        for at in range(6, layer)
        for p, part in enumerate(PARTS)
        for e, end in enumerate(("in", "out"))
    }
    fields: dict[str, Any] = {
        "layer": layer,
        "num_layers": layers,
        "hidden": randn(s, 6, seed=1),
        "image": image,
        "text": torch.arange(s) >= 2 + vision,
        "grid": torch.full((s, 3), -1),
        "prompt_length": s,
        "original": (vision,),
        "attention": {},
        "ahead": randn(3, s, seed=2).softmax(1),
        "recorded": recorded,
    }
    return LayerState(**{**fields, **more})


def test_a_part_that_changes_nothing_and_one_that_turns_at_right_angles() -> None:
    entered = torch.eye(6)[[0, 0, 0, 0, 0, 0, 0, 0]]
    same, across = entered.clone(), torch.eye(6)[[0, 0, 1, 0, 0, 0, 0, 0]]

    def state(left: Tensor) -> LayerState:
        recorded = {
            (6, f"{p}_{e}"): entered if e == "in" else left for p in PARTS for e in ("in", "out")
        }
        return state_of(7, vision=3, recorded=recorded)

    # as it was: m = 1 and c = 1 everywhere, so that the softmax is even
    assert torch.allclose(vtc.TransPrune().variation(state(same)), torch.full((3,), 2 / 3))
    turned = vtc.TransPrune().variation(state(across))
    assert turned.argmax() == 0
    doubled = vtc.TransPrune().variation(state(2 * across))
    assert torch.allclose(doubled, 2 * turned)
    opposite = -same
    opposite[2] = same[2]
    assert torch.allclose(
        vtc.TransPrune().variation(state(opposite)), vtc.TransPrune().variation(state(same))
    )
    signed = vtc.TransPrune(direction="signed").variation(state(opposite))
    assert signed[1] > signed[0]


@pytest.mark.parametrize("layer", [7, 9, 12])
@pytest.mark.parametrize("scope", ["image", "sequence"])
def test_variation_adds_up_over_the_layers_that_ran(layer: int, scope: str) -> None:
    state = state_of(layer)
    total = torch.zeros(16)
    for at in range(6, layer):
        for part in PARTS:
            entered, left = (state.recorded[at, f"{part}_{e}"] for e in ("in", "out"))  # type: ignore[index]
            c = torch.cosine_similarity(left, entered, dim=1).abs()
            m = left.norm(dim=1) / entered.norm(dim=1)
            turned = 1 - c if scope == "sequence" else (1 - c)[2:18]
            share = torch.exp(turned) / torch.exp(turned).sum()
            total += (share[2:18] if scope == "sequence" else share) * m[2:18]
    found = vtc.TransPrune(softmax_scope=scope).variation(state)
    torch.testing.assert_close(found, total)


def layer_variation(state: LayerState, layer: int, method: vtc.TransPrune) -> Tensor:
    """What one layer adds, its softmaxes over what the state holds."""
    total = torch.zeros(len(state.vision))
    for part in PARTS:
        entered, left = (state.recorded[layer, f"{part}_{e}"] for e in ("in", "out"))  # type: ignore[index]
        c = torch.cosine_similarity(left, entered, dim=1)
        powers = (1 - (c if method.direction == "signed" else c.abs())).exp()
        inside = powers[state.vision if method.softmax_scope == "image" else slice(None)]
        m = left.norm(dim=1) / entered.norm(dim=1)
        total += (powers / inside.sum() * m)[state.vision]
    return total


SETTINGS: list[dict[str, Any]] = [
    {},
    {"direction": "signed", "softmax_scope": "sequence"},
    {"schedule": (1.0, 0.625, 0.125)},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_what_a_cut_leaves_keeps_the_weights_that_it_had(settings: dict[str, Any]) -> None:
    """The accumulated vector of a run that gathers it at each cut, as the published code does."""
    method, held, kept, memory = vtc.TransPrune(**settings), 24, torch.arange(24), None
    expected, ran = torch.zeros(24), 6
    for cut in (7, 9, 12):
        whole = state_of(cut, vision=24)
        places = torch.cat([torch.arange(2), 2 + kept, torch.arange(26, 29)])
        state = state_of(
            cut,
            vision=held,
            original=(24,),
            memory=memory,
            recorded={key: rows[places] for key, rows in whole.recorded.items()},
        )
        for layer in range(ran, cut):
            expected = expected + layer_variation(state, layer, method)
        torch.testing.assert_close(method.variation(state), expected)
        chosen = method.prune(state)
        kept, expected, memory = kept[chosen.indices], expected[chosen.indices], chosen.memory
        held, ran = len(kept), cut
    assert held == 3


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("gone", [[], [3], [0, 20]])
def test_what_another_method_dropped_since_changes_no_weight(
    settings: dict[str, Any], gone: list[int]
) -> None:
    method = vtc.TransPrune(**settings)
    chosen = method.prune(state_of(7, vision=24))
    whole = state_of(9, vision=24)
    kept = torch.tensor([i for i in chosen.indices.tolist() if i not in gone])
    places = torch.cat([torch.arange(2), 2 + kept, torch.arange(26, 29)])
    state = state_of(
        9,
        vision=len(kept),
        original=(24,),
        memory=chosen.memory,
        recorded={key: rows[places] for key, rows in whole.recorded.items()},
    )
    left = dataclasses.replace(whole, layer=7, memory=None)
    expected = layer_variation(left, 6, method)[kept]
    for layer in (7, 8):
        expected = expected + layer_variation(state, layer, method)
    torch.testing.assert_close(method.variation(state), expected)


@pytest.mark.parametrize("settings", SETTINGS)
def test_weights_cross_the_cuts_of_a_model(settings: dict[str, Any]) -> None:
    expected, ran, crossed = torch.zeros(0), 1, list[int]()

    class Spy(vtc.TransPrune):
        def prune(self, state: LayerState) -> vtc.Selection:
            nonlocal expected, ran
            if ran == 1:
                expected = torch.zeros(len(state.vision))
            for layer in range(ran, state.layer):
                expected = expected + layer_variation(state, layer, self)
            torch.testing.assert_close(self.variation(state), expected)
            chosen = super().prune(state)
            crossed.append(len(chosen.indices))
            expected, ran = expected[chosen.indices], state.layer
            return chosen

    model = shared_model("clip+llama", "sdpa")
    with vtc.patch(model, Spy(**settings)), torch.no_grad():
        model(**collate(samples("images", "clip")[:1]))
    assert len(crossed) == 3
    assert crossed[0] >= crossed[1] > crossed[2]


def test_scores_mix_two_shares() -> None:
    state, method = state_of(12), vtc.TransPrune()
    variation = method.variation(state)
    assert state.ahead is not None
    looked = state.ahead[:, 2:18].mean(0)
    score = variation / variation.sum() + looked / looked.sum()
    found = method.prune(state)
    assert found.indices.tolist() == score.topk(2).indices.sort().values.tolist()
    only = vtc.TransPrune(alpha=0.0).prune(state)
    assert only.indices.tolist() == looked.topk(2).indices.sort().values.tolist()


@pytest.mark.parametrize(
    ("schedule", "n", "counts"),
    [
        ("high", 576, [504, 360, 72]),
        ("low", 576, [288, 144, 36]),
        ("after_selection", 288, [144, 72, 36]),
        ("after_selection", 192, [96, 48, 24]),
    ],
)
def test_schedules_leave_the_published_numbers(schedule: str, n: int, counts: list[int]) -> None:
    method, left, found = vtc.TransPrune(schedule=schedule), n, []
    for layer in method.prune_layers(32):
        selection = method.prune(state_of(layer, vision=left, original=(576,)))
        left = len(selection.indices)
        found.append(left)
    assert found == counts


@pytest.mark.parametrize(("n", "tera"), [(576, 1.557), (2880, 8.33)])
def test_flops_of_the_high_schedule_are_the_published_ones(n: int, tera: float) -> None:
    """By the convention of the paper: vision tokens only, 4nd^2 + 2n^2d + 3ndm a layer."""
    d, m = 4096, 11008
    left = [n] * 7 + [int(n * 0.875)] * 2 + [int(n * 0.625)] * 3 + [int(n * 0.125)] * 20
    method = vtc.TransPrune()
    assert method.prune_layers(32) == (7, 9, 12)
    flops = sum(4 * k * d**2 + 2 * k**2 * d + 3 * k * d * m for k in left)
    assert flops / 1e12 == pytest.approx(tera, abs=0.005)


def test_layers_scale_and_everything_can_stay() -> None:
    assert list(vtc.TransPrune().watched(32)) == [6, 7, 8, 9, 10, 11]
    assert vtc.TransPrune().prune_layers(8) == (2, 3, 4)
    assert list(vtc.TransPrune().watched(8)) == [1, 2, 3]
    for wrong in ({"schedule": "medium"}, {"direction": "up"}, {"softmax_scope": "batch"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            vtc.TransPrune(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"alpha: expected a number in \[0, 1\], got 2"):
        vtc.TransPrune(alpha=2)


def test_a_schedule_of_ones_own() -> None:
    method = vtc.TransPrune(schedule=(0.75, 0.5, 0.25))
    left, found = 16, []
    for layer in method.prune_layers(32):
        selection = method.prune(state_of(layer, vision=left, original=(16,)))
        left = len(selection.indices)
        found.append(left)
    assert found == [12, 8, 4]
    seen = vtc.describe(method, "llava-1.5").per_layer
    assert seen == (576,) * 7 + (432,) * 2 + (288,) * 3 + (144,) * 20
    again = vtc.make(json.loads(json.dumps(method.to_dict())))
    assert again == method
    assert hash(again) == hash(method)
    assert vtc.TransPrune(schedule=(1, 1, 1)) == vtc.TransPrune(schedule=(1.0, 1.0, 1.0))
    wrong: Any
    for wrong in ((0.5, 0.25), (0.5, 0.6, 0.1), (0.5, 0.25, 0.0), (1.5, 0.5, 0.1), (True, 1, 1)):
        with pytest.raises(ValueError, match=r"schedule: .* or three fractions in \(0, 1\]"):
            vtc.TransPrune(schedule=wrong)
    wrong = 0.5
    with pytest.raises(TypeError, match="schedule"):
        vtc.TransPrune(schedule=wrong)


def test_a_schedule_of_ones_is_the_plain_model() -> None:
    model = shared_model("clip+llama", "sdpa")
    batch = collate(samples("images", "clip"))
    with torch.no_grad():
        plain = model(**batch).logits
        with vtc.patch(model, vtc.TransPrune(schedule=(1, 1, 1))):
            assert torch.equal(model(**batch).logits, plain)
        with vtc.patch(model, vtc.TransPrune(schedule=(1, 1, 0.5))):
            assert not torch.equal(model(**batch).logits, plain)


@pytest.mark.parametrize("scope", ["image", "sequence"])
def test_an_answer_that_is_scored_changes_nothing(scope: Any) -> None:
    state = state_of(9)
    longer = {
        key: torch.cat([rows, randn(7, rows.shape[1], seed=99)])
        for key, rows in state.recorded.items()
    }
    s = len(state.image)
    scored = dataclasses.replace(
        state,
        hidden=torch.cat([state.hidden, randn(7, state.hidden.shape[1], seed=98)]),
        image=torch.cat([state.image, torch.full((7,), -1)]),
        text=torch.cat([state.text, torch.zeros(7, dtype=torch.bool)]),
        grid=torch.full((s + 7, 3), -1),
        recorded=longer,
    )
    method = vtc.TransPrune(softmax_scope=scope)
    assert torch.allclose(method.variation(scored), method.variation(state))
