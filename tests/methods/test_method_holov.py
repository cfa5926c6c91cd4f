# SPDX-License-Identifier: Apache-2.0
"""HoloV as a pure function, against loops over tokens."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtc.core import VisionTokens, make
from vtc.methods.holov import HoloV, quotas

quick = settings(max_examples=60, deadline=None, derandomize=True)
VARIANTS = ("code", "paper")


def vision_tokens(
    rows: int, cols: int, frames: int = 1, seed: int = 0, **more: Any
) -> VisionTokens:
    generator = torch.Generator().manual_seed(seed)
    n = frames * rows * cols
    # A common direction, as embeddings have: cosines are not all near zero.
    features = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    features = features + torch.randn(6, generator=generator, dtype=torch.float64)
    fields: dict[str, Any] = {
        "features": features,
        "grid": torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(cols)),
        "cls_attention": (2 * torch.randn(n, generator=generator)).softmax(0),
    }
    return VisionTokens(**{**fields, **more})


def kept(method: HoloV, tokens: VisionTokens) -> list[int]:
    selection = method.select(tokens)
    assert selection.features is None
    assert selection.indices.dtype == torch.long
    return selection.indices.tolist()


def runs(n: int, count: int) -> list[list[int]]:
    found, start = [], 0
    for c in range(count):
        size = n // count + (1 if c < n % count else 0)
        found.append(list(range(start, start + size)))
        start += size
    return found


def cosines(tokens: VisionTokens, members: list[int]) -> list[list[float]]:
    rows = tokens.features[members].double()
    return torch.cosine_similarity(rows[:, None], rows[None], dim=2).tolist()


def released(tokens: VisionTokens, total: int, count: int, alpha: float) -> list[int] | None:
    """The released code as the specification tells it; `None` where it would append zeros."""
    a = tokens.cls_attention.double().tolist()
    parts = runs(len(tokens), count)
    scores = []
    for members in parts:
        m, s = len(members), cosines(tokens, members)
        v = []
        for i in range(m):
            row = [0.0 if j == i else s[i][j] for j in range(m)]
            mu = sum(row) / (m - 1)
            v.append(sum((x - mu) ** 2 for x in row) / (m - 1))
        mean = sum(1e3 * a[i] for i in members) / m
        rescaled = [x * mean / (sum(v) / m + 1e-6) for x in v]
        scores.append(
            sum(1e3 * a[i] + alpha * x for i, x in zip(members, rescaled, strict=True)) / m
        )
    w = [s / sum(scores) for s in scores]
    q = [math.floor(x * total) for x in w]
    for c in sorted(range(count), key=lambda c: (-w[c], c))[: total - sum(q)]:
        q[c] += 1
    if any(x > len(members) for x, members in zip(q, parts, strict=True)):
        return None
    found = []
    for share, members in zip(q, parts, strict=True):
        found += sorted(members, key=lambda i: (-a[i], i))[:share]
    return sorted(found)


def by_paper(
    tokens: VisionTokens, total: int, parts: list[list[int]], alpha: float, tau: float
) -> list[int]:
    """H, weights and ranks by loops; the shares of `quotas` are tested on their own."""
    n, a = len(tokens), tokens.cls_attention.double().tolist()
    v = [0.0] * n
    for members in parts:
        s = cosines(tokens, members)
        for i, token in enumerate(members):
            row = [x for j, x in enumerate(s[i]) if j != i]
            if row:
                mu = sum(row) / len(row)
                v[token] = sum((x - mu) ** 2 for x in row) / len(row)
    gamma = (sum(a) / n) / (sum(v) / n + 1e-6)
    h = [x + alpha * gamma * y for x, y in zip(a, v, strict=True)]
    weights = [(sum(h[i] for i in members) / len(members)) ** tau for members in parts]
    sizes = torch.tensor([len(members) for members in parts])
    shares = quotas(torch.tensor(weights, dtype=torch.float64), sizes, total).tolist()
    found = []
    for share, members in zip(shares, parts, strict=True):
        found += sorted(members, key=lambda i: (-h[i], i))[:share]
    return sorted(found)


def blocks(rows: int, cols: int, r: int, c: int, offset: int = 0) -> list[list[int]]:
    """The crops of an r x c grid that divides rows and cols, in raster order."""
    return [
        [
            offset + y * cols + x
            for y in range(i * rows // r, (i + 1) * rows // r)
            for x in range(j * cols // c, (j + 1) * cols // c)
        ]
        for i in range(r)
        for j in range(c)
    ]


# ---- settings -----------------------------------------------------------------------------------
def test_settings_are_documented_kept_and_checked():
    method = HoloV(9, variant="paper", chunks=4, alpha=0.5, tau=2.0, positions="original")
    assert make(json.loads(json.dumps(method.to_dict()))) == method
    assert make("holov") == HoloV()
    assert HoloV().variant == "code"
    assert HoloV().positions == "contiguous"
    assert HoloV().stages == ("sequence",)
    assert HoloV.needs == {"cls_attention"}
    assert HoloV.vision_layer == -2
    for field in dataclasses.fields(HoloV):
        assert f"{field.name}:" in HoloV.__doc__
    for setting, wrong, error in (
        ("keep", 0.0, ValueError),
        ("keep", 0, ValueError),
        ("keep", None, TypeError),
        ("variant", "released", ValueError),
        ("chunks", 0, ValueError),
        ("chunks", 4.0, TypeError),
        ("chunks", True, TypeError),
        ("alpha", -0.1, ValueError),
        ("alpha", math.inf, ValueError),
        ("alpha", "1", TypeError),
        ("tau", math.nan, ValueError),
        ("tau", -1, ValueError),
        ("tau", True, TypeError),
        ("positions", "reindex", ValueError),
    ):
        with pytest.raises(error, match=f"^{setting}: "):
            HoloV(**{setting: wrong})


@pytest.mark.parametrize(
    ("n", "total", "count"),
    [
        (576, 64, 16),
        (576, 128, 8),
        (576, 192, 5),
        (2880, 640, 8),
        (2880, 320, 16),
        (2880, 160, 32),
        (576, 575, 1),
        (4, 1, 4),
        (2, 1, 2),
    ],
)
def test_the_rule_gives_the_published_numbers_of_chunks(n, total, count):
    assert HoloV().chunk_count(n, total) == count
    assert HoloV(chunks=3).chunk_count(n, total) == min(3, n)


def test_what_it_cannot_work_with_is_named():
    with pytest.raises(ValueError, match="cls_attention"):
        HoloV(keep=2).select(vision_tokens(2, 3, cls_attention=None))
    with pytest.raises(ValueError, match="NaN"):
        HoloV(keep=2).select(vision_tokens(2, 3, cls_attention=torch.full((6,), math.nan)))


# ---- quotas -------------------------------------------------------------------------------------
@quick
@given(st.data())
def test_quotas_sum_to_the_total_and_stay_within_capacity(data):
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    weight = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1e-300, 1.0, 1e6]))
    weights = [data.draw(weight) for _ in sizes]
    total = data.draw(st.integers(0, sum(sizes)))
    w = torch.tensor(weights, dtype=torch.float64)
    found = quotas(w, torch.tensor(sizes), total).tolist()
    assert sum(found) == total
    assert all(0 <= q <= size for q, size in zip(found, sizes, strict=True))
    # Among equal sizes the larger weight never gets less.
    for i, size in enumerate(sizes):
        for j, other in enumerate(sizes):
            if size == other and weights[i] > weights[j]:
                assert found[i] >= found[j]


@pytest.mark.parametrize(
    ("weights", "sizes", "total", "expected"),
    [
        ([4, 3, 2, 1], [9, 9, 9, 9], 10, [4, 3, 2, 1]),
        ([4, 3, 2, 1], [9, 9, 9, 9], 9, [4, 3, 2, 0]),  # 3.6, 2.7, 1.8, 0.9: three to the highest
        ([1, 1, 1], [5, 5, 5], 4, [2, 1, 1]),
        ([1, 1, 1], [5, 5, 5], 0, [0, 0, 0]),
        ([1, 1, 1], [5, 5, 5], 15, [5, 5, 5]),
        # 4 of 9 go on by w (M - q), 2 x 7 to 1 x 8: 2.5 and 1.5, and what is left to the higher
        ([9, 2, 1], [5, 9, 9], 12, [5, 5, 2]),
        ([1, 0, 0], [2, 4, 4], 6, [2, 2, 2]),  # no weight is left: by room
        ([1, 0, 0], [2, 2, 6], 6, [2, 1, 3]),
        ([0, 0], [3, 3], 3, [2, 1]),
        ([1, 1e-300], [1, 3], 3, [1, 2]),
    ],
)
def test_quotas_by_hand(weights, sizes, total, expected):
    w = torch.tensor(weights, dtype=torch.float64)
    assert quotas(w, torch.tensor(sizes), total).tolist() == expected


def test_quotas_refuse_what_has_no_answer():
    sizes = torch.tensor([2, 3])
    for total in (-1, 6):
        with pytest.raises(ValueError, match="total: expected 0 to the 5 tokens"):
            quotas(torch.ones(2), sizes, total)
    for wrong in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"^weights: "):
            quotas(torch.tensor([1.0, wrong]), sizes, 3)


# ---- both variants ------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", VARIANTS)
@quick
@given(
    rows=st.integers(1, 7),
    cols=st.integers(1, 7),
    frames=st.integers(1, 3),
    keep=st.one_of(st.integers(1, 80), st.floats(0.001, 1.0)),
    chunks=st.one_of(st.none(), st.integers(1, 200)),
    seed=st.integers(0, 99),
)
def test_exactly_the_budget_is_kept_in_order(variant, rows, cols, frames, keep, chunks, seed):
    tokens = vision_tokens(rows, cols, frames, seed)
    n = len(tokens)
    wanted = min(keep, n) if isinstance(keep, int) else max(1, round(keep * n))
    method = HoloV(keep, variant=variant, chunks=chunks)
    found = kept(method, tokens)
    assert found == sorted(set(found))
    assert 0 <= found[0] <= found[-1] < n
    assert len(found) == wanted
    assert kept(method, tokens) == found


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("keep", [1.0, 12, 500])
def test_keeping_all_changes_nothing(variant, keep):
    method = HoloV(keep, variant=variant)
    assert kept(method, vision_tokens(3, 4, cls_attention=None)) == list(range(12))


@pytest.mark.parametrize("variant", VARIANTS)
def test_degenerate_sizes(variant):
    assert kept(HoloV(1, variant=variant), vision_tokens(1, 1)) == [0]
    for tokens in (vision_tokens(1, 2), vision_tokens(2, 1, 3), vision_tokens(1, 1, 5)):
        best = int(tokens.cls_attention.argmax())
        assert kept(HoloV(1, variant=variant, alpha=0.0, chunks=500), tokens) == [best]
    # One token to a part, and one part for all: both are the best tokens anywhere.
    tokens = vision_tokens(4, 6)
    top = sorted(tokens.cls_attention.topk(1).indices.tolist())
    assert kept(HoloV(1, variant=variant, alpha=0.0, chunks=24), tokens) == top
    top = sorted(tokens.cls_attention.topk(5).indices.tolist())
    assert kept(HoloV(5, variant=variant, alpha=0.0, chunks=1), tokens) == top


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("level", [0.0, 0.1])
def test_ties_go_to_the_lowest_index(variant, level):
    # 36 equal tokens in four parts of nine: 3, 3, 2 and 2 of each, its first ones.
    tokens = vision_tokens(6, 6, features=torch.ones(36, 6), cls_attention=torch.full((36,), level))
    parts = runs(36, 4) if variant == "code" else blocks(6, 6, 2, 2)
    expected = sorted(i for part, q in zip(parts, (3, 3, 2, 2), strict=True) for i in part[:q])
    assert kept(HoloV(10, variant=variant, chunks=4), tokens) == expected


@pytest.mark.parametrize("variant", VARIANTS)
@given(total=st.integers(1, 58), count=st.integers(1, 59))
@quick
def test_even_attention_gives_even_quotas(variant, total, count):
    # 59 is prime, so that sizes differ by one.
    tokens = vision_tokens(1, 59, features=torch.ones(59, 6), cls_attention=torch.full((59,), 0.07))
    found = set(kept(HoloV(total, variant=variant, chunks=count), tokens))
    parts = runs(59, count)
    if variant == "paper":
        parts = [[i for i in range(59) if (i + 0.5) * count // 59 == p] for p in range(count)]
    shares = [len(found.intersection(part)) for part in parts]
    assert sum(shares) == total
    assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_scored_in_single(variant, dtype):
    tokens = vision_tokens(7, 9, seed=3)
    low, held = tokens.features.to(dtype), tokens.cls_attention.to(dtype)
    halves = vision_tokens(7, 9, features=low, cls_attention=held)
    wide = vision_tokens(7, 9, features=low.float(), cls_attention=held.float())
    method = HoloV(13, variant=variant, chunks=6)
    assert kept(method, halves) == kept(method, wide)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_spike_overflows_into_other_parts(variant):
    tokens = vision_tokens(12, 12, seed=1)
    attention = torch.full((144,), 1e-5)
    parts = runs(144, 4) if variant == "code" else blocks(12, 12, 2, 2)
    attention[parts[2]] = 0.02
    spiked = vision_tokens(12, 12, seed=1, cls_attention=attention)
    total = 60
    if variant == "code":
        assert released(spiked, total, 4, 0.09) is None  # it would append zeros
    found = set(kept(HoloV(total, variant=variant, chunks=4, alpha=0.0), spiked))
    assert len(found) == total
    shares = [len(found.intersection(part)) for part in parts]
    assert shares == [8, 8, 36, 8]
    assert len(kept(HoloV(total, variant=variant, chunks=4), tokens)) == total


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_scale_of_attention_does_not_matter(variant):
    tokens = vision_tokens(8, 8, seed=5)
    method = HoloV(20, variant=variant, chunks=4)
    for scale in (2.0**-20, 2.0**10):
        scaled = vision_tokens(8, 8, seed=5, cls_attention=tokens.cls_attention * scale)
        assert kept(method, scaled) == kept(method, tokens)


@pytest.mark.parametrize("variant", VARIANTS)
def test_tau_sharpens_and_flattens(variant):
    tokens = vision_tokens(12, 12, seed=2)
    attention = tokens.cls_attention.clone()
    parts = runs(144, 4) if variant == "code" else blocks(12, 12, 2, 2)
    for part, level in zip(parts, (1, 2, 3, 4), strict=True):
        attention[part] = level / attention[part].mean() * attention[part]
    leaning = vision_tokens(12, 12, seed=2, cls_attention=attention)

    def shares(tau: float) -> list[int]:
        method = HoloV(40, variant=variant, chunks=4, alpha=0.0, tau=tau)
        found = set(kept(method, leaning))
        return [len(found.intersection(part)) for part in parts]

    assert shares(0) == [10, 10, 10, 10]
    # Rounding may put an exact share just under a whole number; the highest then gets the token.
    for tau in (1, 2):
        exact = [40 * level**tau / sum(k**tau for k in (1, 2, 3, 4)) for level in (1, 2, 3, 4)]
        assert all(abs(q - x) <= 1 for q, x in zip(shares(tau), exact, strict=True))
    assert shares(2)[3] > shares(1)[3] > shares(0)[3]


# ---- the code's form ----------------------------------------------------------------------------
@quick
@given(
    n=st.integers(8, 90), data=st.data(), seed=st.integers(0, 999), alpha=st.sampled_from([0, 0.09])
)
def test_code_is_the_released_selection_where_that_loses_nothing(n, data, seed, alpha):
    total = data.draw(st.integers(1, n - 1))
    count = data.draw(st.integers(1, n // 3))
    tokens = vision_tokens(1, n, seed=seed)
    expected = released(tokens, total, count, alpha)
    found = kept(HoloV(total, chunks=count), tokens)
    if expected is None:
        assert len(found) == total
    else:
        assert found == expected


def test_code_ignores_alpha_and_features():
    tokens = vision_tokens(12, 12)
    base = kept(HoloV(30), tokens)
    for alpha in (0.0, 0.09, 50.0):
        assert kept(HoloV(30, alpha=alpha), tokens) == base
    assert released(tokens, 30, 8, 0.0) == released(tokens, 30, 8, 1.0) == base
    other = vision_tokens(12, 12, features=tokens.features.flip(0))
    assert kept(HoloV(30), other) == base
    # Nor where the tokens stand: the sequence alone counts, over tiles and frames.
    tiled = vision_tokens(12, 12, crop=torch.arange(144) // 36)
    assert kept(HoloV(30), tiled) == base
    assert kept(HoloV(30), vision_tokens(12, 12, grid=tokens.grid.flip(0))) == base


def test_code_weighs_a_part_of_one_token_like_any_other():
    # Runs of 2, 2 and 1; the last holds a token worth as much as the others' mean.
    attention = torch.tensor([0.375, 0.125, 0.3125, 0.1875, 0.25])
    tokens = vision_tokens(1, 5, cls_attention=attention)
    assert kept(HoloV(3, chunks=3), tokens) == [0, 2, 4]


# ---- the paper's form ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rows", "cols", "chunks", "r", "c"),
    [(6, 6, 4, 2, 2), (8, 8, 16, 4, 4), (8, 12, 6, 2, 3), (6, 6, 5, 2, 2), (12, 4, 3, 3, 1)],
)
@pytest.mark.parametrize(("alpha", "tau"), [(1.0, 1.0), (0.3, 2.0)])
@pytest.mark.parametrize("share", [0.15, 0.6])
def test_paper_follows_its_definition(rows, cols, chunks, r, c, alpha, tau, share):
    for seed in range(5):
        tokens = vision_tokens(rows, cols, seed=seed)
        total = round(share * rows * cols)
        expected = by_paper(tokens, total, blocks(rows, cols, r, c), alpha, tau)
        method = HoloV(total, variant="paper", chunks=chunks, alpha=alpha, tau=tau)
        assert kept(method, tokens) == expected


def test_paper_takes_alpha_and_features_into_account():
    tokens = vision_tokens(12, 12)

    def found(alpha: float, tokens: VisionTokens = tokens) -> list[int]:
        return kept(HoloV(30, variant="paper", alpha=alpha), tokens)

    assert len({tuple(found(alpha)) for alpha in (0.0, 0.09, 1.0, 50.0)}) == 4
    other = vision_tokens(12, 12, features=tokens.features.flip(0))
    assert found(0.0, other) == found(0.0)
    assert found(1.0, other) != found(1.0)
    # Its quotas move too, which per-part rescaling would prevent.
    parts = blocks(12, 12, 2, 4)
    shares = [
        [len(set(found(alpha)).intersection(part)) for part in parts] for alpha in (0.0, 50.0)
    ]
    assert shares[0] != shares[1]


def test_paper_crops_do_not_span_frames_or_tiles():
    clip = vision_tokens(4, 4, frames=3, seed=7)
    parts = [part for f in range(3) for part in blocks(4, 4, 2, 2, 16 * f)]
    method = HoloV(15, variant="paper", chunks=12)
    expected = by_paper(clip, 15, parts, 1.0, 1.0)
    assert kept(method, clip) == expected
    tiles = vision_tokens(
        4, 12, seed=7, grid=clip.grid * torch.tensor([0, 1, 1]), crop=torch.arange(48) // 16
    )
    assert kept(method, tiles) == expected
    # Fewer crops than frames: one for each.
    whole = [list(range(16 * f, 16 * f + 16)) for f in range(3)]
    few = kept(HoloV(15, variant="paper", chunks=2), clip)
    assert few == by_paper(clip, 15, whole, 1.0, 1.0)


def test_paper_crops_follow_the_places_and_may_have_holes():
    tokens = vision_tokens(8, 8, seed=4)
    method = HoloV(12, variant="paper", chunks=4)
    shifted = vision_tokens(8, 8, seed=4, grid=tokens.grid + torch.tensor([2, 5, 9]))
    assert kept(method, shifted) == kept(method, tokens)
    # An image without its second quarter: three crops, numbered without a gap.
    parts = blocks(8, 8, 2, 2)
    left = sorted(i for part in (parts[0], parts[2], parts[3]) for i in part)
    holed = VisionTokens(
        features=tokens.features[left],
        grid=tokens.grid[left],
        cls_attention=tokens.cls_attention[left],
    )
    new = {old: i for i, old in enumerate(left)}
    expected = by_paper(holed, 12, [[new[i] for i in parts[p]] for p in (0, 2, 3)], 1.0, 1.0)
    assert kept(method, holed) == expected


def test_paper_with_alike_features_goes_by_attention():
    # V is rounding noise then, and must not be blown up to the size of A.
    for value in (1.0, 0.0, 1 / 3):
        tokens = vision_tokens(8, 8, features=torch.full((64, 6), value))
        by_both, by_attention = (
            HoloV(20, variant="paper", chunks=4, alpha=alpha) for alpha in (1.0, 0.0)
        )
        assert kept(by_both, tokens) == kept(by_attention, tokens)
