# SPDX-License-Identifier: Apache-2.0
"""Attention rows that are averaged over the heads, at once and by key head."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference.models import build_model
from vtc.runtime.hf import taps


@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("masked", ["none", "allowed", "bias"])
def test_the_mean_by_key_head_is_the_mean(
    key_heads: int, masked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 5, 8, generator=generator)
    key = torch.randn(2, key_heads, 7, 8, generator=generator)
    seen = torch.rand(2, 1, 5, 7, generator=generator) > 0.3
    seen[1, :, 2] = False  # a row that sees nothing attends to nothing
    allowed = seen if masked == "allowed" else None
    bias = torch.randn(2, 1, 5, 7, generator=generator) if masked == "bias" else None
    sinks = torch.randn(6, generator=generator) if masked != "none" else None
    options = taps.Options(0.4, 3.0, sinks)
    expected = taps.row_attention(query, key, allowed, bias, options).mean(1, keepdim=True)
    assert torch.equal(taps.mean_attention(query, key, allowed, bias, options), expected)
    monkeypatch.setattr(taps, "_AT_ONCE", 0)
    torch.testing.assert_close(taps.mean_attention(query, key, allowed, bias, options), expected)


@pytest.mark.parametrize("others", [0, 1])
def test_a_config_that_was_given_meanwhile_stays(others: int) -> None:
    module = build_model("clip", "llama").model.vision_tower.encoder.layers[0].self_attn
    tap = taps.install(module)
    assert tap.in_place
    more = [taps.install(module) for _ in range(others)]
    own = module.config = copy.copy(tap.config)
    assert not tap.in_place
    for one in (tap, *more):
        one.remove()
    assert module.config is own
    assert not hasattr(module, "_vtc_taps")


def test_attention_that_was_led_here_outlives_the_last_tap() -> None:
    """Another thread may take it off between the look at the config and the call."""
    module = build_model("clip", "llama").model.vision_tower.encoder.layers[0].self_attn
    hidden = torch.randn(1, 5, module.embed_dim)
    expected = module(hidden)[0]
    tap = taps.install(module)
    attend = taps.ALL_ATTENTION_FUNCTIONS[taps.TAP]

    def late(*args: Any, **kwargs: Any) -> Any:
        tap.remove()
        return attend(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(taps.ALL_ATTENTION_FUNCTIONS._global_mapping, taps.TAP, late)
        assert torch.equal(module(hidden)[0], expected)


@pytest.mark.parametrize("fails", [False, True])
def test_a_module_is_left_once_it_was_heard_and_runs_again(fails: bool) -> None:
    module: Any = build_model("clip", "llama").model.vision_tower.encoder.layers[0].self_attn
    hidden = torch.randn(1, 5, module.embed_dim)
    expected = module(hidden)[0]
    tap, projected = taps.install(module), list[Any]()
    module.out_proj.register_forward_hook(lambda *args: projected.append(args))

    def heard(query: Tensor, *args: Any) -> None:
        tap.captured.append(query.shape)
        if fails:
            raise ValueError("heard")

    tap.arm(heard)
    if fails:
        with pytest.raises(ValueError, match="heard"), tap.alone():
            module(hidden)
    else:
        with tap.alone():
            module(hidden)
    assert len(tap.captured) == 1
    assert not projected
    assert not tap.hears
    assert torch.equal(module(hidden)[0], expected)
    assert len(projected) == 1


def test_a_silent_tap_leaves_only_the_call_it_was_armed_for() -> None:
    """The call of another tap ends where that one listens."""
    module: Any = build_model("clip", "llama").model.vision_tower.encoder.layers[0].self_attn
    one, other = taps.install(module), taps.install(module)
    one.arm(lambda *args: None)
    one.silent = True
    with pytest.raises(taps._Left), other.alone():
        module(torch.randn(1, 5, module.embed_dim))
