# SPDX-License-Identifier: Apache-2.0
"""Properties of the methods as pure functions; what needs a model is tested elsewhere."""

from __future__ import annotations

import dataclasses
import itertools
import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vtc
from vtc.core import budget
from vtc.methods import (
    Compose,
    Downsample,
    FastV,
    Full,
    LayerState,
    Method,
    Pool,
    Random,
    Selection,
    ToDRE,
    VisionTokens,
    make,
    methods,
)
from vtc.ops import farthest_first, max_sum, naive

quick = settings(max_examples=60, deadline=None, derandomize=True)
keeps = st.one_of(st.integers(1, 60), st.floats(0.001, 1.0))


def vision_tokens(
    rows: int, cols: int, frames: int = 1, seed: int = 0, image: int = 0, **more: Any
) -> VisionTokens:
    """Tokens with random contents on a full grid, and [CLS] attention without ties."""
    generator = torch.Generator().manual_seed(seed)
    n = frames * rows * cols
    signals = {"cls_attention": torch.rand(n, generator=generator)}
    return VisionTokens(
        features=torch.randn(n, 6, generator=generator, dtype=torch.float64),
        grid=torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(cols)),
        image=image,
        **{**signals, **more},
    )


def layer_state(
    attention: dict[int, Tensor], image: list[int], layer: int, original: tuple[int, ...]
) -> LayerState:
    """A sample whose tokens belong to the images given (-1 for text), about to enter a layer."""
    which = torch.tensor(image)
    first = int((which >= 0).nonzero()[0])
    return LayerState(
        layer=layer,
        num_layers=8,
        hidden=torch.zeros(len(image), 4),
        image=which,
        text=(which < 0) & (torch.arange(len(image)) > first),
        grid=torch.full((len(image), 3), -1),
        prompt_length=len(image),
        original=original,
        attention=attention,
    )


def probabilities(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).softmax(1)


SELECTING = [
    pytest.param(Random, {}, id="random"),
    pytest.param(Pool, {}, id="pool"),
    pytest.param(Downsample, {}, id="downsample"),
    pytest.param(ToDRE, {}, id="todre-maxsum"),
    pytest.param(ToDRE, {"mode": "kcenter"}, id="todre-kcenter"),
]
EXAMPLES = [
    Full(),
    Random(),
    Random(keep=7, seed=3, positions="contiguous"),
    Pool(),
    Pool(keep=0.1, positions="contiguous"),
    Downsample(),
    Downsample(keep=64, how="pixels", positions="contiguous"),
    ToDRE(),
    ToDRE(keep=1.0, mode="kcenter", second_stage=False, layer=3, tau=0, positions="original"),
    FastV(),
    FastV(keep=0.25, layer=3, positions="contiguous"),
]


# ---- every method -------------------------------------------------------------------------------
@pytest.mark.parametrize("method", EXAMPLES, ids=str)
def test_settings_survive_json(method):
    again = make(json.loads(json.dumps(method.to_dict())))
    assert again == method
    assert [type(v) for v in again.to_dict().values()] == [
        type(v) for v in method.to_dict().values()
    ]
    assert hash(again) == hash(method)


def test_compositions_survive_json():
    both = ToDRE(keep=0.5, second_stage=False) | FastV(layer=3)
    assert make(json.loads(json.dumps(both.to_dict()))) == both
    assert both.stages == ("sequence", "layers")
    assert (Full() | both).parts == (Full(), *both.parts)
    assert isinstance(both, Compose)


def test_every_method_is_registered_frozen_and_documented():
    # Tests elsewhere may register methods of their own.
    found = {k: v for k, v in methods().items() if v.__module__.startswith("vtc.")}
    assert {"full", "random", "pool", "downsample", "todre", "fastv"} <= set(found)
    for name, cls in found.items():
        method = make(name, **({"theta_r": 0.5, "theta_s": 0.9} if cls.trained else {}))
        assert type(method) is cls
        assert method.title
        assert cls.__doc__
        assert method.positions in ("original", "contiguous")
        for field in dataclasses.fields(method):
            assert field.name == "positions" or f"{field.name}:" in cls.__doc__
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(method, field.name, None)


@pytest.mark.parametrize("name", ["random", "pool", "downsample", "todre", "fastv"])
@pytest.mark.parametrize("keep", [0, -1, 0.0, -0.5, 1.5, float("nan"), float("inf")])
def test_keep_out_of_range_is_refused(name, keep):
    with pytest.raises(ValueError, match=r"^keep: "):
        make(name, keep=keep)


@pytest.mark.parametrize("name", ["random", "pool", "downsample", "todre", "fastv"])
@pytest.mark.parametrize("keep", [True, "0.5", None])
def test_keep_of_another_type_is_refused(name, keep):
    with pytest.raises(TypeError, match=r"^keep: "):
        make(name, keep=keep)


@pytest.mark.parametrize("name", ["random", "pool", "downsample", "todre", "fastv"])
def test_positions_are_checked(name):
    assert make(name, positions="contiguous").positions == "contiguous"
    assert make(name, positions="original").positions == "original"
    with pytest.raises(ValueError, match="positions: expected one of 'original', 'contiguous'"):
        make(name, positions="reindex")


@pytest.mark.parametrize(
    ("name", "extra", "error"),
    [
        ("random", {"seed": -1}, ValueError),
        ("random", {"seed": 1.0}, TypeError),
        ("random", {"seed": True}, TypeError),
        ("downsample", {"how": "pixel"}, ValueError),
        ("todre", {"mode": "k-center"}, ValueError),
        ("todre", {"second_stage": 1}, TypeError),
        ("todre", {"layer": 0}, ValueError),
        ("todre", {"layer": 2.0}, TypeError),
        ("todre", {"tau": -0.1}, ValueError),
        ("todre", {"tau": float("nan")}, ValueError),
        ("todre", {"tau": "0.1"}, TypeError),
        ("todre", {"tau": True}, TypeError),
        ("fastv", {"layer": 0}, ValueError),
        ("fastv", {"layer": None}, TypeError),
        ("fastv", {"layer": True}, TypeError),
    ],
)
def test_other_settings_are_checked(name, extra, error):
    (setting,) = extra
    with pytest.raises(error, match=f"^{setting}: "):
        make(name, **extra)


@pytest.mark.parametrize(("cls", "extra"), SELECTING)
@given(rows=st.integers(1, 6), cols=st.integers(1, 6), frames=st.integers(1, 3), keep=keeps)
@quick
def test_select_keeps_the_budget_in_order(cls, extra, rows, cols, frames, keep):
    tokens = vision_tokens(rows, cols, frames)
    n = len(tokens)
    b = budget(keep, n)
    selection = cls(keep=keep, **extra).select(tokens)
    indices = selection.indices.tolist()
    assert selection.indices.dtype == torch.long
    assert indices == sorted(set(indices))
    assert 0 <= indices[0] <= indices[-1] < n
    if cls in (Pool, Downsample):
        assert 1 <= len(indices) <= b
        assert (selection.features is None) == (b == n)
        if selection.features is not None:
            assert selection.features.shape == (len(indices), 6)
            assert selection.features.dtype == tokens.features.dtype
    else:
        assert len(indices) == b
        assert selection.features is None


@pytest.mark.parametrize(("cls", "extra"), [pytest.param(Full, {}, id="full"), *SELECTING])
@pytest.mark.parametrize("keep", [1.0, 12, 500])
def test_keeping_all_changes_nothing(cls, extra, keep):
    method = cls() if cls is Full else cls(keep=keep, **extra)
    selection = method.select(vision_tokens(3, 4))
    assert selection.indices.tolist() == list(range(12))
    assert selection.features is None


@pytest.mark.parametrize(("cls", "extra"), SELECTING)
def test_select_is_pure_and_deterministic(cls, extra):
    tokens = vision_tokens(6, 6)
    before = [tokens.features.clone(), tokens.grid.clone(), tokens.cls_attention.clone()]
    method = cls(keep=0.3, **extra)
    first = method.select(tokens)
    torch.rand(3)  # the global generator has no say
    state = torch.get_rng_state()
    second = method.select(tokens)
    assert torch.equal(first.indices, second.indices)
    assert torch.equal(torch.get_rng_state(), state)
    for then, now in zip(before, [tokens.features, tokens.grid, tokens.cls_attention], strict=True):
        assert torch.equal(then, now)


@pytest.mark.parametrize("method", [Full(), Random(), Pool(), Downsample(), FastV()], ids=str)
def test_a_method_refuses_the_stage_it_does_not_act_in(method):
    if "sequence" in method.stages:
        assert method.prune_layers(8) == ()
        assert method.taps(8) == {}
        with pytest.raises(TypeError, match="does not act between layers"):
            method.prune(layer_state({}, [-1, 0, -1], 2, (1,)))
    else:
        with pytest.raises(TypeError, match="does not act in the sequence stage"):
            method.select(vision_tokens(2, 2))


# ---- Random -------------------------------------------------------------------------------------
def test_random_depends_on_seed_image_and_size_only():
    base = Random(keep=0.25).select(vision_tokens(6, 6)).indices
    other = vision_tokens(4, 9, seed=5)  # other contents and grid, same number of tokens
    assert torch.equal(Random(keep=0.25).select(other).indices, base)
    assert not torch.equal(Random(keep=0.25, seed=1).select(vision_tokens(6, 6)).indices, base)
    second = vision_tokens(6, 6, image=1)
    assert not torch.equal(Random(keep=0.25).select(second).indices, base)


def test_random_is_nested_in_keep():
    tokens = vision_tokens(6, 6)
    kept = [set(Random(keep=k).select(tokens).indices.tolist()) for k in range(1, 37)]
    assert all(small < large for small, large in itertools.pairwise(kept))


def test_random_draws_every_token_equally_often():
    tokens = vision_tokens(4, 4)
    drawn = torch.cat([Random(keep=4, seed=s).select(tokens).indices for s in range(400)])
    counts = drawn.bincount(minlength=16)
    # 100 expected of each; five standard deviations are 43.
    assert 57 < counts.min() <= counts.max() < 143
    # Neighbouring seeds share a quarter of their tokens, as independent draws do.
    chunks = drawn.reshape(400, 4).tolist()
    shared = sum(len(set(a) & set(b)) for a, b in itertools.pairwise(chunks)) / 399
    assert 0.8 < shared < 1.2


# ---- Pool, Downsample ---------------------------------------------------------------------------
def test_pool_averages_and_places():
    tokens = vision_tokens(4, 4)
    selection = Pool(keep=4).select(tokens)
    assert selection.indices.tolist() == [0, 2, 8, 10]
    quarter = tokens.features[[0, 1, 4, 5]].mean(0)
    torch.testing.assert_close(selection.features[0], quarter)


def test_pool_and_downsample_meet_the_same_budget_with_other_contents():
    tokens = vision_tokens(6, 9)
    pooled, resized = Pool(keep=0.3).select(tokens), Downsample(keep=0.3).select(tokens)
    assert torch.equal(pooled.indices, resized.indices)
    assert not torch.allclose(pooled.features, resized.features)
    r, c = Downsample(keep=0.3).target_grid(6, 9)
    assert r * c == len(pooled.indices)
    expected = naive.resize_plane(tokens.features, 6, 9, (r, c))
    torch.testing.assert_close(resized.features, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cls", [Pool, Downsample])
def test_tiles_do_not_mix(cls):
    # Two tiles with the same grid positions: of the tokens that differ, only their own cells do.
    tokens = vision_tokens(4, 4)
    doubled = VisionTokens(
        features=torch.cat([tokens.features, tokens.features + 1]),
        grid=tokens.grid.repeat(2, 1),
        crop=torch.arange(2).repeat_interleave(16),
    )
    alone = cls(keep=0.25).select(tokens)
    both = cls(keep=0.25).select(doubled)
    assert both.indices.tolist() == alone.indices.tolist() + (alone.indices + 16).tolist()
    torch.testing.assert_close(both.features, torch.cat([alone.features, alone.features + 1]))


def test_downsample_by_pixels_has_a_target_and_no_selection():
    method = Downsample(keep=0.25, how="pixels")
    assert method.stages == ("pixels",)
    assert Downsample().stages == ("sequence",)
    assert method.target_grid(12, 20) == (6, 10)
    assert Downsample(keep=1.0, how="pixels").target_grid(12, 20) == (12, 20)
    assert Downsample(keep=1, how="pixels").target_grid(12, 20) == (1, 1)
    with pytest.raises(TypeError, match="how: 'pixels' acts before the vision tower"):
        method.select(vision_tokens(4, 4))


# ---- ToDRE, stage 1 -----------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["maxsum", "kcenter"])
@given(seed=st.integers(0, 10**6), keep=st.integers(1, 20))
@quick
def test_todre_is_the_greedy_choice_from_the_pivot(mode, seed, keep):
    tokens = vision_tokens(4, 5, seed=seed)
    pivot = int(tokens.cls_attention.argmax())
    slow = {"maxsum": naive.max_sum, "kcenter": naive.farthest_first}[mode]
    kept = ToDRE(keep=keep, mode=mode).select(tokens).indices.tolist()
    assert kept == sorted(slow(tokens.features, keep, pivot).tolist())
    assert pivot in kept


@pytest.mark.parametrize("mode", ["maxsum", "kcenter"])
def test_todre_is_nested_in_keep(mode):
    tokens = vision_tokens(4, 5)
    kept = [set(ToDRE(keep=k, mode=mode).select(tokens).indices.tolist()) for k in range(1, 21)]
    assert all(small < large for small, large in itertools.pairwise(kept))


def test_todre_keeps_the_pivot_alone_when_one_token_is_kept():
    tokens = vision_tokens(5, 5)
    assert ToDRE(keep=1).select(tokens).indices.tolist() == [int(tokens.cls_attention.argmax())]


def test_todre_ties_of_attention_go_to_the_lowest_index():
    tokens = vision_tokens(3, 3, cls_attention=torch.tensor([0, 0, 1, 1, 0, 1, 0, 0, 0.0]))
    assert ToDRE(keep=1).select(tokens).indices.tolist() == [2]


def test_todre_seeks_the_pivot_in_the_thumbnail():
    crop = torch.arange(3).repeat_interleave(4)
    attention = torch.tensor([0.1, 0.2, 0.4, 0.3] + [0.9] * 8)
    tokens = vision_tokens(3, 4, cls_attention=attention, crop=crop)
    assert ToDRE(keep=1).select(tokens).indices.tolist() == [2]
    # Without a thumbnail among the tiles, all of them count.
    tokens = vision_tokens(3, 4, cls_attention=attention, crop=crop + 1)
    assert ToDRE(keep=1).select(tokens).indices.tolist() == [4]


def test_todre_seeks_the_pivot_of_a_clip_over_all_frames():
    attention = torch.full((24,), 0.1)
    attention[2 * 8 + 5] = 0.7  # frame a = 2, place b = 5 of t = 8
    tokens = vision_tokens(2, 4, frames=3, cls_attention=attention)
    assert ToDRE(keep=1).select(tokens).indices.tolist() == [21]


def test_todre_modes_are_those_of_the_ops():
    tokens = vision_tokens(6, 6)
    pivot = int(tokens.cls_attention.argmax())
    choices = {"maxsum": max_sum, "kcenter": farthest_first}
    kept = {}
    for mode, choose in choices.items():
        kept[mode] = ToDRE(keep=8, mode=mode).select(tokens).indices.tolist()
        assert kept[mode] == sorted(choose(tokens.features, 8, pivot).tolist())
    assert kept["maxsum"] != kept["kcenter"]


def test_todre_asks_for_the_attention_it_needs():
    assert ToDRE.needs == {"cls_attention"}
    with pytest.raises(ValueError, match="cls_attention: ToDRE's pivot needs it"):
        ToDRE(keep=1).select(vision_tokens(2, 2, cls_attention=None))


# ---- ToDRE, stage 2 -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [(32, 28), (40, 35), (28, 24), (8, 7), (4, 3), (2, 1), (1, None)],
)
def test_todre_checks_after_seven_eighths_of_the_layers(num_layers, expected):
    layers = () if expected is None else (expected,)
    assert ToDRE().prune_layers(num_layers) == layers
    assert ToDRE().taps(num_layers) == {layer - 1: "vision_text" for layer in layers}


def test_todre_layer_can_be_given():
    assert ToDRE(layer=16).prune_layers(32) == (16,)
    assert ToDRE(layer=16).taps(32) == {15: "vision_text"}
    assert ToDRE(layer=31).prune_layers(32) == (31,)
    for num_layers in (16, 3, 1):
        with pytest.raises(ValueError, match=f"layer: .*{num_layers} decoder layers, got 16"):
            ToDRE(layer=16).prune_layers(num_layers)


@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_todre_s_second_stage_never_numbers_anew(positions):
    method = ToDRE(positions=positions)
    assert method.positions == positions
    assert method.prune_positions == "original"


def test_todre_stages():
    assert ToDRE().stages == ("sequence", "layers")
    for off in (ToDRE(second_stage=False, layer=90), ToDRE(keep=1.0)):
        assert off.stages == ("sequence",)
        assert off.prune_layers(8) == ()
        assert off.taps(8) == {}
    assert ToDRE(keep=1).prune_layers(8) == (7,)  # one token, not all
    assert ToDRE(keep=10**9).prune_layers(8) == (7,)  # stage 2 alone


IMAGES = [-1, -1, 0, 0, 0, -1, 1, 1, -1, -1, -1]


@given(seed=st.integers(0, 10**6))
@quick
def test_todre_drops_all_below_the_threshold(seed):
    rows = probabilities(9, len(IMAGES), seed)  # 3 of vision, 1 of text, 2 of vision, 3 of text
    text, vision = [5, 8, 9, 10], [2, 3, 4, 6, 7]
    text_to_vision = sum(rows[i, j].item() for i in (3, 6, 7, 8) for j in vision) / 4
    vision_to_text = sum(rows[i, j].item() for i in (0, 1, 2, 4, 5) for j in text) / 5
    mass = max(text_to_vision, vision_to_text)
    assert 0 <= mass <= 1
    state = layer_state({6: rows}, IMAGES, 7, (3, 2))
    for tau, drops in [(mass - 1e-4, False), (mass + 1e-4, True), (0, False), (1.5, True)]:
        selection = ToDRE(tau=tau).prune(state)
        if drops:
            assert selection is not None
            assert selection.indices.shape == (0,)
            assert selection.indices.dtype == torch.long
        else:
            assert selection is None


def test_todre_reads_the_layer_before():
    blind, looking = torch.zeros(9, len(IMAGES)), torch.zeros(9, len(IMAGES))
    blind[:, 0] = 1
    looking[:, 3] = 1
    assert ToDRE(layer=3).prune(layer_state({2: blind, 6: looking}, IMAGES, 3, (3, 2))) is not None
    assert ToDRE(layer=7).prune(layer_state({2: blind, 6: looking}, IMAGES, 7, (3, 2))) is None


def causal(image: list[int], seed: int) -> Tensor:
    """Probabilities of the rows of vision and text, which see nothing after themselves."""
    first, s = image.index(0), len(image)
    scores = torch.randn(s, s, generator=torch.Generator().manual_seed(seed))
    rows = scores.masked_fill(torch.ones(s, s).triu(1).bool(), -torch.inf).softmax(1)
    return rows[first:]


@given(seed=st.integers(0, 10**6))
@quick
def test_todre_with_all_text_after_the_image_hears_the_text_alone(seed):
    image = [-1, -1, 0, 0, 0, 0, -1, -1, -1]
    rows = causal(image, seed)
    assert not rows[:4, 6:].any()  # vision to text
    mass = rows[4:, 2:6].sum(1).mean().item()
    for tau, drops in ((mass - 1e-4, False), (mass + 1e-4, True)):
        found = ToDRE(tau=tau).prune(layer_state({6: rows}, image, 7, (4,)))
        assert (found is not None) == drops


def test_todre_keeps_tokens_that_still_look_at_text_between_images():
    # The text looks at <s> alone; the second image at the text before it.
    image = [-1, 0, 0, -1, -1, 1, 1, -1]
    rows = torch.zeros(7, len(image))
    rows[:, 0] = 1
    assert ToDRE().prune(layer_state({6: rows}, image, 7, (2, 2))) is not None
    for row in (4, 5):
        rows[row, 0], rows[row, 3] = 0.6, 0.4
    # 0.4 of two of four rows: 0.2
    assert ToDRE(tau=0.19).prune(layer_state({6: rows}, image, 7, (2, 2))) is None
    assert ToDRE(tau=0.21).prune(layer_state({6: rows}, image, 7, (2, 2))) is not None


def test_todre_keeps_tokens_when_no_text_follows():
    state = layer_state({6: torch.zeros(2, 3)}, [-1, 0, 0], 7, (2,))
    assert ToDRE(tau=2.0).prune(state) is None


# ---- FastV --------------------------------------------------------------------------------------
def kept_by(method: FastV, rows: Tensor, image: list[int], original: tuple[int, ...]) -> list[int]:
    selection = method.prune(layer_state({method.layer - 1: rows}, image, method.layer, original))
    assert isinstance(selection, Selection)
    assert selection.features is None
    return selection.indices.tolist()


@given(seed=st.integers(0, 10**6), keep=st.integers(1, 9))
@quick
def test_fastv_keeps_the_columns_the_last_row_looks_at_most(seed, keep):
    image = [-1, -1] + [0] * 10 + [-1, -1, -1]
    rows = probabilities(3, len(image), seed)
    kept = kept_by(FastV(keep=keep), rows, image, (10,))
    ranked = sorted(range(10), key=lambda i: -rows[-1, 2 + i].item())
    assert kept == sorted(ranked[:keep])
    # Rows other than the last have no say, nor do the columns of the text.
    changed = rows.clone()
    changed[:-1] = rows[:-1].flip(1)
    changed[-1, :2], changed[-1, 12:] = 9.0, 9.0
    assert kept_by(FastV(keep=keep), changed, image, (10,)) == kept


def test_fastv_ties_go_to_the_first():
    image = [-1] + [0] * 8 + [-1]
    assert kept_by(FastV(keep=0.5), torch.full((1, 10), 0.1), image, (8,)) == [0, 1, 2, 3]


def test_fastv_images_compete_for_the_sum_of_their_budgets():
    # Image 0 may keep 2 of 4 and image 1 one of 2, but all three best are in image 0.
    image = [-1, 0, 0, 0, 0, -1, 1, 1, -1]
    row = torch.tensor([[0.0, 0.2, 0.19, 0.18, 0.01, 0.2, 0.02, 0.1, 0.1]])
    assert kept_by(FastV(keep=0.5), row, image, (4, 2)) == [0, 1, 2]
    # A whole number counts per image, and never beyond an image's size.
    assert kept_by(FastV(keep=2), row, image, (4, 2)) == [0, 1, 2, 5]


def test_fastv_counts_from_before_other_methods():
    image = [-1, 0, 0, 0, -1]  # three tokens left of eight
    row = torch.tensor([[0.1, 0.1, 0.3, 0.2, 0.3]])
    assert kept_by(FastV(keep=0.25), row, image, (8,)) == [1, 2]
    state = layer_state({1: row}, image, 2, (8,))
    assert FastV(keep=0.5).prune(state) is None
    assert FastV(keep=1.0).prune(state) is None


def test_fastv_layers():
    assert FastV().prune_layers(32) == (2,)
    assert FastV().taps(32) == {1: "last"}
    assert FastV(layer=7).prune_layers(8) == (7,)
    for call in (FastV(layer=8).prune_layers, FastV(layer=8).taps):
        with pytest.raises(
            ValueError, match=r"layer: expected a layer up to 7 .* 8 decoder layers, got 8"
        ):
            call(8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_methods_work_in_the_models_dtype(dtype):
    tokens = vision_tokens(6, 6)
    low = dataclasses.replace(
        tokens, features=tokens.features.to(dtype), cls_attention=tokens.cls_attention.to(dtype)
    )
    found: list[Method] = [Random(), Pool(), Downsample(), ToDRE(), ToDRE(mode="kcenter")]
    for method in found:
        selection = method.select(low)
        assert len(selection.indices) == 9
        if selection.features is not None:
            assert selection.features.dtype == dtype
            exact = method.select(tokens).features
            tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-6}[dtype]
            torch.testing.assert_close(selection.features.double(), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("method", "shown", "text"),
    [
        (ToDRE(keep=0.1), "ToDRE(keep=0.1)", "todre(keep=0.1)"),
        (ToDRE(), "ToDRE(keep=0.25)", "todre(keep=0.25)"),
        (Full(), "Full()", "full()"),
        (
            ToDRE(keep=9, tau=0.2) | FastV(layer=3),
            "ToDRE(keep=9, tau=0.2) | FastV(keep=0.5, layer=3)",
            "todre(keep=9, tau=0.2) | fastv(keep=0.5, layer=3)",
        ),
        (
            vtc.PerTile(ToDRE(keep=9, second_stage=False), thumbnail=3),
            "PerTile(inner=ToDRE(keep=9, second_stage=False), thumbnail=3)",
            "per_tile(todre(keep=9, second_stage=False), thumbnail=3)",
        ),
        (vtc.SparseVLM(version="v2"), "SparseVLM(version='v2')", "sparsevlm(version='v2')"),
        (vtc.PruMerge(), "PruMerge()", "prumerge()"),
    ],
)
def test_a_method_shows_what_was_set(method, shown, text):
    assert repr(method) == shown
    assert str(method) == text
    named = {name: getattr(vtc, name) for name in vtc.__all__}  # imported when first asked for
    assert eval(shown, named) == method


def test_methods_of_one_s_own_show_themselves_alike():
    @dataclass(frozen=True)
    class Own(Method):
        keep: float = 0.5
        knob: int = 3

        def select(self, tokens):
            return Selection(torch.arange(1))

    Own.name = "own"  # not in the class, where it would register
    assert repr(Own()) == "Own(keep=0.5)"
    assert repr(Own(knob=4) | ToDRE()) == "Own(keep=0.5, knob=4) | ToDRE(keep=0.25)"

    class Bare(Method):
        name = "bare_of_fields"
        listed = False

    assert repr(Bare()) == "Bare()"


@pytest.mark.parametrize(
    ("method", "asked"),
    [
        (ToDRE(), False),
        (ToDRE(positions="original"), False),
        (FastV(), False),
        (FastV(positions="contiguous"), True),
        (vtc.SparseVLM(), False),
        (vtc.SparseVLM(version="v2", positions="contiguous"), True),
        (ToDRE() | FastV(positions="contiguous"), True),
        (vtc.PerTile(vtc.DivPrune()), False),
        (vtc.PerFrame(vtc.Random(positions="contiguous")), True),
    ],
)
def test_a_default_is_not_a_wish(method, asked):
    assert method.closes_gaps_by_choice is asked


@pytest.mark.parametrize("name", sorted(vtc.methods()))
def test_every_method_has_a_repr(name: str) -> None:
    """Also where a setting cannot be left open in the company of the others."""
    settings = {"theta_r": 0.1, "theta_s": 0.2} if name == "atp" else {}
    method = vtc.make(name, **settings)
    assert repr(method).startswith(type(method).__name__ + "(")
    assert str(method).startswith(name + "(")
    assert ("theta_r=0.1, theta_s=0.2" in repr(method)) == (name == "atp")
