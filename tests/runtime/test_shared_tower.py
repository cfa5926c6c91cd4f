# SPDX-License-Identifier: Apache-2.0
"""Two models that share a vision tower, or a decoder, each with a patch of its own."""

from __future__ import annotations

import copy
import itertools
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtc
from tests.reference.models import build_model, collate, samples
from tests.runtime.test_exactness import TOLERANCE, difference
from vtc.runtime.hf import taps
from vtc.runtime.hf.override import Override

PAIRS = {
    "tower-read": (vtc.ToDRE(keep=9, second_stage=False), vtc.VisionZip(keep=7)),
    "tower-merged": (vtc.ToMe(keep=9), vtc.FlowCut(keep=12)),
    "same-layer": (vtc.FastV(keep=9, layer=2), vtc.FastV(keep=12, layer=2)),
    "layers": (vtc.FastV(keep=9, layer=2), vtc.SparseVLM(keep=12, layers=(2, 3, 5))),
    "both": (vtc.VisionZip(keep=20) | vtc.FastV(keep=9, layer=2), vtc.ToDRE(keep=9)),
}


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    return model(**collate(samples("ragged", "clip"))).logits


def _sharing(part: str) -> tuple[Any, Any]:
    """Two models that differ but for the `part` of their base models that they share."""
    first, second = build_model("clip", "llama", seed=0), build_model("clip", "llama", seed=5)
    setattr(second.model, part, getattr(first.model, part))
    return first, second


def _state(model: nn.Module) -> dict[str, Any]:
    """All that a patch may change: attributes of instances, and hooks."""
    return {
        f"{name}.{key}": dict(value) if isinstance(value, dict) else value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in ("_parameters", "_buffers", "_modules")
    }


def _same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return before.keys() == after.keys() and all(
        after[key] == value if isinstance(value, dict) else after[key] is value
        for key, value in before.items()
    )


@pytest.fixture(params=["vision_tower", "language_model"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return _sharing(request.param)


@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("name", PAIRS)
def test_patches_stack_and_come_off_in_any_order(
    pair: tuple[Any, Any], name: str, last: int
) -> None:
    methods = PAIRS[name]
    plain = [_logits(model) for model in pair]
    before = [_state(model) for model in pair]
    alone = []
    for model, method in zip(pair, methods, strict=True):
        with vtc.patch(model, method):
            alone.append(_logits(model))
    assert all(difference(a, p) > 0.1 for a, p in zip(alone, plain, strict=True))

    for model, method in zip(pair, methods, strict=True):
        vtc.patch(model, method)
    for model, expected in zip(pair, alone, strict=True):
        assert torch.equal(_logits(model), expected)
    vtc.unpatch(pair[1 - last])
    assert torch.equal(_logits(pair[1 - last]), plain[1 - last])
    assert torch.equal(_logits(pair[last]), alone[last])
    vtc.unpatch(pair[last])
    for model, expected, was in zip(pair, plain, before, strict=True):
        assert torch.equal(_logits(model), expected)
        assert _same(was, _state(model))


def test_a_plain_model_does_not_notice_the_other_one(pair: tuple[Any, Any]) -> None:
    first, second = pair
    plain = _logits(second)
    for method in (method for methods in PAIRS.values() for method in methods):
        with vtc.patch(first, method):
            assert torch.equal(_logits(second), plain)
            _logits(first)
            assert torch.equal(_logits(second), plain)


@pytest.mark.parametrize("name", PAIRS)
def test_threads_of_two_models_do_not_hear_each_other(name: str) -> None:
    pair = _sharing("vision_tower")
    with vtc.patch(pair[0], PAIRS[name][0]), vtc.patch(pair[1], PAIRS[name][1]):
        expected = [_logits(model) for model in pair]
        worst = [0.0, 0.0]

        def run(i: int) -> None:
            for _ in range(6):
                worst[i] = max(worst[i], difference(_logits(pair[i]), expected[i]))

        threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert max(worst) < TOLERANCE


def test_taps_may_come_and_go_while_another_model_attends() -> None:
    """Two patched models and a plain one on one tower, threads changing places all the time."""
    pair = _sharing("vision_tower")
    trouble: list[BaseException] = []
    layers = [layer.self_attn for layer in pair[0].model.vision_tower.encoder.layers]
    configs = [layer.config for layer in layers]

    def come_and_go() -> None:
        try:
            for _ in range(400):
                taps.install(layers[0]).remove()
        except BaseException as error:
            trouble.append(error)

    def attend() -> None:
        hidden = torch.randn(1, 5, layers[0].embed_dim)
        try:
            for _ in range(200):
                layers[0](hidden)
        except BaseException as error:
            trouble.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=act) for act in (come_and_go, come_and_go, attend)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    finally:
        sys.setswitchinterval(before)
    assert not trouble
    assert [layer.config for layer in layers] == configs
    assert not any(hasattr(layer, "_vtc_taps") for layer in layers)


def test_a_copy_of_one_of_two_runs_by_itself(pair: tuple[Any, Any]) -> None:
    first, second = pair
    vtc.patch(first, PAIRS["both"][0])
    with vtc.patch(second, PAIRS["both"][1]):
        expected = _logits(first)
        other = copy.deepcopy(first)
    vtc.unpatch(first)
    assert torch.equal(_logits(other), expected)


class _Greeter:
    def greet(self) -> str:
        return "plain"


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_overrides_come_off_in_any_order(order: tuple[int, ...]) -> None:
    target = _Greeter()
    made = [
        Override(target, "greet", lambda original, i=i: f"{i} over {original()}") for i in range(3)
    ]
    left = [2, 1, 0]
    for i in order:
        assert target.greet() == "".join(f"{n} over " for n in left) + "plain"
        made[i].remove()
        left.remove(i)
    assert target.greet() == "plain"
    assert not vars(target)


MEANWHILE = {
    "merged": vtc.ToMe(keep=9),
    "read": vtc.SCOPE(keep=7),
    "plain": vtc.Full(),
}


@pytest.mark.parametrize("second", MEANWHILE)
@pytest.mark.parametrize("first", ["merged", "read"])
def test_another_model_runs_while_the_tower_is_busy(first: str, second: str) -> None:
    """In a thread of its own, started and ended in the middle of the shared tower."""
    one, other = _sharing("vision_tower")
    found: list[Tensor] = []
    busy: list[bool] = []

    def run(*_: Any) -> None:
        if not busy:
            busy.append(True)
            thread = threading.Thread(target=lambda: found.append(_logits(other)))
            thread.start()
            thread.join(120)

    layers = one.model.vision_tower.encoder.layers
    with vtc.patch(one, MEANWHILE[first]), vtc.patch(other, MEANWHILE[second]):
        expected = [_logits(model) for model in (one, other)]
        handle = layers[len(layers) // 2].mlp.register_forward_hook(run)
        try:
            around = _logits(one)
        finally:
            handle.remove()
    assert len(found) == 1
    assert torch.equal(around, expected[0])
    assert torch.equal(found[0], expected[1])
