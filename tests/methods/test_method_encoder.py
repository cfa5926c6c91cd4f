# SPDX-License-Identifier: Apache-2.0
"""ToMe and FlowCut: what leaves the vision tower, layer by layer."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
from itertools import pairwise
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vtc
from tests.reference.models import collate, make_sample, samples, shared_model
from tests.reference.reference import encode, encode_merging
from vtc.core import EncoderState, Merging
from vtc.methods.flowcut import FlowCut
from vtc.methods.tome import ToMe

quick = settings(max_examples=40, deadline=None, derandomize=True)


def state_of(
    n: int, layer: int = 0, layers: int = 23, seed: int = 0, cls: bool = True
) -> EncoderState:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, 4, 8, generator=generator)
    return EncoderState(
        layer=layer,
        num_layers=layers,
        original=n,
        has_cls=cls,
        attention=torch.rand(n, generator=generator),
        keys=torch.randn(n, 4, 8, generator=generator),
        values=values,
        cls_value=values.mean(0) if cls else None,
        size=torch.ones(n),
    )


def run(
    method: ToMe | FlowCut, n: int, layers: int = 23, cls: bool = True
) -> list[tuple[int, Merging | None]]:
    """Tokens entering each layer and what was done, contents drawn anew in each layer."""
    found, left, memory = [], n, None
    for layer in range(layers):
        state = state_of(left, layer, layers, seed=layer, cls=cls)
        state = dataclasses.replace(state, original=n, memory=memory)
        merging = method.merge(state)
        found.append((left, merging))
        if merging is not None:
            left, memory = int(merging.target.max()) + 1, merging.memory
    return [*found, (left, None)]


# ---- ToMe ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("keep", "counts"), [(192, {17: 16, 16: 7}), (128, {20: 11, 19: 12}), (64, {23: 6, 22: 17})]
)
def test_tome_spreads_a_budget_over_the_layers_of_clip(keep: int, counts: dict[int, int]) -> None:
    left = [n for n, _ in run(ToMe(keep), 576)]
    assert left[-1] == keep
    assert Counter(a - b for a, b in pairwise(left)) == counts


def naive_tome(keys: Tensor, r: int, has_cls: bool) -> list[set[int]]:
    """The tokens that are one after merging r pairs, by the definition."""
    mean = keys.mean(1)
    place = lambda i: i + int(has_cls)  # noqa: E731
    a = [i for i in range(len(keys)) if place(i) % 2 == 0]
    b = [i for i in range(len(keys)) if place(i) % 2 == 1]
    cos = torch.nn.functional.cosine_similarity
    best = {i: max(b, key=lambda j: (float(cos(mean[i], mean[j], dim=0)), -j)) for i in a}
    value = {i: float(cos(mean[i], mean[best[i]], dim=0)) for i in a}
    gone = sorted(a, key=lambda i: -value[i])[:r]
    groups = {j: {j} for j in b}
    for i in gone:
        groups[best[i]].add(i)
    return [{i} for i in a if i not in gone] + [groups[j] for j in b]


@quick
@given(st.integers(6, 40), st.integers(0, 5), st.booleans())
def test_tome_merges_the_most_similar_pairs(n: int, seed: int, cls: bool) -> None:
    state = state_of(n, layer=22, seed=seed, cls=cls)
    wanted = -(-2 * n // 3)
    merging = ToMe(wanted).merge(state)
    assert merging is not None
    groups = [
        set((merging.target == k).nonzero().flatten().tolist())
        for k in range(int(merging.target.max()) + 1)
    ]
    assert groups == naive_tome(state.keys, n - wanted, cls)
    assert sorted(token for group in groups for token in group) == list(range(n))


@pytest.mark.parametrize("order", ["sequence", "similarity"])
@pytest.mark.parametrize("cls", [False, True])
def test_tome_s_order_over_layers(order: Literal["sequence", "similarity"], cls: bool) -> None:
    """Which patches become one over four layers, with what A keeps as it came or, in towers
    without [CLS] only, as the published code leaves it: sorted by similarity."""
    groups, keys = [{i} for i in range(48)], state_of(48, seed=3).keys
    expected, contents = [{i} for i in range(48)], state_of(48, seed=3).keys
    for layer in range(4):
        state = dataclasses.replace(state_of(len(groups), layer, 4, cls=cls), keys=keys)
        merging = ToMe(16, order=order).merge(dataclasses.replace(state, original=48))
        assert merging is not None
        m = int(merging.target.max()) + 1
        members = [(merging.target == k).nonzero().flatten().tolist() for k in range(m)]
        groups = [set().union(*(groups[i] for i in some)) for some in members]
        keys = torch.stack([keys[some].mean(0) for some in members])
        expected, contents = published_tome(expected, contents, 8, cls, order == "similarity")
        assert groups == expected


def published_tome(
    groups: list[set[int]], keys: Tensor, r: int, cls: bool, unsorted: bool
) -> tuple[list[set[int]], Tensor]:
    """One layer with [CLS] in the first place, whose row matches nothing, as a sort of A's rows."""
    if cls:
        keys = torch.cat([torch.zeros(1, *keys.shape[1:]), keys])
        groups = [set(), *groups]
    metric = torch.nn.functional.normalize(keys.mean(1), dim=1)
    scores = metric[0::2] @ metric[1::2].T
    if cls:
        scores[0] = -torch.inf
    best, partner = scores.max(1)
    order = best.argsort(descending=True).tolist()
    source, rest = order[:r], order[r:]
    if cls or not unsorted:
        rest.sort()
    a, b = [groups[2 * i] for i in rest], [set(g) for g in groups[1::2]]
    joined = [[keys[2 * j + 1]] for j in range(len(b))]
    for i in source:
        b[int(partner[i])] |= groups[2 * i]
        joined[int(partner[i])].append(keys[2 * i])
    means = [torch.stack(some).mean(0) for some in joined]
    left = [keys[2 * i] for i in rest] + means
    return (a + b)[int(cls) :], torch.stack(left)[int(cls) :]


@quick
@given(st.integers(4, 60), st.integers(1, 12), st.floats(0.05, 1.0), st.booleans())
def test_tome_s_sizes_sum_to_the_patches_after_every_layer(
    n: int, layers: int, share: float, cls: bool
) -> None:
    wanted = max(1, round(share * n), -(-n // 2 ** min(layers, 6)))
    size = torch.ones(n)
    for layer in range(layers):
        state = state_of(len(size), layer, layers, seed=layer, cls=cls)
        merging = ToMe(wanted).merge(dataclasses.replace(state, original=n, size=size))
        if merging is None:
            continue
        assert int(merging.target.min()) == 0
        size = torch.zeros(int(merging.target.max()) + 1).index_add(0, merging.target, size)
        assert float(size.sum()) == n
        assert float(size.min()) >= 1
    assert len(size) == wanted


def test_tome_halves_at_best_and_says_what_is_possible() -> None:
    assert [n for n, _ in run(ToMe(9), 36, layers=2)] == [36, 18, 9]
    with pytest.raises(ValueError, match="at least 9"):
        ToMe(8).merge(state_of(36, layer=0, layers=2))


def test_tome_leaves_alone_what_fits() -> None:
    assert all(merging is None for _, merging in run(ToMe(1.0), 36))
    assert all(merging is None for _, merging in run(ToMe(50), 36))
    assert [ToMe().pairs(n, 36, layers_left=5) for n in (1, 30, 36)] == [0, 0, 0]


def test_merged_copies_of_a_patch_count_as_often_as_they_are() -> None:
    """Without positions all patches of a grey image are one: merging must not change a thing."""
    model = copy.deepcopy(shared_model("clip+llama", "sdpa"))
    sample = make_sample("clip", ("image", 5), seed=0)
    with torch.no_grad():
        model.model.vision_tower.embeddings.position_embedding.weight[1:] = 0
    grey = torch.full_like(sample.pixel_values[0], 0.3)
    plain = encode(model, grey).features
    for weighs in (True, False):
        merged, _ = encode_merging(model, grey, ToMe(0.5, proportional_attention=weighs))
        assert torch.allclose(merged, plain[: len(merged)], atol=1e-4) == weighs
        with vtc.patch(model, ToMe(0.5, proportional_attention=weighs)):
            found = model.model.get_image_features(grey[None]).pooler_output[0]
        kept = found.abs().sum(1) > 0
        assert torch.allclose(found[kept], plain[kept], atol=1e-4) == weighs


# ---- FlowCut ------------------------------------------------------------------------------------
@pytest.mark.parametrize("keep", [192, 64, 0.1])
def test_flowcut_leaves_its_budget_in_the_last_layer(keep: float | int) -> None:
    counts = [n for n, _ in run(FlowCut(keep), 576)]
    wanted = keep if isinstance(keep, int) else 58
    assert counts[22] == counts[-1] == wanted
    assert counts == sorted(counts, reverse=True)
    dropped_at = {i for i in range(23) if counts[i + 1] < counts[i]}
    assert dropped_at <= {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21}
    assert counts[:2] == [576, 576]


def test_flowcut_drops_by_how_concentrated_attention_is() -> None:
    method = FlowCut(64)
    even = torch.ones(576)
    assert [method.leaving(even, 64, rem) for rem in (20, 10, 2)] == [0, 0, 0]
    assert method.leaving(even, 64, 0) == 512
    spike = torch.zeros(576)
    spike[7] = 1.0
    assert method.leaving(spike, 64, 20) == round(512 / 20**0.5)
    assert method.leaving(spike, 64, 19) == 0


def test_flowcut_scores_by_relation_semantic_and_density_and_remembers() -> None:
    state = state_of(30, layer=21, seed=3)
    merging = FlowCut(10).merge(state)
    assert merging is not None
    assert merging.memory is not None
    assert state.cls_value is not None
    relation = state.attention / state.attention.sum()
    heads = []
    for head in range(4):
        values = torch.cat([state.cls_value[None, head], state.values[:, head]])
        heads.append((values @ state.cls_value[head]).softmax(0))
    semantic = torch.stack(heads).mean(0)[1:]
    score = (relation + semantic / semantic.sum()) * state.values.mean(1).abs().sum(1)
    expected = score.topk(10).indices.sort().values
    stays = (merging.target >= 0).nonzero().flatten()
    assert stays.tolist() == expected.tolist()
    assert merging.target[stays].tolist() == list(range(10))
    assert torch.allclose(merging.memory, score[stays])
    old = torch.linspace(0, 3 * float(score.max()), 30)
    again = FlowCut(10).merge(dataclasses.replace(state, memory=old))
    assert again is not None
    assert again.memory is not None
    mixed = 0.5 * old + 0.5 * score
    assert torch.allclose(again.memory.sort().values, mixed.topk(10).values.sort().values)


def test_flowcut_without_cls_uses_what_patches_receive() -> None:
    state = state_of(30, layer=21, cls=False)
    merging = FlowCut(5).merge(state)
    assert merging is not None
    score = state.attention * state.values.mean(1).abs().sum(1)
    best = score.topk(5).indices.sort().values.tolist()
    assert (merging.target >= 0).nonzero().flatten().tolist() == best


@quick
@given(st.integers(8, 40), st.integers(0, 9), st.integers(3, 12), st.booleans())
def test_flowcut_replays_naively(n: int, seed: int, layers: int, cls: bool) -> None:
    """All layers, by the published formulas, patch by patch."""
    wanted = n // 3
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(layers, n, 2, 4, generator=generator)
    values = torch.randn(layers, n, 2, 4, generator=generator)
    attention = torch.rand(layers, n, generator=generator) ** 3
    alive, memory, alone, past = list(range(n)), None, list(range(n)), dict[int, float]()
    for layer in range(layers):
        value, paid = values[layer, alive], attention[layer, alive]
        state = EncoderState(
            layer=layer, num_layers=layers, original=n, has_cls=cls, attention=paid,
            keys=keys[layer, alive], values=value,
            cls_value=values[layer].mean(0) if cls else None,
            size=torch.ones(len(alive)), memory=memory,
        )  # fmt: skip
        merging = FlowCut(wanted).merge(state)
        if merging is not None:
            alive = [alive[i] for i in (merging.target >= 0).nonzero().flatten().tolist()]
            memory = merging.memory
        alone, past = _flowcut_layer(
            attention[layer], values[layer], layer, layers, cls, wanted, alone, past
        )
        assert alive == alone
    assert len(alive) == wanted


def _flowcut_layer(
    paid: Tensor,
    values: Tensor,
    layer: int,
    layers: int,
    cls: bool,
    wanted: int,
    alone: list[int],
    past: dict[int, float],
) -> tuple[list[int], dict[int, float]]:
    """The patches that are left of `alone`, and their scores so far."""
    if len(alone) <= wanted or layer > layers - 2:
        return alone, past
    total = sum(float(paid[i]) for i in alone)
    share = {i: float(paid[i]) / total for i in alone}
    score = dict(share)
    if cls:
        query = values.mean(0)
        semantic = dict.fromkeys(alone, 0.0)
        for head in range(2):
            powers = {i: math.exp(float(values[i, head] @ query[head])) for i in alone}
            norm = sum(powers.values()) + math.exp(float(query[head] @ query[head]))
            for i in alone:
                semantic[i] += powers[i] / norm / 2
        norm = sum(semantic.values())
        score = {i: share[i] + semantic[i] / norm for i in alone}
    score = {i: score[i] * float(values[i].mean(0).abs().sum()) for i in alone}
    score = {i: (past[i] + score[i]) / 2 if i in past else score[i] for i in alone}
    rem = layers - 2 - layer
    leaving = len(alone) - wanted
    if rem:
        entropy = -sum(p * math.log(p) for p in share.values() if p) / math.log(len(alone))
        rate = max(1 - entropy**2, 0) / math.sqrt(rem)
        leaving = 0 if rem % 2 else round((len(alone) - wanted) * rate)
    best = sorted(alone, key=lambda i: -score[i])[: max(len(alone) - leaving, wanted)]
    return sorted(best), {i: score[i] for i in best}


# ---- in a model ---------------------------------------------------------------------------------
def test_the_report_counts_patches_layer_by_layer() -> None:
    model = shared_model("clip+llama", "sdpa")
    sample = make_sample("clip", ("image", 5), seed=0)
    batch = {"input_ids": sample.input_ids[None], "pixel_values": sample.pixel_values}
    flops = {}
    for method in (vtc.make("full"), ToMe(0.5)):
        with vtc.patch(model, method) as patch, torch.no_grad():
            model(**batch)
        flops[method.name] = patch.report.flops
        (image,) = patch.report.images
    assert image.passed == (36, 27, 18)
    assert image.encoded == 18
    assert image.per_layer == (18,) * 8
    for part in ("vision", "projector", "lm"):
        assert flops["tome"][part] < flops["full"][part]


def test_what_cannot_be_combined_is_refused() -> None:
    model = shared_model("clip+llama", "sdpa")
    for method in (
        ToMe() | FlowCut(),
        vtc.make("fastv") | ToMe(),
        ToMe() | vtc.make("todre"),
        vtc.make("downsample", how="pixels") | ToMe(),
    ):
        with pytest.raises(ValueError, match="tower"):
            vtc.patch(model, method)


@pytest.mark.parametrize("wrong", ["float", "gap", "none", "memory"])
def test_a_wrong_merging_is_refused(wrong: str) -> None:
    class Wrong(ToMe):
        def merge(self, state: EncoderState) -> Merging | None:
            n = len(state)
            target = torch.arange(n)
            if wrong == "float":
                return Merging(target.float())
            if wrong == "gap":
                return Merging(target * 2)
            if wrong == "none":
                return Merging(torch.full((n,), -1))
            return Merging(target, torch.zeros(n - 1))

    model = shared_model("clip+llama", "sdpa")
    sample = make_sample("clip", ("image", 5), seed=0)
    with vtc.patch(model, Wrong()), pytest.raises(ValueError, match=r"tome: (target|memory) must"):
        model.model.get_image_features(sample.pixel_values)


@pytest.mark.parametrize("name", sorted({*vtc.methods()} - {"atp", "full", "transprune"}))
def test_keep_of_one_is_the_plain_model_bit_for_bit(name: str) -> None:
    model = shared_model("clip+llama", "sdpa")
    batch = collate(samples("images", "clip"))
    with torch.no_grad():
        plain = model(**batch).logits
        with vtc.patch(model, name, keep=1.0):
            assert torch.equal(model(**batch).logits, plain)
