# SPDX-License-Identifier: Apache-2.0
"""SCOPE, MMTok and CATP as pure functions, and the greedy coverage they share."""

from __future__ import annotations

import dataclasses
from itertools import combinations, pairwise
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vtc
from vtc.core import LayerState, VisionTokens
from vtc.ops import coverage_greedy, naive

quick = settings(max_examples=40, deadline=None, derandomize=True)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def vision_tokens(n: int, seed: int = 0, **more: Any) -> VisionTokens:
    signals: dict[str, Any] = {
        "features": randn(n, 6, seed=seed),
        "grid": torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(n)),
        "cls_attention": torch.rand(n, generator=torch.Generator().manual_seed(seed + 1)).double(),
        "encoder": randn(n, 5, seed=seed + 2),
        "text": randn(4, 6, seed=seed + 3),
        "segment": randn(3, 6, seed=seed + 4),
    }
    return VisionTokens(**{**signals, **more})


def covered(similarity: Tensor, chosen: tuple[int, ...]) -> float:
    """The value of a choice: what every row is covered by, from 0 on."""
    return float(similarity[:, list(chosen)].amax(1).clamp_min(0).sum())


# ---- the op -------------------------------------------------------------------------------------
@quick
@given(st.integers(1, 12), st.integers(1, 14), st.integers(0, 9), st.booleans(), st.booleans())
def test_coverage_is_the_naive_one(m: int, n: int, seed: int, weighs: bool, adds: bool) -> None:
    similarity, k = randn(m, n, seed=seed), min(n, 5)
    factor = randn(n, seed=seed + 1).abs() if weighs else None
    bonus = randn(n, seed=seed + 2).abs() if adds else None
    found = coverage_greedy(similarity, k, factor, bonus)
    assert found.tolist() == naive.coverage_greedy(similarity, k, factor, bonus).tolist()


@quick
@given(st.integers(0, 30))
def test_greedy_coverage_is_near_the_best(seed: int) -> None:
    similarity = (1 + naive.cosines(randn(9, 4, seed=seed))) / 2
    greedy = covered(similarity, tuple(coverage_greedy(similarity, 3).tolist()))
    best = max(covered(similarity, three) for three in combinations(range(9), 3))
    assert greedy >= (1 - 1 / 2.718281828) * best
    values = [
        covered(similarity, tuple(coverage_greedy(similarity, k).tolist())) for k in range(1, 7)
    ]
    gains = [values[0], *(b - a for a, b in pairwise(values))]
    assert all(a >= b - 1e-9 for a, b in pairwise(gains))
    assert min(gains) >= -1e-9


def test_tokens_that_cover_each_other_best_are_equal() -> None:
    """Their gains are equal but for rounding, which must not decide."""
    rows = randn(12, 3, seed=4)
    rows[7] = rows[2] + 0.1 * rows[5]
    for noise in range(5):
        shaken = rows * (1 + 1e-8 * randn(12, 3, seed=noise))
        similarity = (1 + naive.cosines(shaken)) / 2
        assert (
            coverage_greedy(similarity, 10).tolist()
            == coverage_greedy((1 + naive.cosines(rows)) / 2, 10).tolist()
        )


def test_a_small_difference_of_gains_decides() -> None:
    """A gain that is larger by a twenty-thousandth is larger; the first is not."""
    similarity = torch.eye(6) * torch.tensor([1.0, 1.00005, 0.5, 0.50001, 0.2, 0.20001])
    assert coverage_greedy(similarity, 6).tolist() == [1, 0, 3, 2, 5, 4]
    factor = torch.tensor([1e-3, 1.00005e-3, 5e-4, 5.0001e-4, 2e-4, 2.0001e-4])
    assert coverage_greedy(torch.eye(6), 6, factor).tolist() == [1, 0, 3, 2, 5, 4]
    bonus = factor
    assert coverage_greedy(torch.zeros(6, 6), 6, bonus=bonus).tolist() == [1, 0, 3, 2, 5, 4]


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_another_scale_change_no_near_tie(seed: int) -> None:
    """As in MMTok: a text's few large shares stand beside many small gains. The definition, without
    a tolerance beyond that of fp64: tokens that cover each other best do tie."""
    wide = randn(400, 24, seed=seed)
    rows = [0.001 * naive.cosines(wide), (6 * randn(5, 400, seed=seed + 9)).softmax(1)]
    similarity = torch.cat(rows).clamp_min(0)
    covered, chosen = torch.zeros(405, dtype=torch.float64), list[int]()
    for _ in range(120):
        gain = (similarity.double() - covered[:, None]).clamp_min(0).sum(0)
        gain[chosen] = -1
        best = gain >= gain.max() * (1 - 1e-12)
        chosen.append(int(best.to(torch.uint8).argmax()))
        covered = torch.maximum(covered, similarity[:, chosen[-1]].double())
    assert coverage_greedy(similarity, 120).tolist() == chosen


def test_a_copy_adds_nothing_and_ties_go_to_the_first() -> None:
    rows = torch.eye(3)[[0, 0, 1, 2]]
    assert coverage_greedy(rows @ rows.T, 4).tolist() == [0, 2, 3, 1]
    assert coverage_greedy(torch.ones(3, 4), 2).tolist() == [0, 1]
    for k in (-1, 5):
        with pytest.raises(ValueError, match="k"):
            coverage_greedy(torch.ones(3, 4), k)
    with pytest.raises(ValueError, match="similarity"):
        coverage_greedy(torch.ones(4), 1)


# ---- SCOPE --------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(3))
def test_small_factors_are_weighed_like_large_ones(seed: int) -> None:
    """Attention over hundreds of tokens makes factors, and so gains, of about a thousandth."""
    x = randn(300, 16, seed=seed)
    rows = x / x.norm(dim=1, keepdim=True)
    similarity = (1 + rows @ rows.T) / 2
    factor = (1.5 * randn(300, seed=seed + 7)).softmax(0)
    found = coverage_greedy(similarity, 150, factor)
    assert found.tolist() == coverage_greedy(similarity, 150, 1000 * factor).tolist()
    # The definition, without any tolerance, in fp64.
    covered, chosen = torch.zeros(300, dtype=torch.float64), list[int]()
    for _ in range(150):
        gain = (similarity - covered[:, None]).clamp_min(0).sum(0) * factor
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
        covered = torch.maximum(covered, similarity[:, chosen[-1]])
    assert len({*chosen} & {*found.tolist()}) >= 148
    assert found.tolist()[:40] == chosen[:40]


def test_scope_with_even_saliency_is_facility_location() -> None:
    tokens = vision_tokens(12, cls_attention=torch.full((12,), 0.1).double())
    assert tokens.encoder is not None
    plain = coverage_greedy(naive.cosines(tokens.encoder), 4).sort().values
    assert vtc.SCOPE(keep=4).select(tokens).indices.tolist() == plain.tolist()
    other = vision_tokens(12)
    assert vtc.SCOPE(keep=4, alpha=0).select(other).indices.tolist() == plain.tolist()


def test_scope_takes_what_is_looked_at_first() -> None:
    attention = torch.zeros(12).double()
    attention[[2, 5, 9]] = torch.tensor([0.1, 0.3, 0.6]).double()
    tokens = vision_tokens(12, cls_attention=attention)
    assert vtc.SCOPE(keep=3).select(tokens).indices.tolist() == [2, 5, 9]
    assert len(vtc.SCOPE(keep=1.0).select(tokens).indices) == 12
    with pytest.raises(ValueError, match="cls_attention"):
        vtc.SCOPE(keep=3).select(vision_tokens(12, cls_attention=None))


# ---- MMTok --------------------------------------------------------------------------------------
def test_mmtok_first_takes_what_the_text_names() -> None:
    tokens = vision_tokens(12)
    word = tokens.features[7:8] + 0.01
    asked = vision_tokens(12, text=word)
    method = vtc.MMTok(keep=1, alpha=0, text_temperature=1e-3)
    assert method.select(asked).indices.tolist() == [7]


@quick
@given(st.integers(4, 14), st.integers(0, 5), st.integers(0, 3))
def test_mmtok_covers_text_and_image_as_defined(n: int, seed: int, words: int) -> None:
    tokens = vision_tokens(n, seed, text=randn(words, 6, seed=seed + 9))
    assert tokens.encoder is not None
    assert tokens.text is not None
    rows = [0.5 * (naive.cosines(tokens.encoder) / 0.2).softmax(1) / n]
    for word in tokens.text:
        cosines = torch.stack([torch.cosine_similarity(word, f, dim=0) for f in tokens.features])
        rows.append((cosines / 0.02).softmax(0)[None] / words)
    expected = naive.coverage_greedy(torch.cat(rows), n // 2).sort().values
    assert vtc.MMTok(keep=n // 2).select(tokens).indices.tolist() == expected.tolist()


# ---- CATP ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(("keep", "half"), [(192, 384), (128, 352), (64, 320)])
def test_catp_halves_what_is_to_go_as_published(keep: int, half: int) -> None:
    assert vtc.CATP(keep=keep).halfway(576) == half


def test_catp_selects_by_coverage_and_alignment() -> None:
    tokens = vision_tokens(10)
    assert tokens.segment is not None
    similarity = (1 + naive.cosines(tokens.features)) / 2
    plain = coverage_greedy(similarity, 6).sort().values
    assert vtc.CATP(keep=2, align=0).select(tokens).indices.tolist() == plain.tolist()
    mean = tokens.segment.float().mean(0).double()
    aligned = torch.stack([torch.cosine_similarity(f, mean, dim=0) for f in tokens.features])
    best = aligned.topk(6).indices.sort().values
    assert vtc.CATP(keep=2, align=1e6).select(tokens).indices.tolist() == best.tolist()
    assert len(vtc.CATP(keep=1.0).select(tokens).indices) == 10


def icl_state(layer: int, images: tuple[int, ...], seed: int = 0, rise: float = 0.0) -> LayerState:
    """<s>, then each image and two words of text; attention rows of layers 4 and 5."""
    image = [-1]
    for ordinal, n in enumerate(images):
        image += [ordinal] * n + [-1, -1]
    s = len(image)
    which = torch.tensor(image)
    before = torch.full((1, s), 1 / s)
    now = before.clone()
    now[0, 2] += rise
    return LayerState(
        layer=layer,
        num_layers=32,
        hidden=randn(s, 4, seed=seed),
        image=which,
        text=(which < 0) & (torch.arange(s) > 0),
        grid=torch.full((s, 3), -1),
        prompt_length=s,
        original=tuple(2 * n for n in images),
        attention={4: before, 5: now},
    )


def test_catp_keeps_its_budgets_to_the_token() -> None:
    method, images = vtc.CATP(keep=0.25), (8, 6, 4)
    state = icl_state(6, images)
    found = method.prune(state)
    assert found is not None
    owner = state.image[state.vision][found.indices]
    assert int((owner < 2).sum()) == 4 + 3
    assert int((owner == 2).sum()) == 4  # the query loses nothing to the examples
    state = icl_state(7, images)
    found = method.prune(state)
    assert found is not None
    owner = state.image[state.vision][found.indices]
    assert int((owner < 2).sum()) == 8 + 6
    assert int((owner == 2).sum()) == 2


def test_catp_ranks_examples_by_the_query_and_by_rising_attention() -> None:
    state = icl_state(6, (5, 4))
    query = list(range(8, 14))  # the image of the query and the words after it
    target = state.hidden[query].float().mean(0)
    cosine = torch.stack([torch.cosine_similarity(h.float(), target, dim=0) for h in state.hidden])
    best = cosine[1:6].topk(2).indices.sort().values.tolist()
    found = vtc.CATP(keep=2).prune(state)
    assert found is not None
    assert found.indices.tolist() == [*best, 5, 6, 7, 8]
    lifted = vtc.CATP(keep=2).prune(icl_state(6, (5, 4), rise=5.0))
    assert lifted is not None
    assert 1 in lifted.indices.tolist()
    unguided = vtc.CATP(keep=2, guide=0, normalize=True).prune(icl_state(6, (5, 4), rise=0.001))
    assert unguided is not None
    assert unguided.indices.tolist() == [0, 1, 5, 6, 7, 8]


def test_catp_counts_a_rise_of_attention_only() -> None:
    """Where attention fell is where it stayed: the cosine decides, not by how much it fell."""
    state = icl_state(6, (5, 4))
    fell = {4: torch.full((1, 14), 0.05), 5: torch.full((1, 14), 0.05)}
    fell[5][0, 1:6] -= torch.tensor([0.01, 0.04, 0.02, 0.05, 0.03])
    even = vtc.CATP(keep=2).prune(state)
    found = vtc.CATP(keep=2).prune(dataclasses.replace(state, attention=fell))
    assert even is not None
    assert found is not None
    assert found.indices.tolist() == even.indices.tolist()
    # One that rose least comes before all that fell, and by the last row alone.
    fell[5][0, 4] = 0.06
    rows = {layer: torch.cat([torch.rand(3, 14).sort(descending=layer == 4).values, row])
            for layer, row in fell.items()}  # fmt: skip
    found = vtc.CATP(keep=1, guide=0).prune(dataclasses.replace(state, attention=rows))
    assert found is not None
    assert found.indices.tolist() == [3, 5, 6, 7, 8]


def test_catp_s_normalised_rise_is_weighed_against_the_cosine() -> None:
    state, rise = icl_state(6, (5, 4), seed=1), [0.001, 0.004, 0.0, 0.002, 0.003]
    rows = {4: torch.full((1, 14), 0.05), 5: torch.full((1, 14), 0.05)}
    rows[5][0, 1:6] += torch.tensor(rise)
    state = dataclasses.replace(state, attention=rows)
    target = state.hidden[8:].float().mean(0)
    cosine = [float(torch.cosine_similarity(state.hidden[i].float(), target, dim=0))
              for i in range(1, 6)]  # fmt: skip
    for normalize, guide in ((False, 0.6), (True, 0.6), (True, 0.1), (True, 3.0)):
        scale = 1 / 0.004 if normalize else 1.0
        score = [scale * r + guide * c for r, c in zip(rise, cosine, strict=True)]
        best = sorted(sorted(range(5), key=lambda i: -score[i])[:2])
        found = vtc.CATP(keep=2, normalize=normalize, guide=guide).prune(state)
        assert found is not None
        assert found.indices.tolist() == [*best, 5, 6, 7, 8]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("pool", ["image", "image+text"])
def test_catp_ranks_the_query_by_what_is_left_of_the_examples(
    seed: int, pool: Literal["image", "image+text"]
) -> None:
    """<s>, an image of 3, 2 words, one of 4, 2 words, the query's of 6, 2 words; what precedes the
    first image is no context, and neither is the query."""
    state = icl_state(7, (3, 4, 6), seed=seed)
    assert state.image.tolist() == [-1, 0, 0, 0, -1, -1, 1, 1, 1, 1, -1, -1, *[2] * 6, -1, -1]
    context = [1, 2, 3, 6, 7, 8, 9] + ([4, 5, 10, 11] if pool == "image+text" else [])
    target = state.hidden[context].float().mean(0)
    query = [float(torch.cosine_similarity(state.hidden[i].float(), target, dim=0))
             for i in range(12, 18)]  # fmt: skip
    best = sorted(sorted(range(6), key=lambda i: -query[i])[:3])
    found = vtc.CATP(keep=3, context_pool=pool).prune(state)
    assert found is not None
    assert found.indices.tolist() == [*range(7), *(7 + i for i in best)]
    # Attention has no say here.
    risen = {4: torch.zeros(1, 20), 5: torch.rand(1, 20)}
    again = vtc.CATP(keep=3, context_pool=pool).prune(dataclasses.replace(state, attention=risen))
    assert again is not None
    assert again.indices.tolist() == found.indices.tolist()


@pytest.mark.parametrize("pool", ["image", "image+text"])
def test_catp_ranks_a_query_without_examples_by_itself(
    pool: Literal["image", "image+text"],
) -> None:
    state = icl_state(7, (6,), seed=2)
    target = state.hidden[1:9].float().mean(0)
    own = [float(torch.cosine_similarity(state.hidden[i].float(), target, dim=0))
           for i in range(1, 7)]  # fmt: skip
    found = vtc.CATP(keep=3, context_pool=pool).prune(state)
    assert found is not None
    assert found.indices.tolist() == sorted(sorted(range(6), key=lambda i: -own[i])[:3])


def test_catp_s_query_whose_image_left_no_token_begins_after_the_last() -> None:
    state = icl_state(6, (6, 2))
    gone = dataclasses.replace(
        state, image=torch.where(state.image == 1, -1, state.image), text=state.text.clone()
    )
    gone.text[9:11] = False
    target = state.hidden[[7, 8, 11, 12]].float().mean(0)
    cosine = [float(torch.cosine_similarity(state.hidden[i].float(), target, dim=0))
              for i in range(1, 7)]  # fmt: skip
    found = vtc.CATP(keep=3).prune(gone)
    assert found is not None
    assert found.indices.tolist() == sorted(sorted(range(6), key=lambda i: -cosine[i])[:3])


def test_catp_reads_the_last_rows_of_two_layers() -> None:
    assert vtc.CATP().taps(32) == {4: "last", 5: "last"}
    assert vtc.CATP(layer=3).taps(8) == {1: "last", 2: "last"}
    assert vtc.CATP(layer=6).prune_layers(8) == (6, 7)
    with pytest.raises(ValueError, match=r"layer: expected 2 to 6 in a model of 8 .* got 7"):
        vtc.CATP(layer=7).prune_layers(8)
    assert vtc.CATP().prune_layers(33) == (9, 10)
    assert vtc.CATP().prune_layers(4) == (2, 3)  # a layer before K is needed
    assert [vtc.CATP(positions=p).prune_positions for p in ("contiguous", "original")] == [
        "original", "original",
    ]  # fmt: skip


def test_catp_halves_exactly_and_reads_its_segment_only_where_something_goes() -> None:
    assert [vtc.CATP(keep=1).halfway(n) for n in (1, 2, 9, 10)] == [1, 1, 5, 5]
    bare = vision_tokens(8, segment=None)
    assert vtc.CATP(keep=8).select(bare).indices.tolist() == list(range(8))
    with pytest.raises(ValueError, match="segment: CATP reads"):
        vtc.CATP(keep=6).select(bare)
    silent = vision_tokens(8, segment=torch.zeros(0, 6))
    similarity = (1 + naive.cosines(silent.features)) / 2
    expected = coverage_greedy(similarity, 5).sort().values.tolist()
    assert vtc.CATP(keep=2).select(silent).indices.tolist() == expected


def test_catp_with_a_single_image_prunes_the_query_only() -> None:
    method, state = vtc.CATP(keep=2), icl_state(6, (6,))
    assert method.prune(state) is None
    found = method.prune(icl_state(7, (6,)))
    assert found is not None
    assert len(found.indices) == 2
    with pytest.raises(ValueError, match="layer"):
        vtc.CATP(layer=31).prune_layers(32)
    assert vtc.CATP().prune_layers(32) == (6, 7)
    assert vtc.CATP().prune_layers(28) == (6, 7)
    assert vtc.CATP().prune_layers(40) == (10, 11)
    assert vtc.CATP().prune_layers(8) == (2, 3)


@quick
@given(st.data(), st.integers(0, 99))
def test_what_catp_maximises_is_monotone_and_submodular(data: st.DataObject, seed: int) -> None:
    """F(Y) = what Y covers + align * how Y matches the text; Y a subset of Z, x in neither."""
    tokens, align = vision_tokens(9, seed), vtc.CATP().align
    assert tokens.segment is not None
    similarity = (1 + naive.cosines(tokens.features)) / 2
    mean = tokens.segment.mean(0)
    meant = (1 + torch.cosine_similarity(tokens.features, mean[None], dim=1)) / 2

    def value(chosen: set[int]) -> float:
        here = sorted(chosen)
        return covered(similarity, tuple(here)) + align * float(meant[here].sum()) if here else 0.0

    large = data.draw(st.sets(st.integers(0, 8), max_size=8))
    small = set(data.draw(st.lists(st.sampled_from(sorted(large))))) if large else set()
    more = data.draw(st.sampled_from(sorted(set(range(9)) - large)))
    gain = value(large | {more}) - value(large)
    assert value(small | {more}) - value(small) >= gain - 1e-9
    assert gain >= -1e-9
    # Its choice is that of the greedy maximiser of F, and hence within 1 - 1/e of the best.
    size = data.draw(st.integers(5, 8))
    found = vtc.CATP(keep=2 * size - 9).select(tokens).indices.tolist()
    assert len(found) == size
    chosen: set[int] = set()
    while len(chosen) < size:
        chosen.add(max(sorted(set(range(9)) - chosen), key=lambda i: value(chosen | {i})))
    assert set(found) == chosen
    best = max(value(set(some)) for some in combinations(range(9), size))
    assert value(set(found)) >= (1 - 1 / 2.718281828) * best


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("normalize", [False, True])
def test_catp_s_counts_follow_the_examples(seed: int, normalize: bool) -> None:
    """Examples in another order, with what they score, keep as many tokens each as before."""
    sizes, order = (7, 5, 6), (2, 0, 1)
    state = icl_state(6, (*sizes, 4), seed=seed)
    rows = {
        layer: torch.rand(
            1, len(state.image), generator=torch.Generator().manual_seed(seed + layer)
        )
        for layer in (4, 5)
    }
    blocks, start = [], 1
    for n in (*sizes, 4):
        blocks.append(list(range(start, start + n + 2)))
        start += n + 2
    moved = [0, *(i for e in order for i in blocks[e]), *blocks[3]]
    ordinal = [-1, *(new if k < n else -1 for new, e in enumerate((*order, 3))
                     for n in [len(blocks[e]) - 2] for k in range(n + 2))]  # fmt: skip
    first = dataclasses.replace(state, attention=rows)
    second = dataclasses.replace(
        state,
        hidden=state.hidden[moved],
        image=torch.tensor(ordinal),
        text=state.text[moved],
        original=(*(state.original[e] for e in order), state.original[3]),
        attention={layer: row[:, moved] for layer, row in rows.items()},
    )
    method = vtc.CATP(keep=0.25, normalize=normalize)

    def counts(given: LayerState) -> list[int]:
        found = method.prune(given)
        assert found is not None
        owner = given.image[given.vision][found.indices]
        return [int((owner == e).sum()) for e in range(4)]

    before, after = counts(first), counts(second)
    assert after == [*(before[e] for e in order), before[3]]
    assert after != before  # the examples do differ
