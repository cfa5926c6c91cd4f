# SPDX-License-Identifier: Apache-2.0
"""DivPrune, VisionZip, PyramidDrop, V2Drop and DART as pure functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vtc
from vtc.core import LayerState, Method, VisionTokens, scale_layers
from vtc.ops import most_isolated, naive

quick = settings(max_examples=40, deadline=None, derandomize=True)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vision_tokens(n: int, seed: int = 0, cls: bool = True, **more: Any) -> VisionTokens:
    """Tokens whose projector adds one to every state."""
    states = randn(n, 6, seed=seed)
    signals: dict[str, Any] = {
        "features": states + 1,
        "grid": torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(n)),
        "cls_attention": torch.rand(n, generator=torch.Generator().manual_seed(seed + 1)),
        "keys": randn(n, 8, seed=seed + 2),
        "heads": 2,
        "encoder": states,
        "encoder_cls": randn(6, seed=seed + 3) if cls else None,
        "project": lambda rows: rows + 1,
    }
    return VisionTokens(**{**signals, **more})


def layer_state(
    layer: int, vision: int = 12, text: int = 5, layers: int = 32, **more: Any
) -> LayerState:
    """Three system tokens, the image, then text."""
    s = 3 + vision + text
    image = torch.full((s,), -1)
    image[3 : 3 + vision] = 0
    fields: dict[str, Any] = {
        "layer": layer,
        "num_layers": layers,
        "hidden": randn(s, 4, seed=layer),
        "image": image,
        "text": torch.arange(s) >= 3 + vision,
        "grid": torch.full((s, 3), -1),
        "prompt_length": s,
        "original": (vision,),
        "attention": {},
    }
    return LayerState(**{**fields, **more})


def kept(method: Method, state: LayerState) -> list[int] | None:
    selection = method.prune(state)
    return None if selection is None else selection.indices.tolist()


# ---- all of them --------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["divprune", "visionzip", "pyramiddrop", "v2drop", "dart"])
def test_they_are_registered_with_their_source_and_refuse_nonsense(name: str) -> None:
    cls = vtc.methods()[name]
    assert cls.paper.startswith("arXiv:")
    assert cls.year
    for wrong in (0.0, 1.5, -3):
        # A share is no whole number.
        error = TypeError if name == "v2drop" and isinstance(wrong, int) else ValueError
        with pytest.raises(error, match="keep"):
            vtc.make(name, keep=wrong)
    with pytest.raises(TypeError, match="keep"):
        vtc.make(name, keep="half")
    with pytest.raises(ValueError, match="positions"):
        vtc.make(name, positions="new")
    method = vtc.make(name)
    assert vtc.make(method.to_dict()) == method


def test_published_layers_scale_with_the_depth() -> None:
    late = (3 / 32, 17 / 32, 22 / 32)
    assert scale_layers(None, late, 32) == (3, 17, 22)
    assert scale_layers(None, (0.25, 0.5, 0.75), 32) == (8, 16, 24)
    assert scale_layers(None, (0.25, 0.5, 0.75), 8) == (2, 4, 6)
    assert scale_layers(None, late, 28) == (3, 15, 19)
    assert scale_layers(None, late, 4) == (1, 2, 3)
    assert scale_layers(None, late, 2) == (1,)
    assert scale_layers((1, 5), late, 6) == (1, 5)
    for wrong in ((5, 1), (2, 2), (1, 6)):
        with pytest.raises(ValueError, match="layers"):
            scale_layers(wrong, late, 6)


# ---- DivPrune -----------------------------------------------------------------------------------
@quick
@given(st.integers(1, 30), st.integers(0, 5), st.integers(1, 9))
def test_the_most_isolated_token_is_the_naive_one(n: int, seed: int, block: int) -> None:
    features = randn(n, 5, seed=seed).double()
    assert int(most_isolated(features, block)) == int(naive.most_isolated(features))


@quick
@given(st.integers(3, 12), st.integers(0, 9))
def test_divprune_is_greedy_max_min(n: int, seed: int) -> None:
    features = randn(n, 4, seed=seed).double()
    k = max(1, n // 2)
    distance = 1 - naive.cosines(features)
    chosen = [
        max(range(n), key=lambda v: (min(float(distance[v, w]) for w in range(n) if w != v), -v))
    ]
    while len(chosen) < k:
        rest = [v for v in range(n) if v not in chosen]
        chosen.append(max(rest, key=lambda v: (min(float(distance[v, c]) for c in chosen), -v)))
    found = vtc.DivPrune(keep=k).select(vision_tokens(n, features=features))
    assert found.indices.tolist() == sorted(chosen)


def test_divprune_starts_far_out_ignores_lengths_and_never_repeats_itself() -> None:
    features = torch.tensor([[1.0, 0, 0], [0.9, 0.1, 0], [0, 0, 1.0], [0.95, 0, 0.1]])
    assert vtc.DivPrune(keep=1).select(vision_tokens(4, features=features)).indices.tolist() == [2]
    scaled = features * torch.tensor([[1.0], [9], [0.1], [4]])
    for k in (1, 2, 3):
        a, b = (
            vtc.DivPrune(keep=k).select(vision_tokens(4, features=f)) for f in (features, scaled)
        )
        assert a.indices.tolist() == b.indices.tolist()
    same = torch.ones(9, 3)
    found = vtc.DivPrune(keep=4).select(vision_tokens(9, features=same)).indices.tolist()
    assert found == [0, 1, 2, 3]
    assert len(vtc.DivPrune(keep=1.0).select(vision_tokens(9)).indices) == 9


# ---- VisionZip ----------------------------------------------------------------------------------
@pytest.mark.parametrize(("total", "parts"), [(192, (162, 30)), (128, (108, 20)), (64, (54, 10))])
def test_visionzip_splits_as_published(total: int, parts: tuple[int, int]) -> None:
    assert vtc.VisionZip().split(total) == parts


def test_visionzip_splits_few_tokens_too() -> None:
    assert [vtc.VisionZip().split(total) for total in (1, 2, 3)] == [(1, 0), (1, 1), (2, 1)]
    assert [vtc.VisionZip(contextual=0).split(total) for total in (1, 2)] == [(1, 0), (2, 0)]
    assert [vtc.VisionZip(contextual=0.99).split(total) for total in (2, 5)] == [(1, 1), (1, 4)]


@quick
@given(st.integers(8, 40), st.integers(0, 5), st.booleans(), st.sampled_from(["sum", "mean"]))
def test_visionzip_follows_its_definition(n: int, seed: int, cls: bool, how: str) -> None:
    tokens = vision_tokens(n, seed, cls)
    method = vtc.VisionZip(keep=n // 2, contextual=0.3, merge_by=how)
    found = method.select(tokens)
    assert tokens.cls_attention is not None
    assert tokens.keys is not None
    assert tokens.encoder is not None
    dominant_count, c = method.split(n // 2)
    best = sorted(range(n), key=lambda i: -float(tokens.cls_attention[i]))  # type: ignore[index]
    dominant = sorted(best[: dominant_count - cls])
    rest = [i for i in range(n) if i not in dominant]
    step = max(1, len(rest) // c)
    targets = [rest[step * k] for k in range(c)]
    keys = tokens.keys.view(n, 2, 4).mean(1)
    joined: dict[int, list[int]] = {t: [] for t in targets}
    for i in rest:
        if i not in targets:
            cosines = [float(torch.cosine_similarity(keys[i], keys[t], dim=0)) for t in targets]
            joined[targets[cosines.index(max(cosines))]].append(i)
    rows = [] if tokens.encoder_cls is None else [tokens.encoder_cls]
    rows += [tokens.encoder[i] for i in dominant]
    for t in targets:
        state = tokens.encoder[t]
        if joined[t]:
            state = state + tokens.encoder[joined[t]].mean(0)
            state = state / 2 if how == "mean" else state
        rows.append(state)
    assert found.features is not None
    torch.testing.assert_close(found.features, torch.stack(rows) + 1)
    assert len(found.indices) == len(found.features) == n // 2
    assert {*dominant, *targets} <= set(found.indices.tolist())


def test_visionzip_puts_tokens_at_their_patches_with_original_positions() -> None:
    tokens = vision_tokens(20)
    assert tokens.encoder is not None
    found = vtc.VisionZip(keep=8, contextual=0, positions="original").select(tokens)
    assert found.features is not None
    own = (found.features - 1 - tokens.encoder[found.indices]).abs().amax(1) < 1e-6
    assert own.sum() == 7  # all but [CLS]
    assert len(vtc.VisionZip(keep=20).select(tokens).indices) == 20
    with pytest.raises(ValueError, match="encoder"):
        vtc.VisionZip(keep=8).select(vision_tokens(20, encoder=None))


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_visionzip_tells_where_each_patch_went(positions: Any, cls: bool) -> None:
    tokens = vision_tokens(40, cls=cls)
    assert tokens.encoder is not None
    assert tokens.project is not None
    method = vtc.VisionZip(keep=12, contextual=0.4, positions=positions, merge_by="mean")
    found = method.select(tokens)
    assert found.features is not None
    assert found.sources is not None
    dominant, contextual = method.split(12)
    size = found.sources[found.sources >= 0].bincount(minlength=12)
    assert int((size > 0).sum()) == 12 - cls  # none went into [CLS]
    assert int((found.sources < 0).sum()) == 0
    merged = 0
    for new in range(12):
        patches = (found.sources == new).nonzero().squeeze(1)
        content = found.features[new]
        if len(patches) > 1:  # a target and the mean of those that joined it, in equal parts
            merged += 1
            halves = [
                tokens.project(
                    (tokens.encoder[t] + tokens.encoder[patches[patches != t]].mean(0)) / 2
                )
                for t in patches.tolist()
            ]
            assert any(torch.allclose(content, half, atol=1e-5) for half in halves)
        elif len(patches) == 1 and torch.equal(content, tokens.features[patches[0]]):
            dominant -= 1
    assert dominant == cls
    assert 0 < merged <= contextual


def test_sources_that_do_not_fit_are_refused() -> None:
    from vtc.core import Selection
    from vtc.runtime.choices import checked

    method, kept = vtc.Random(), torch.tensor([0, 2])
    good = Selection(kept, sources=torch.tensor([0, -1, 1, 1]))
    assert checked(method, good, 4) is good
    for wrong in ([0, -1, 1], [0, -2, 1, 1], [0, 0, 2, 1]):
        with pytest.raises(ValueError, match="random: sources must"):
            checked(method, Selection(kept, sources=torch.tensor(wrong)), 4)
    with pytest.raises(ValueError, match="int64"):
        checked(method, Selection(kept, sources=torch.zeros(4)), 4)


# ---- PyramidDrop --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("keep", "n", "counts"),
    [
        (0.5, 576, [288, 144, 72]),
        (0.5, 575, [287, 143, 71]),
        (0.5, 2880, [1440, 720, 360]),
        (0.5596, 576, [322, 180, 100]),
        (0.4197, 576, [241, 101, 42]),
        (0.1916, 576, [110, 21, 4]),
    ],
)
def test_pyramiddrop_leaves_the_published_numbers(keep: float, n: int, counts: list[int]) -> None:
    method = vtc.PyramidDrop(keep=keep)
    assert [method.left(n, stage, 3) for stage in (1, 2, 3)] == counts


def test_pyramiddrop_reaches_a_whole_number_in_its_last_stage() -> None:
    left = [vtc.PyramidDrop(keep=72).left(576, stage, 3) for stage in (1, 2, 3)]
    assert left == [288, 144, 72]


def test_pyramiddrop_keeps_what_the_next_layer_looks_at() -> None:
    method = vtc.PyramidDrop(keep=0.25)
    ahead = torch.rand(2, 20, generator=torch.Generator().manual_seed(1))
    ahead[-1, 3:15] = torch.tensor([0, 9, 1, 9, 2, 3, 8, 0, 0, 0, 0, 0.0])
    assert kept(method, layer_state(8, ahead=ahead)) == [1, 3, 6]
    assert method.peeks(32) == {8: "last", 16: "last", 24: "last"}
    assert kept(vtc.PyramidDrop(keep=1.0), layer_state(8, ahead=ahead)) is None
    even = torch.full((1, 20), 0.05)
    assert kept(method, layer_state(8, ahead=even)) == [0, 1, 2]


# ---- V2Drop -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("shares", "counts", "average"),
    [
        ((0.5, 0.3), (288, 86, 1), 193.8),
        ((0.28, 0.25), (161, 40, 1), 131.0),
        ((0.05, 0.05), (28, 1, 1), 66.7),
    ],
)
def test_v2drop_leaves_the_published_numbers(
    shares: tuple[float, float], counts: tuple[int, int, int], average: float
) -> None:
    """The averages are those of the code, which leaves one token at the end."""
    method = vtc.V2Drop(keep=shares[0], then=(shares[1], 0.0), one_stays=True)
    left, per_layer, found = 576, [], []
    for layer in range(32):
        if layer in method.prune_layers(32):
            before = {(layer - 1, "input"): randn(left + 8, 4, seed=99)}
            chosen = kept(method, layer_state(layer, left, original=(576,), recorded=before))
            left = left if chosen is None else len(chosen)
            found.append(left)
        per_layer.append(left)
    assert tuple(found) == counts
    assert sum(per_layer) / 32 == pytest.approx(average, abs=0.1)


def test_v2drop_drops_what_a_layer_left_as_it_was() -> None:
    state = layer_state(3)
    before = state.hidden.clone()
    before[3 + torch.tensor([1, 4, 7])] += torch.tensor([[3.0], [1.0], [2.0]])
    recorded = {(2, "input"): before}
    moved = layer_state(3, recorded=recorded)
    assert kept(vtc.V2Drop(keep=0.25), moved) == [1, 4, 7]
    assert kept(vtc.V2Drop(keep=0.17), moved) == [1, 7]
    assert kept(vtc.V2Drop(keep=1.0), moved) is None
    last = layer_state(22, recorded={(21, "input"): before})
    assert kept(vtc.V2Drop(), last) == []
    assert len(kept(vtc.V2Drop(one_stays=True), last) or []) == 1
    with pytest.raises(ValueError, match="layers"):
        vtc.V2Drop(layers=(3, 4))
    assert vtc.V2Drop(then=(0.25, 0)) == vtc.V2Drop()


@pytest.mark.parametrize("name", ["v2drop", "transprune"])
def test_shares_are_no_numbers_of_tokens(name: str) -> None:
    with pytest.raises(TypeError, match=r"^keep: expected a fraction such as 0.25, got 1$"):
        vtc.make(name, keep=1)
    for wrong in (0.0, -0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match=r"^keep: expected a number in \(0, 1\], got "):
            vtc.make(name, keep=wrong)


def test_v2drop_later_shares() -> None:
    with pytest.raises(TypeError, match=r"then: expected a fraction such as 0.25, got 1"):
        vtc.V2Drop(then=(1, 0.0))
    with pytest.raises(ValueError, match=r"then: expected a number in \[0, 1\], got 1.5"):
        vtc.V2Drop(then=(1.5, 0.0))


# ---- DART ---------------------------------------------------------------------------------------
def dart_state(vision: int = 12, text: int = 5, seed: int = 0) -> LayerState:
    s = 3 + vision + text
    recorded = {(1, "keys"): randn(s, 6, seed=seed), (1, "normed"): randn(s, 5, seed=seed + 1)}
    return layer_state(2, vision, text, recorded=recorded)


@quick
@given(st.integers(9, 40), st.integers(0, 6), st.integers(0, 5), st.integers(1, 20))
def test_dart_follows_its_definition(vision: int, text: int, seed: int, wanted: int) -> None:
    state, k = dart_state(vision, text, seed), min(wanted, vision - 1)
    norms = state.recorded[1, "keys"].abs().sum(1).tolist()
    z = state.recorded[1, "normed"]
    spans = range(3, 3 + vision), range(3 + vision, 3 + vision + text)
    pivots = sorted(spans[0], key=lambda i: -norms[i])[: min(4, k)]
    guides = sorted(spans[1], key=lambda i: -norms[i])[:4]
    chosen, rest = list(pivots), k - len(pivots)
    for number, pivot in enumerate([*pivots, *guides]):
        count = rest // len([*pivots, *guides]) + (number < rest % len([*pivots, *guides]))
        free = [i for i in spans[0] if i not in chosen]
        cosine = {i: float(torch.cosine_similarity(z[i], z[pivot], dim=0)) for i in free}
        chosen += sorted(free, key=lambda i: cosine[i])[:count]
    assert kept(vtc.DART(keep=k), state) == sorted(i - 3 for i in chosen)
    assert len(chosen) == k


def test_the_code_of_dart_keeps_its_pivots_besides() -> None:
    for target, kept_by_code in ((192, 196), (128, 132), (64, 68)):
        state = dart_state(576, 12)
        found = vtc.DART(keep=target, count_pivots=False).prune(state)
        assert found is not None
        assert len(found.indices) == kept_by_code
    assert kept(vtc.DART(keep=9, count_pivots=False), dart_state()) is not None


def test_dart_does_not_mind_the_length_of_states() -> None:
    state = dart_state()
    scaled = dict(state.recorded)
    scaled[1, "normed"] = scaled[1, "normed"] * torch.linspace(0.5, 5, 20)[:, None]
    assert kept(vtc.DART(keep=6), state) == kept(vtc.DART(keep=6), layer_state(2, recorded=scaled))
    assert kept(vtc.DART(keep=12), state) is None
