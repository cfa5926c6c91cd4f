# SPDX-License-Identifier: Apache-2.0
"""A budget for every tile and for every frame."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vtc
from tests.reference.families import FAMILIES
from tests.reference.families_more import LlavaNext
from tests.reference.masked import Masked
from vtc.core import LayerState, Method, VisionTokens

quick = settings(max_examples=40, deadline=None, derandomize=True)
INNER = ("random", "todre", "divprune", "visionzip", "vispruner", "scope", "mmtok", "cdpruner",
         "holov", "prumerge_plus", "correlation", "pool", "vscan")  # fmt: skip


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clip(parts: int, rows: int, columns: int, seed: int = 0, **more: Any) -> VisionTokens:
    """`parts` frames with all signals."""
    n = parts * rows * columns
    generator = torch.Generator().manual_seed(seed)
    grid = torch.cartesian_prod(torch.arange(parts), torch.arange(rows), torch.arange(columns))
    fields: dict[str, Any] = {
        "features": randn(n, 6, seed=seed),
        "grid": grid,
        "cls_attention": torch.rand(n, generator=generator),
        "low_attention": torch.rand(n, generator=generator),
        "keys": randn(n, 8, seed=seed + 1),
        "encoder": randn(n, 5, seed=seed + 2),
        "encoder_cls": randn(5, seed=seed + 3),
        "project": lambda x: x @ randn(5, 6, seed=7),
        "cls_query": randn(8, seed=seed + 4),
        "cls_key": randn(8, seed=seed + 5),
        "heads": 2,
        "text": randn(4, 6, seed=seed + 6),
        "segment": randn(3, 6, seed=seed + 7),
    }
    return VisionTokens(**{**fields, **more})


def tiled(parts: int, rows: int, columns: int, seed: int = 0) -> VisionTokens:
    tokens = clip(parts, rows, columns, seed)
    grid = tokens.grid.clone()
    grid[:, 0] = 0
    return dataclasses.replace(tokens, grid=grid, crop=tokens.grid[:, 0])


def made(name: str, keep: float | int, **more: Any) -> Method:
    switches = {"todre": {"second_stage": False}, "vscan": {"then": 1}}
    return vtc.make(name, keep=keep, **switches.get(name, {}), **more)


@dataclasses.dataclass(frozen=True)
class AllTaps(Method):
    """Asks for everything between layers, each differently from a method's default."""

    positions: Any = "contiguous"

    @property
    def prune_positions(self) -> Any:
        return "original"

    @property
    def by_head(self) -> bool:
        return True

    def select(self, tokens: VisionTokens) -> vtc.Selection:
        return vtc.Selection(torch.arange(len(tokens))[::2])

    def prune(self, state: LayerState) -> vtc.Selection | None:
        return vtc.Selection(torch.arange(len(state.vision))[:3])

    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        return (2, num_layers - 1)

    def taps(self, num_layers: int) -> dict[int, Any]:
        return {1: "last"}

    def peeks(self, num_layers: int) -> dict[int, Any]:
        return {2: "text"}

    def records(self, num_layers: int) -> dict[int, Any]:
        return {0: frozenset({"keys"})}


# Named here and not in the class, where it would register.
AllTaps.name = "all_taps"


def counts(selection: vtc.Selection, part: Tensor) -> list[int]:
    return [int((part[selection.indices] == p).sum()) for p in part.unique()]


@pytest.mark.parametrize("name", [n for n in INNER if n != "pool"])
def test_every_tile_has_its_budget(name: str) -> None:
    tokens = tiled(4, 4, 4)
    assert tokens.crop is not None
    found = vtc.PerTile(made(name, 4)).select(tokens)
    assert counts(found, tokens.crop) == [4, 4, 4, 4]
    assert found.indices.tolist() == sorted(set(found.indices.tolist()))
    found = vtc.PerTile(made(name, 4), thumbnail=9).select(tokens)
    assert counts(found, tokens.crop) == [9, 4, 4, 4]
    found = vtc.PerTile(made(name, 0.25), thumbnail=1.0).select(tokens)
    assert counts(found, tokens.crop) == [16, 4, 4, 4]


def test_the_thumbnail_may_have_another_method() -> None:
    tokens = tiled(3, 4, 4)
    assert tokens.crop is not None
    method = vtc.PerTile(vtc.Random(keep=2), thumbnail=vtc.Pool(keep=4))
    found = method.select(tokens)
    assert counts(found, tokens.crop) == [4, 2, 2]
    assert found.features is not None
    cells = tokens.features[:16].view(2, 2, 2, 2, 6).mean((1, 3)).view(4, 6)
    torch.testing.assert_close(found.features[:4], cells)
    assert torch.equal(found.features[4:], tokens.features[found.indices[4:]])


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("wrap", [vtc.PerTile, vtc.PerFrame])
def test_one_part_is_the_inner_method(name: str, wrap: Any) -> None:
    inner = made(name, 5)
    for tokens in (clip(1, 4, 4), tiled(1, 4, 4)):
        found, expected = wrap(inner).select(tokens), inner.select(tokens)
        assert torch.equal(found.indices, expected.indices)
        assert (found.features is None) == (expected.features is None)
        if found.features is not None and expected.features is not None:
            assert torch.equal(found.features, expected.features)
    # A single tile is the image, whatever a thumbnail would have.
    lone = vtc.PerTile(inner, thumbnail=1).select(tiled(1, 4, 4))
    assert torch.equal(lone.indices, inner.select(tiled(1, 4, 4)).indices)


@quick
@given(
    st.sampled_from(INNER), st.integers(2, 4), st.integers(2, 4), st.integers(2, 4),
    st.integers(0, 9), st.booleans(), st.data(),
)  # fmt: skip
def test_parts_are_chosen_from_as_if_each_were_alone(
    name: str, parts: int, rows: int, columns: int, seed: int, frames: bool, data: st.DataObject
) -> None:
    size = rows * columns
    inner = made(name, data.draw(st.integers(1, size)))
    tokens = (clip if frames else tiled)(parts, rows, columns, seed)
    # Tokens of all parts mixed: who belongs where is not told by the order.
    mix = torch.randperm(parts * size, generator=torch.Generator().manual_seed(seed))
    if not frames:
        row_of = (
            "features", "grid", "cls_attention", "low_attention", "keys", "encoder", "crop"
        )  # fmt: skip
        mixed: dict[str, Any] = {field: getattr(tokens, field)[mix] for field in row_of}
        tokens = dataclasses.replace(tokens, **mixed)
    method = vtc.PerFrame(inner) if frames else vtc.PerTile(inner)
    part = tokens.grid[:, 0] if frames else tokens.crop
    assert part is not None
    found = method.select(tokens)
    assert bool((found.indices.diff() > 0).all())
    for number in range(parts):
        places = (part == number).nonzero().squeeze(1)
        alone = VisionTokens(
            features=tokens.features[places],
            grid=tokens.grid[places],
            image=number << 16,
            text=tokens.text,
            cls_attention=None if tokens.cls_attention is None else tokens.cls_attention[places],
            keys=None if tokens.keys is None else tokens.keys[places],
            crop=None if tokens.crop is None else tokens.crop[places],
            heads=tokens.heads,
            low_attention=None if tokens.low_attention is None else tokens.low_attention[places],
            cls_query=tokens.cls_query,
            cls_key=tokens.cls_key,
            encoder=None if tokens.encoder is None else tokens.encoder[places],
            encoder_cls=tokens.encoder_cls,
            project=tokens.project,
            segment=tokens.segment,
        )
        expected = inner.select(alone)
        mine = torch.isin(found.indices, places)
        assert found.indices[mine].tolist() == places[expected.indices].tolist()
        contents = tokens.features if found.features is None else None
        got = contents[found.indices[mine]] if contents is not None else found.features[mine]  # type: ignore[index]
        wanted = alone.features[expected.indices]
        if expected.features is not None:
            wanted = expected.features.to(wanted)
        torch.testing.assert_close(got, wanted)


def test_parts_do_not_draw_alike() -> None:
    tokens = tiled(3, 5, 5)
    found = vtc.PerTile(vtc.Random(keep=9)).select(tokens).indices
    drawn = [(found[found // 25 == tile] % 25).tolist() for tile in range(3)]
    assert len({tuple(places) for places in drawn}) == 3


@pytest.mark.parametrize("frames", [False, True])
def test_a_part_hears_what_it_had_at_first(frames: bool) -> None:
    """Where others have left every second token of 3 tiles, or of 3 frames of 2 tiles."""
    whole = clip(3, 4, 4) if frames else tiled(3, 4, 4)
    crop = whole.grid[:, 1] // 2 if frames else whole.crop
    assert crop is not None
    row_of = ("features", "grid", "cls_attention", "low_attention", "keys", "encoder")
    tokens = dataclasses.replace(
        whole,
        **{field: getattr(whole, field)[::2] for field in row_of},
        crop=crop[::2],
        every_grid=whole.grid,
        every_crop=crop,
    )
    method = vtc.PerFrame(vtc.Random(keep=4)) if frames else vtc.PerTile(vtc.Random(keep=4))
    with mock.patch.object(
        vtc.Random, "select", autospec=True, side_effect=vtc.Random.select
    ) as select:
        method.select(tokens)
    assert select.call_count == 3
    for number, call in enumerate(select.call_args_list):
        given, own = call.args[1], slice(16 * number, 16 * number + 16)
        assert (len(given), given.original) == (8, 16)
        assert given.every_grid.tolist() == whole.grid[own].tolist()
        assert given.every_crop.tolist() == crop[own].tolist()


def test_they_ask_for_what_their_methods_ask_for() -> None:
    plain = vtc.PerTile(vtc.VScan(then=1, positions="original"))
    assert plain.needs == {"cls_attention", "low_attention"}
    assert (plain.vision_layer, plain.low_layer, plain.positions) == (-2, 0.2084, "original")
    assert plain.stages == ("sequence",)
    assert plain.parts == (plain,)
    mixed = vtc.PerTile(vtc.Pool(positions="contiguous"), thumbnail=vtc.VisionZip(keep=9))
    assert mixed.needs == vtc.VisionZip.needs
    assert mixed.vision_layer == vtc.VisionZip.vision_layer
    assert mixed.positions == "contiguous"
    assert vtc.PerFrame("mmtok").needs == vtc.MMTok.needs  # type: ignore[arg-type]
    composed = vtc.PerFrame(vtc.Random(keep=4)) | vtc.FastV(keep=2)
    assert composed.stages == ("sequence", "layers")


@pytest.mark.parametrize("wrap", [vtc.PerTile, vtc.PerFrame])
@pytest.mark.parametrize("inner", [vtc.VScan(), vtc.CATP(), vtc.ToDRE(), AllTaps()], ids=str)
def test_between_layers_they_are_the_inner_method(wrap: Any, inner: Method) -> None:
    whole = wrap(inner)
    assert whole.stages == ("sequence", "layers")
    for name in ("prune_positions", "by_head", "positions"):
        assert getattr(whole, name) == getattr(inner, name)
    for name in ("prune_layers", "taps", "peeks", "records"):
        assert getattr(whole, name)(12) == getattr(inner, name)(12)
    assert wrap(vtc.VScan(keep=1.0)).stages == ("sequence",)


@pytest.mark.parametrize(
    "method",
    [
        vtc.PerTile(vtc.DivPrune(keep=0.1)),
        vtc.PerTile(vtc.VisionZip(keep=64), thumbnail=0.5),
        vtc.PerTile(vtc.VisionZip(keep=64), thumbnail=32),
        vtc.PerTile(vtc.Random(), thumbnail=vtc.Pool()),
        vtc.PerFrame(vtc.Random(keep=3)),
        vtc.PerFrame(vtc.Random(keep=3)) | vtc.FastV(),
        vtc.PerTile(vtc.VScan(keep=0.1)),
    ],
    ids=str,
)
def test_they_survive_json(method: Method) -> None:
    again = vtc.make(json.loads(json.dumps(method.to_dict())))
    assert again == method
    assert hash(again) == hash(method)
    assert str(again) == str(method)
    assert not {"per_tile", "per_frame"} & set(vtc.methods())


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"inner": vtc.FastV()}, ValueError, r"inner: expected one method .* \(layers\)"),
        (
            {"inner": vtc.VScan(keep=64)},
            ValueError,
            "inner: expected a fraction as keep of vscan, .*, got 64",
        ),
        ({"inner": vtc.FlowCut()}, ValueError, r"inner: .* \(encoder\)"),
        (
            {"inner": vtc.VScan(), "thumbnail": 0.5},
            ValueError,
            "thumbnail: expected None, as vscan acts between layers on all tiles together, got 0.5",
        ),
        (
            {"inner": vtc.Pool(), "thumbnail": vtc.ToDRE()},
            ValueError,
            r"thumbnail: .* sequence stage alone, got todre.* \(sequence, layers\)",
        ),
        ({"inner": vtc.ToMe()}, ValueError, r"inner: .* \(encoder\)"),
        ({"inner": vtc.Random() | vtc.Pool()}, ValueError, "inner: expected one method"),
        ({"inner": "nothing"}, ValueError, "^inner: .* unknown name 'nothing'"),
        ({"inner": 3}, TypeError, "^inner: .* expected a name, a method"),
        ({"inner": vtc.Random(), "thumbnail": 0}, ValueError, "^thumbnail: keep: .* got 0"),
        ({"inner": vtc.Random(), "thumbnail": True}, TypeError, "^thumbnail: keep: .* got True"),
        ({"inner": vtc.Random(), "thumbnail": vtc.FastV()}, ValueError, "^thumbnail: expected one"),
        (
            {"inner": vtc.PerFrame(vtc.Random()), "thumbnail": 3},
            ValueError,
            "thumbnail: per_frame has no keep; expected a method, got 3",
        ),
        (
            {"inner": vtc.Random(), "thumbnail": vtc.Random(positions="contiguous")},
            ValueError,
            "thumbnail: expected positions 'original' as random has it, got 'contiguous'",
        ),
        (
            {
                "inner": vtc.VisionZip(),
                "thumbnail": vtc.ToDRE(second_stage=False),
            },
            ValueError,
            "thumbnail: expected vision_layer -2 as visionzip has it, got -1",
        ),
    ],
)
def test_what_they_refuse(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        vtc.PerTile(**kwargs)


# ---- in a model ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "kind", "method"),
    [
        ("llava_next", "images", vtc.PerTile(vtc.DivPrune(keep=2), thumbnail=4)),
        ("llava_next", "one", vtc.PerTile(vtc.Random(keep=3))),
        ("qwen2_vl", "video", vtc.PerFrame(vtc.DivPrune(keep=2))),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*positions='contiguous' has no meaning")
def test_in_a_model_parts_have_their_budgets_and_logits_are_exact(
    name: str, kind: str, method: Method
) -> None:
    family = FAMILIES[name]
    model, rows = family.build("eager"), family.rows(kind)
    truths = [Masked(family, model, method, row) for row in rows]
    expected = torch.stack([truth.logits()[0][-1] for truth in truths])
    with vtc.patch(family.build("sdpa"), method) as patch, torch.no_grad():
        found = patch.model(**family.collate(rows)).logits[:, -1]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    split = 0
    for row, truth in zip(rows, truths, strict=True):
        alive = set(truth.alive_at_end.nonzero().flatten().tolist())
        for image in row.images:
            part = image.crop if isinstance(method, vtc.PerTile) else [g[0] for g in image.grid]
            assert part is not None
            split += len({*part}) > 1
            for number in {*part}:
                places = [i for i, p in zip(image.index, part, strict=True) if p == number]
                tokens = len(alive.intersection(places))
                first = isinstance(method, vtc.PerTile) and number == 0 and len({*part}) > 1
                budget = 4 if first and method.thumbnail is not None else method.inner.keep  # type: ignore[attr-defined]
                assert tokens == min(budget, len(places))
    assert split


@pytest.mark.parametrize(
    ("name", "kind", "method"),
    [
        ("llava_next", "images", vtc.PerTile(vtc.CATP(keep=0.4))),
        ("qwen2_vl", "video", vtc.PerFrame(vtc.CATP(keep=0.4, positions="original"))),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*positions='contiguous' has no meaning")
def test_a_cut_between_layers_is_one_for_all_parts(name: str, kind: str, method: Method) -> None:
    family = FAMILIES[name]
    model, rows = family.build("eager"), family.rows(kind)
    truths = [Masked(family, model, method, row) for row in rows]
    expected = torch.stack([truth.logits()[0][-1] for truth in truths])
    with vtc.patch(family.build("sdpa"), method) as patch, torch.no_grad():
        found = patch.model(**family.collate(rows)).logits[:, -1]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    # There was something to cut.
    layers = patch.report.tokens_per_layer
    assert layers[-1] < layers[0] < patch.report.tokens_in


# ---- presets on a grid of LLaVA-NeXT ------------------------------------------------------------
class RealGrid(LlavaNext):
    """Tiles of 24 x 24 tokens and the shapes of LLaVA-NeXT, at a seventh of its pixels."""

    tile, patch = 24, 2
    sizes = ((96, 96), (72, 96), (48, 96))
    # The picture's shape cuts a quarter of the rows of the second.
    planes: ClassVar = {(96, 96): (2, 2, 0, 0), (72, 96): (2, 2, 6, 0), (48, 96): (1, 2, 0, 0)}

    def config(self) -> Any:
        config = super().config()
        config.vision_config.image_size, config.vision_config.patch_size = 48, 2
        config.vision_config.num_hidden_layers = 3
        config.image_grid_pinpoints = [[48, 96], [96, 48], [96, 96], [144, 48], [48, 144]]
        config.image_seq_length = 24 * 24
        config.text_config.max_position_embeddings = 4096
        return config


REAL = RealGrid()
TILES = {0: (576,) * 5, 1: (576, *(24 * 18,) * 4), 2: (576,) * 3}


@pytest.mark.parametrize("which", TILES)
@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("visionzip", 640), ("vispruner", 320), ("cdpruner", 160), ("scope", 160), ("mmtok", 160),
        ("prumerge_plus", 160), ("vscan", 160),
    ],
)  # fmt: skip
def test_presets_are_exact_on_a_real_grid(name: str, tokens: int, which: int) -> None:
    found = vtc.presets(name, "llava-next")
    preset = next(p for p in found if p.tokens == tokens)
    method = preset.make()
    assert isinstance(method, vtc.PerTile)
    row = REAL._row((2, f"image{which}", 4), 5)
    (image,) = row.images
    assert image.crop is not None
    assert tuple(image.crop.count(tile) for tile in range(max(image.crop) + 1)) == TILES[which]
    inner: Any = method.inner
    own = [round(inner.keep * n) if name == "vscan" else inner.keep for n in TILES[which]]
    chosen: list[int] = []

    class Spy(vtc.PerTile):
        def select(self, given: VisionTokens) -> vtc.Selection:
            selection = super().select(given)
            assert given.crop is not None
            chosen.extend(counts(selection, given.crop))
            return selection

    with vtc.patch(REAL.build("sdpa"), Spy(inner)) as patch, torch.no_grad():
        patch.model(**REAL.collate([row]))
    assert chosen == own
    layers = patch.report.tokens_per_layer
    assert patch.report.tokens_in == sum(TILES[which])
    assert layers[0] == sum(own)
    if name == "vscan":
        # The cut counts all tiles; a picture whose tiles are all whole averages the target.
        assert layers[-1] == round(round(inner.keep * sum(TILES[which])) / 3)
        assert which != 0 or sum(layers) / len(layers) == tokens
        return
    assert layers[-1] == layers[0]
    if len(TILES[which]) == 5:  # the target, however the picture's shape cuts the tiles
        assert sum(own) == tokens == preset.schedule().entering
