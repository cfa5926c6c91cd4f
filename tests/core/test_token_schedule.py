# SPDX-License-Identifier: Apache-2.0
"""`Method.token_schedule`: what a method says of its tokens is what a patched model holds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtc
from tests.reference.models import build_model, collate, samples
from vtc.core import LayerState, Method, Selection
from vtc.cost import prefill_flops, token_schedule
from vtc.presets import TARGETS

N = 36
"""Vision tokens of an image of the CLIP models."""

quick = settings(max_examples=60, deadline=None, derandomize=True)
NAMES = sorted(n for n, cls in vtc.methods().items() if cls.__module__.startswith("vtc."))
FIXED: dict[str, dict[str, Any]] = {"full": {}, "todre": {"tau": 0.0}}
"""Settings with which the data decide nothing, where they are not the defaults."""


def made(name: str, keep: float) -> Method:
    given = {} if name == "full" else {"keep": keep}
    return vtc.make(name, **{**FIXED.get(name, {}), **given})


@cache
def model(num_layers: int) -> Any:
    found = build_model()
    decoder = found.model.language_model
    decoder.layers = decoder.layers[:num_layers]
    found.config.text_config.num_hidden_layers = num_layers
    return found


def held(method: Method, num_layers: int) -> tuple[float, ...]:
    """Vision tokens that each layer of a patched model processes."""
    with vtc.patch(model(num_layers), method) as patch, torch.no_grad():
        patch.model(**collate(samples("one", "clip")))
    return tuple(patch.report.tokens_per_layer)


# ---- against a model ----------------------------------------------------------------------------
@pytest.mark.parametrize("name", [n for n in NAMES if n != "atp"])
@pytest.mark.parametrize("num_layers", [5, 8])
@pytest.mark.parametrize("keep", [0.25, 0.6])
def test_every_method_leaves_what_it_says(name: str, num_layers: int, keep: float) -> None:
    method = made(name, keep)
    assert method.token_schedule(N, num_layers) == held(method, num_layers)


@pytest.mark.parametrize(
    "method",
    [
        vtc.CATP(9),
        vtc.DART(0.25, count_pivots=False),
        vtc.Downsample(0.3, how="pixels"),
        vtc.PerTile(vtc.Pool(0.3)),
        vtc.PerFrame(vtc.VScan(0.5)),
        vtc.PyramidDrop(5, layers=(1, 2, 4)),
        vtc.Random(0.6) | vtc.PyramidDrop(0.6),
        vtc.Random(1.0) | vtc.FastV(0.2),
        vtc.SparseVLM(),
        vtc.SparseVLM(keep=(20, 10, 4), version="v2"),
        vtc.TransPrune("after_selection"),
        vtc.TransPrune((1, 1, 1)),
        vtc.V2Drop(1.0),
        vtc.V2Drop(0.5, one_stays=True),
    ],
    ids=str,
)
def test_other_settings_and_wrappers_too(method: Method) -> None:
    assert method.token_schedule(N, 8) == held(method, 8)


def test_a_second_stage_that_may_drop_all_has_a_bound() -> None:
    method = vtc.ToDRE(0.25, tau=2.0)
    promised = method.token_schedule(N, 8)
    assert promised == (9,) * 8
    assert method.is_bound(N)
    assert held(method, 8) == (9,) * 7 + (0,)


# ---- what the data decide -----------------------------------------------------------------------
@pytest.mark.parametrize(
    "method",
    [
        vtc.ATP(theta_r=0.5, theta_s=0.9),
        vtc.Correlation(),
        vtc.PruMerge(),
        vtc.PerTile(vtc.Correlation()),
        vtc.Random(0.5) | vtc.PruMerge(),
        vtc.Random(0.5) | vtc.V2Drop(),
    ],
    ids=str,
)
def test_none_where_the_image_decides(method: Method) -> None:
    assert method.token_schedule(576, 32) is None
    with pytest.raises(ValueError, match=r"^method: the tokens of .* cannot be computed"):
        token_schedule(method, 576, 32)


# ---- properties ---------------------------------------------------------------------------------
shares = st.floats(0.01, 1.0)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "atp"])
@given(st.integers(1, 400), st.integers(1, 5), st.integers(5, 40), shares, shares)
@quick
def test_schedules_fall_from_layer_to_layer_and_rise_with_keep(
    name: str, size: int, tiles: int, num_layers: int, one: float, other: float
) -> None:
    n = size * tiles
    less, more = (
        made(name, keep).token_schedule(n, num_layers, tiles) for keep in sorted((one, other))
    )
    assert less is not None
    assert more is not None
    for seen in (less, more):
        assert len(seen) == num_layers
        assert n >= seen[0]
        assert list(seen) == sorted(seen, reverse=True)
        assert seen[-1] >= 0
    assert all(a <= b for a, b in zip(less, more, strict=True))
    assert made(name, 1.0).token_schedule(n, num_layers, tiles) == (n,) * num_layers or name in (
        "sparsevlm",  # of which later stages have other shares
        "transprune",  # whose `keep` scales a schedule
    )


@given(st.integers(1, 400), shares, shares)
@quick
def test_a_composition_leaves_the_smallest_of_its_parts(n: int, one: float, other: float) -> None:
    parts = (vtc.Random(one), vtc.VScan(other), vtc.PyramidDrop(other))
    rows = [part.token_schedule(n, 16) for part in parts]
    both = (parts[0] | parts[1] | parts[2]).token_schedule(n, 16)
    assert both == tuple(min(seen) for seen in zip(*rows, strict=True))  # type: ignore[arg-type]


# ---- methods of one's own -----------------------------------------------------------------------
class Outside(Method):
    """Keeps it out of `vtc.methods()`."""


Outside.name = "outside"


@dataclass(frozen=True)
class Halves(Outside):
    """Before layers 2 and 4 the first half of what it finds."""

    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        return (2, 4)

    def leaves(self, sizes: tuple[int, ...], held: int, cut: int, cuts: int) -> int:
        return held // 2

    def prune(self, state: LayerState) -> Selection:
        k = self.leaves(state.original, len(state.vision), 0, 2)
        return Selection(torch.arange(k))


@dataclass(frozen=True)
class FirstOnes(Outside):
    """Needs no word on its schedule: `keep` says it."""

    keep: float | int = 0.25

    def select(self, tokens: Any) -> Selection:
        return Selection(torch.arange(tokens.budget(self.keep)))


def test_methods_of_one_s_own_have_costs_without_a_table() -> None:
    for method in (Halves(), FirstOnes(0.2), FirstOnes(5)):
        assert method.token_schedule(N, 8) == held(method, 8)
    found = vtc.describe(Halves(), "llava-1.5", text=40)
    assert found.per_layer == (576,) * 2 + (288,) * 2 + (144,) * 28
    decoder = TARGETS["llava-1.5"].decoder
    lengths = [40 + n for n in token_schedule(Halves(), 576, 32)]
    assert found.flops == prefill_flops(decoder, lengths).lm
    assert vtc.describe(FirstOnes(), "llava-1.5").average == 144
