# SPDX-License-Identifier: Apache-2.0
"""Every method's settings: the defaults that its docstring promises, and what each accepts."""

from __future__ import annotations

from typing import Any

import pytest

import vtc

DEFAULTS: dict[str, dict[str, Any]] = {
    "catp": {
        "keep": 0.222, "layer": None, "align": 0.7, "guide": 0.6, "context_pool": "image+text",
        "normalize": False, "positions": "contiguous", "needs": {"segment"}, "year": 2026,
    },
    "cdpruner": {
        "keep": 0.1111, "relevance": "text", "positions": "contiguous", "needs": {"text"},
        "year": 2025,
    },
    "correlation": {
        "keep": None, "alpha": 0.95, "beta": 0.125, "least": 0.1, "sampler": "topk", "seed": 0,
        "positions": "contiguous", "needs": {"cls_attention", "low_attention", "keys"},
        "vision_layer": -1, "low_layer": 0.25, "year": 2024,
    },
    "dart": {
        "keep": 0.222, "layer": 2, "image_pivots": 4, "text_pivots": 4, "count_pivots": True,
        "positions": "original", "year": 2025,
    },
    "divprune": {"keep": 0.098, "positions": "contiguous", "needs": set(), "year": 2025},
    "downsample": {"keep": 0.25, "how": "grid", "positions": "original", "needs": set()},
    "fastv": {"keep": 0.5, "layer": 2, "positions": "original", "year": 2024},
    "flowcut": {"keep": 0.25, "positions": "contiguous", "year": 2025, "weighs_sizes": False},
    "holov": {
        "keep": 0.1111, "variant": "code", "chunks": None, "alpha": 1.0, "tau": 1.0,
        "positions": "contiguous", "needs": {"cls_attention"}, "vision_layer": -2, "year": 2025,
    },
    "mmtok": {
        "keep": 0.1111, "alpha": 0.5, "text_temperature": 0.02, "vision_temperature": 0.2,
        "positions": "contiguous", "needs": {"encoder", "text"}, "year": 2025,
    },
    "pool": {"keep": 0.25, "positions": "original", "needs": set()},
    "prumerge": {
        "keep": None, "plus": False, "neighbours": 32, "aggregate": True, "order": "published",
        "positions": "contiguous", "needs": {"cls_attention", "cls_query", "keys", "encoder"},
        "vision_layer": -1, "year": 2024,
    },
    "prumerge_plus": {
        "keep": None, "plus": True, "neighbours": 32, "aggregate": True, "order": "published",
        "positions": "contiguous", "vision_layer": -1, "year": 2024,
    },
    "pyramiddrop": {"keep": 0.5, "layers": None, "positions": "contiguous", "year": 2024},
    "random": {"keep": 0.25, "seed": 0, "positions": "original", "needs": set()},
    "scope": {
        "keep": 0.1111, "alpha": 1.0, "positions": "contiguous",
        "needs": {"cls_attention", "encoder"}, "vision_layer": -2, "year": 2025,
    },
    "sparsevlm": {
        "keep": (300 / 576, 200 / 576, 110 / 576), "layers": None, "version": "v1.5", "tau": 0.3,
        "theta": 0.1, "recycle": True, "floor": 0.5, "positions": "contiguous", "year": 2024,
    },
    "todre": {
        "keep": 0.25, "mode": "maxsum", "second_stage": True, "layer": None, "tau": 0.1,
        "positions": "contiguous", "needs": {"cls_attention"}, "vision_layer": -1, "year": 2025,
    },
    "tome": {
        "keep": 0.25, "proportional_attention": True, "order": "sequence",
        "positions": "contiguous", "weighs_sizes": True, "year": 2023,
    },
    "transprune": {
        "schedule": "high", "keep": 1.0, "alpha": 0.5, "direction": "abs",
        "softmax_scope": "image", "layers": None, "positions": "contiguous", "year": 2026,
    },
    "v2drop": {
        "keep": 0.28, "then": (0.25, 0.0), "layers": None, "one_stays": False,
        "positions": "original", "year": 2025,
    },
    "visionzip": {
        "keep": 0.1111, "contextual": 10 / 64, "merge_by": "sum", "positions": "contiguous",
        "needs": {"cls_attention", "keys", "encoder"}, "vision_layer": -2, "year": 2024,
    },
    "vispruner": {
        "keep": 0.1111, "important": 0.5, "at_once": 8, "positions": "contiguous",
        "needs": {"cls_attention", "encoder"}, "vision_layer": -2, "year": 2024,
    },
    "vscan": {
        "keep": 1 / 6, "then": 1 / 3, "windows": 4, "layer": None, "positions": "contiguous",
        "needs": {"cls_attention", "low_attention"}, "vision_layer": -2, "low_layer": 0.2084,
        "year": 2025,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_of_the_source(name: str) -> None:
    method = vtc.make(name)
    assert {setting: getattr(method, setting) for setting in DEFAULTS[name]} == DEFAULTS[name]
    assert set(method.to_dict()) - {"method"} <= set(DEFAULTS[name])
    assert method.trained is False
    hash(method)


SHARES: list[Any] = [True, "0.5", None]
BELOW_ZERO: list[Any] = [-0.1, float("nan"), float("inf")]
# For each setting: what is accepted, what has a wrong type, and what is out of range.
ACCEPTED: dict[str, dict[str, tuple[list[Any], list[Any], list[Any]]]] = {
    "catp": {
        "align": ([0, 0.0, 2], SHARES, BELOW_ZERO),
        "guide": ([0, 0.0, 2], SHARES, BELOW_ZERO),
        "layer": ([2, None], [2.0, True], [1]),
        "normalize": ([True], [1, None], []),
        "context_pool": (["image"], [], ["text"]),
    },
    "cdpruner": {"relevance": (["none"], [], ["image"])},
    "correlation": {
        "alpha": ([-1, 0, 1.0], SHARES, [-1.01, 1.01, float("nan")]),
        "beta": ([0, 1, 0.5], SHARES, [-0.01, 1.01, float("nan")]),
        "least": ([0.01, 1], SHARES, [0, -0.1, 1.01]),
        "sampler": (["multinomial"], [], ["random"]),
        "seed": ([5, -1], [True, 1.0], []),
        "keep": ([None, 1, 1.0], [True, "1"], [0, 0.0, 1.5]),
    },
    "dart": {
        "layer": ([1, 5], [None, 1.0], [0]),
        "image_pivots": ([1], [True], [0]),
        "text_pivots": ([0, 3], [0.5], [-1]),
        "count_pivots": ([False], [1, None], []),
    },
    "downsample": {"how": (["pixels"], [], ["pixel"])},
    "fastv": {"layer": ([1, 5], [None, True, 1.0], [0])},
    "holov": {
        "variant": (["paper"], [], ["text"]),
        "chunks": ([1, None], [True], [0]),
        "alpha": ([0, 2.5], SHARES, BELOW_ZERO),
        "tau": ([0, 2.5], SHARES, BELOW_ZERO),
    },
    "mmtok": {
        "alpha": ([0, 3], SHARES, [-0.1, float("inf")]),
        "text_temperature": ([0.001, 3], SHARES, [0, -0.1, float("inf")]),
        "vision_temperature": ([0.001, 3], SHARES, [0, -0.1, float("inf")]),
    },
    "prumerge": {
        "plus": ([True], [1, None], []),
        "aggregate": ([False], [0, None], []),
        "neighbours": ([1], [None, True], [0]),
        "order": (["raster"], [], ["rows"]),
        "keep": ([None, 1, 1.0], [True, "1"], [0, 0.0, 1.5]),
    },
    "pyramiddrop": {"layers": ([None, (1, 2, 3)], [3, (1, "x"), "12"], [(0, 2, 3)])},
    "random": {"seed": ([0, 7], [True, 1.0], [-1])},
    "scope": {"alpha": ([0, 2], SHARES, BELOW_ZERO)},
    "sparsevlm": {
        "tau": ([0, 1, 0.5], SHARES, [-0.1, 1.1]),
        "theta": ([0, 1, 0.5], SHARES, [-0.1, 1.1]),
        "floor": ([0.1, 9], SHARES, [0, -1]),
        "recycle": ([None, True, False], [0, "yes"], []),
        "version": (["v2"], [], ["v1"]),
        "layers": ([None, (0, 3, 5)], [], [(-1, 3, 5)]),
    },
    "todre": {
        "tau": ([0, 1.5], SHARES, BELOW_ZERO),
        "layer": ([1, None], [1.0], [0]),
        "mode": (["kcenter"], [], ["center"]),
        "second_stage": ([False], [0, None], []),
    },
    "tome": {
        "proportional_attention": ([False], [0, None], []),
        "order": (["similarity"], [], ["score"]),
    },
    "transprune": {
        "keep": ([0.01, 1.0], [1, True, None], [0.0, 1.01]),
        "alpha": ([0, 1, 0.5], SHARES, [-0.01, 1.01]),
        "direction": (["signed"], [], ["up"]),
        "softmax_scope": (["sequence"], [], ["batch"]),
        "layers": ([None, (1, 2, 3)], [3], [(0, 2, 3), (1, 2)]),
        "schedule": ([(1, 1, 0.1), [0.5, 0.5, 0.5], "low"], [0.5, None],
                     ["mid", (0.5, 0.4), (0.5, 0.6, 0.1), (0.5, 0.4, 0.0), (1.1, 0.5, 0.1),
                      (0.5, 0.1, 0.2), (1, True, 0.5), (1, "x", 0.5)]),
    },
    "v2drop": {
        "keep": ([0.01, 1.0], [1, True, None], [0.0, 1.01]),
        "then": ([(0.3, 0), [1.0], ()], [0.5, (1, 0.5), ("x", 0.5)], [(-0.1, 0.0), (1.1, 0.0)]),
        "layers": ([None, (1, 2, 3)], [3], [(0, 2, 3), (1, 2)]),
        "one_stays": ([True], [1, None], []),
    },
    "visionzip": {
        "contextual": ([0, 0.99], SHARES, [-0.1, 1, 1.0]),
        "merge_by": (["mean"], [], ["max"]),
    },
    "vispruner": {
        "important": ([0, 1, 0.3], SHARES, [-0.1, 1.1]),
        "at_once": ([1, 9], [True, 1.0], [0]),
    },
    "vscan": {
        "then": ([0.01, 1], SHARES, [0, -0.1, 1.01]),
        "windows": ([1, 9], [True, 1.0], [0]),
        "layer": ([1, None], [1.0], [0]),
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "setting"), [(name, setting) for name in ACCEPTED for setting in ACCEPTED[name]]
)
def test_what_a_setting_accepts(name: str, setting: str) -> None:
    good, mistyped, outside = ACCEPTED[name][setting]
    for value in good:
        found = getattr(vtc.make(name, **{setting: value}), setting)
        if value is not None:  # what is left open may follow from another setting
            assert found == (tuple(value) if isinstance(value, list) else value)
    for wrong, error in ((mistyped, TypeError), (outside, ValueError)):
        for value in wrong:
            with pytest.raises(error, match=f"^{setting}: "):
                vtc.make(name, **{setting: value})


@pytest.mark.parametrize("name", sorted({*DEFAULTS} - {"correlation", "prumerge", "prumerge_plus"}))
def test_keep_and_positions_are_checked(name: str) -> None:
    for wrong in (True, "0.5", None):
        with pytest.raises(TypeError, match=r"^keep: "):
            vtc.make(name, keep=wrong)
    for wrong in (0.0, -0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"^keep: "):
            vtc.make(name, keep=wrong)
    for positions in ("original", "contiguous"):
        assert vtc.make(name, positions=positions).positions == positions
    with pytest.raises(ValueError, match=r"^positions: expected one of 'original', 'contiguous'"):
        vtc.make(name, positions="new")


@pytest.mark.parametrize("name", ["dart", "fastv", "todre"])
def test_a_layer_that_the_decoder_has_not_is_refused_with_the_last_it_has(name: str) -> None:
    assert vtc.make(name, layer=7).prune_layers(8) == (7,)
    for layer in (8, 9, 40):
        accepted = "expected a layer up to 7 in a model of 8 decoder layers"
        with pytest.raises(ValueError, match=f"^layer: {accepted}, got {layer}$"):
            vtc.make(name, layer=layer).prune_layers(8)


@pytest.mark.parametrize("name", ["pyramiddrop", "v2drop"])
def test_layers_that_the_decoder_has_not_are_refused_with_the_last_it_has(name: str) -> None:
    assert vtc.make(name, layers=(1, 2, 7)).prune_layers(8) == (1, 2, 7)
    for layers in ((1, 2, 8), (1, 2, 9), (1, 1, 2)):
        with pytest.raises(
            ValueError,
            match=r"^layers: expected ascending layers up to 7 in a model of 8 decoder layers, got",
        ):
            vtc.make(name, layers=layers).prune_layers(8)


def test_layers_are_refused_by_the_name_and_the_numbers_that_were_given() -> None:
    """SparseVLM's are those after which tokens go; VScan has one."""
    assert vtc.SparseVLM(layers=(1, 2, 6)).prune_layers(8) == (2, 3, 7)
    with pytest.raises(
        ValueError, match=r"^layers: expected ascending layers up to 6 .*, got \(1, 2, 7\)$"
    ):
        vtc.SparseVLM(layers=(1, 2, 7)).prune_layers(8)
    assert vtc.VScan(layer=7).prune_layers(8) == (7,)
    with pytest.raises(ValueError, match=r"^layer: expected a layer up to 7 .*, got 8$"):
        vtc.VScan(layer=8).prune_layers(8)
