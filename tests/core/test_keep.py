# SPDX-License-Identifier: Apache-2.0
"""What `keep` says does not depend on the company: the one rule, at every stage."""

from __future__ import annotations

import warnings
from itertools import permutations

import pytest
import torch

import vtc
from tests.methods.test_method_split import tiled
from tests.reference.models import LAYERS, collate, samples, shared_model
from vtc.core import VisionTokens

N = 36
"""Vision tokens of an image of the CLIP models."""


def counts(method: vtc.Method, name: str = "clip+llama") -> list[float]:
    """Vision tokens that each layer processes."""
    tower = name.partition("+")[0]
    with vtc.patch(shared_model(name, "sdpa"), method) as patch, torch.no_grad():
        patch.model(**collate(samples("one", tower)))
    return patch.report.tokens_per_layer


@pytest.fixture(autouse=True)
def _idle_parts_are_not_at_issue():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* dropped nothing")
        yield


@pytest.mark.parametrize(
    ("method", "entering", "last"),
    [
        (vtc.Random(0.5) | vtc.DivPrune(0.25), 9, 9),
        (vtc.DivPrune(0.5) | vtc.FastV(0.25), 18, 9),
        (vtc.FastV(0.25) | vtc.DivPrune(0.5), 18, 9),
        (vtc.Random(0.5) | vtc.DivPrune(9), 9, 9),
        (vtc.Random(0.5) | vtc.Pool(0.25), 9, 9),
        (vtc.Random(0.75) | vtc.Random(0.5, seed=1) | vtc.DART(0.25), 18, 9),
        (vtc.ToMe(0.5) | vtc.DivPrune(0.25), 9, 9),
        (vtc.Downsample(0.5, how="pixels") | vtc.DivPrune(0.25), 9, 9),
        (vtc.Random(0.5) | vtc.V2Drop(0.28, then=()), 18, 10),
        (vtc.Random(0.5) | vtc.VScan(0.25, then=1.0), 9, 9),
        (vtc.Random(0.5) | vtc.VScan(0.25, then=1 / 3), 9, 3),
        # A half leaves before the decoder of what is to go of the image: (36 + 9) / 2.
        (vtc.Random(0.75) | vtc.CATP(0.25), 22, 9),
        (vtc.Random(0.75) | vtc.ToDRE(0.25, second_stage=False), 9, 9),
        (vtc.Random(0.75) | vtc.VisionZip(0.25), 9, 9),
        (vtc.Random(0.75) | vtc.PruMerge(0.25), 9, 9),
        (vtc.Random(0.75) | vtc.Correlation(0.25), 9, 9),
        (vtc.Random(0.75) | vtc.HoloV(0.25), 9, 9),
    ],
    ids=str,
)
def test_a_fraction_is_one_of_the_image_at_every_stage(method, entering, last) -> None:
    seen = counts(method)
    assert (seen[0], seen[-1]) == (entering, last)


SEQUENCE = ["cdpruner", "divprune", "downsample", "mmtok", "pool", "random", "scope", "vispruner"]


@pytest.mark.parametrize("name", [*SEQUENCE, "holov", "correlation", "visionzip"])
def test_a_share_of_the_sequence_stage_means_the_same_first_and_second(name: str) -> None:
    alone = counts(vtc.make(name, keep=0.25))
    assert counts(vtc.Random(0.75) | vtc.make(name, keep=0.25)) == alone


@pytest.mark.parametrize("keeps", list(permutations((0.75, 0.5, 0.25))))
def test_the_order_of_budgets_does_not_change_what_is_left(keeps) -> None:
    first, second, third = keeps
    method = vtc.DivPrune(first) | vtc.Random(second) | vtc.DART(third)
    seen = counts(method)
    assert seen[0] == N * min(first, second)
    assert seen[-1] == N * 0.25


# ---- tiles, frames and crops --------------------------------------------------------------------
def left_over(tokens: VisionTokens, stay: torch.Tensor) -> VisionTokens:
    """What a method is shown once others have left the tokens `stay` (k,) only."""
    return VisionTokens(
        features=tokens.features[stay],
        grid=tokens.grid[stay],
        crop=None if tokens.crop is None else tokens.crop[stay],
        every_grid=tokens.grid,
        every_crop=tokens.crop,
        cls_attention=None if tokens.cls_attention is None else tokens.cls_attention[stay],
        low_attention=None if tokens.low_attention is None else tokens.low_attention[stay],
        keys=None if tokens.keys is None else tokens.keys[stay],
    )


def test_a_share_of_a_tile_is_one_of_the_tile_as_it_was() -> None:
    tokens = tiled(3, 4, 4)
    sizes = torch.bincount(tokens.crop)
    # Half of each tile, but of the last one a single token.
    rank = torch.cat([torch.arange(int(n)) for n in sizes])
    half = torch.where(tokens.crop == tokens.crop.max(), rank == 0, rank < sizes[tokens.crop] // 2)
    shown = left_over(tokens, half.nonzero().squeeze(1))
    chosen = vtc.PerTile(vtc.DivPrune(0.25)).select(shown).indices
    wanted = [max(1, round(0.25 * int(n))) for n in sizes[:-1]] + [1]
    assert torch.bincount(shown.crop[chosen]).tolist() == wanted


def test_a_share_of_a_frame_is_one_of_the_frame_even_if_it_alone_is_left() -> None:
    place = torch.arange(48)
    grid = torch.stack([place // 16, place % 16 // 4, place % 4], dim=1)
    tokens = VisionTokens(torch.randn(48, 8), grid)
    frame = vtc.PerFrame(vtc.DivPrune(0.25))
    one = left_over(tokens, torch.arange(16, 26))
    assert len(frame.select(one).indices) == 4
    two = left_over(tokens, torch.arange(8, 26))
    found = frame.select(two).indices
    assert torch.bincount(two.grid[found][:, 0]).tolist() == [4, 4]


def test_a_share_of_a_crop_is_one_of_the_crop_as_it_was() -> None:
    crop = torch.tensor([1] * 16 + [2] * 16 + [0] * 16)
    place = torch.arange(16).repeat(3)
    tokens = VisionTokens(
        torch.randn(48, 8),
        torch.stack([place * 0, place // 4, place % 4], dim=1),
        crop=crop,
        keys=torch.randn(48, 8),
        cls_attention=torch.rand(48),
        low_attention=torch.rand(48),
    )
    shown = left_over(tokens, torch.arange(6, 48, 2))  # 5, 8 and 8 of them
    chosen = vtc.Correlation(keep=0.4).select(shown).indices  # 0.4 of 16
    assert torch.bincount(shown.crop[chosen]).tolist() == [6, 5, 6]


def test_every_method_of_one_model_counts_from_the_same_image() -> None:
    """Two images of one sample keep their own shares."""
    method = vtc.Random(0.5) | vtc.DivPrune(0.25)
    with vtc.patch(shared_model("clip+llama", "sdpa"), method) as patch, torch.no_grad():
        patch.model(**collate(samples("images", "clip")))
    assert {image.per_layer for image in patch.report.images} == {(9,) * LAYERS}


# ---- parts that find their budget met -----------------------------------------------------------
def warned(method: vtc.Method, kind: str = "one", times: int = 2) -> list[str]:
    """What is said of idle parts in several forwards of one patch."""
    model = shared_model("clip+llama", "sdpa")
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        with vtc.patch(model, method) as patch:
            for _ in range(times):
                patch.model(**collate(samples(kind, "clip")))
    said = [str(w.message) for w in caught if "dropped nothing" in str(w.message)]
    return [text.partition(" dropped nothing")[0] for text in said]


@pytest.mark.parametrize(
    ("method", "idle"),
    [
        (vtc.DivPrune(10) | vtc.VisionZip(20), ["visionzip"]),
        (vtc.Random(0.25) | vtc.DivPrune(0.5), ["divprune"]),
        (vtc.Random(0.25) | vtc.DivPrune(0.5) | vtc.FastV(0.5), ["divprune", "fastv"]),
        # The sequence stage runs first, wherever it is written.
        (vtc.FastV(0.5) | vtc.DivPrune(0.25), ["fastv"]),
        (vtc.FastV(0.25) | vtc.DivPrune(0.5), []),
        (vtc.FastV(0.25, layer=4) | vtc.DART(0.5, layer=2), []),
        (vtc.FastV(0.25, layer=2) | vtc.DART(0.5, layer=4), ["dart"]),
        (vtc.ToMe(0.25) | vtc.DivPrune(0.5), ["divprune"]),
        (vtc.Downsample(0.25, how="pixels") | vtc.Random(0.5), ["random"]),
        (vtc.Random(0.25) | vtc.PerTile(vtc.DivPrune(0.5)), ["per_tile"]),
        (vtc.Random(2) | vtc.TransPrune("low"), ["transprune"]),
        # A second stage that looked and found no reason is not to blame.
        (vtc.Random(0.5) | vtc.ToDRE(0.25, tau=0.0), []),
        (vtc.Random(0.25) | vtc.ToDRE(0.5, tau=0.0), ["todre"]),
        (vtc.Random(0.5) | vtc.VScan(0.75, then=1 / 3), []),
        # What keeps all does so by itself.
        (vtc.Random(0.5) | vtc.FastV(1.0), []),
        (vtc.Random(0.5) | vtc.Full(), []),
        (vtc.Random(100) | vtc.FastV(100), []),
        (vtc.FastV(0.5), []),
    ],
    ids=str,
)
def test_a_part_whose_budget_is_met_is_named_once(method: vtc.Method, idle: list[str]) -> None:
    assert warned(method) == idle


def test_it_is_judged_in_each_forward(monkeypatch) -> None:
    """The first forward need not be the one in which a budget is met."""
    model, wide = shared_model("clip+llama", "sdpa"), vtc.Random.select
    monkeypatch.setattr(vtc.Random, "select", lambda self, tokens: wide(vtc.Random(1.0), tokens))
    with vtc.patch(model, vtc.Random(0.25) | vtc.DivPrune(0.5)) as patch, torch.no_grad():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            patch.model(**collate(samples("one", "clip")))
        monkeypatch.undo()
        with pytest.warns(UserWarning, match="divprune dropped nothing"):
            patch.model(**collate(samples("one", "clip")))


def test_describe_says_what_is_left_of_a_composition() -> None:
    for method in (
        vtc.Random(0.5) | vtc.DivPrune(0.25),
        vtc.DivPrune(300) | vtc.FastV(0.25),
        vtc.FastV(0.25, layer=3) | vtc.DivPrune(0.5) | vtc.PyramidDrop(0.5),
        vtc.ToDRE(288) | vtc.TransPrune("high"),
    ):
        seen = vtc.describe(method, "llava-1.5")
        rows = [vtc.describe(part, "llava-1.5").per_layer for part in method.parts]
        assert seen.per_layer == tuple(map(min, zip(*rows, strict=True)))
    assert vtc.describe(vtc.Random(0.5) | vtc.DivPrune(0.25), "llava-1.5").average == 144
    assert vtc.describe(vtc.DivPrune(0.5) | vtc.FastV(0.25), "llava-1.5").kept == 144
    for relative in (vtc.V2Drop(), vtc.TransPrune("after_selection"), vtc.Pool()):
        with pytest.raises(ValueError, match=f"those of {relative.name} depend on what the other"):
            vtc.describe(vtc.Random(0.5) | relative, "llava-1.5")


@pytest.mark.parametrize(
    "method",
    [
        vtc.Random(0.5) | vtc.DivPrune(0.25),
        vtc.DivPrune(0.5) | vtc.FastV(0.25),
        vtc.VScan(0.5, then=0.5) | vtc.FastV(0.4),
        vtc.Random(0.75) | vtc.CATP(0.25),
        vtc.Random(0.75) | vtc.TransPrune("low"),
        vtc.Random(20) | vtc.PyramidDrop(0.5),
    ],
    ids=str,
)
def test_arithmetic_and_report_agree(method: vtc.Method) -> None:
    assert tuple(counts(method)) == method.token_schedule(N, LAYERS)
