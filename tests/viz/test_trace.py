# SPDX-License-Identifier: Apache-2.0
"""`vtc show` draws every token where its patch lies, on what the model saw of the picture."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import vtc
from tests.reference.families import FAMILIES, FIRST_WORD, IMAGE
from tests.reference.masked import images_of
from tests.runtime.test_families import rows_of, shared
from vtc.core.events import Shown
from vtc.viz.record import TokenRecord
from vtc.viz.trace import traced
from vtc.viz.views import View, cropped, pixels_of

THUMBNAIL_FIRST = ("llava_next", "llava_onevision", "perception_lm", "ovis2")
TILED = (
    "internvl",
    "idefics3",
    "smolvlm",
    "aya_vision",
    "cohere2_vision",
    "llama4",
    *THUMBNAIL_FIRST,
)
PLANES = ("llava_next", "llava_onevision")
"""Where grids count over the plane of all tiles, cut to the picture's shape."""
WHOLE = ("paligemma", "gemma3", "mistral3", "vipllava", "deepseek_vl", "got_ocr2", "fast_vlm")
PACKED = ("qwen2_vl", "qwen2_5_vl", "glm4v")
SIZE = 1
"""The number of the picture that families cut into tiles."""


def row_of(name: str, which: int = SIZE) -> Any:
    """One prompt with the family's picture `which`."""
    return rows_of(name, "ragged")[which]


def record_of(name: str, row: Any, method: vtc.Method | None = None) -> TokenRecord:
    family, record = FAMILIES[name], TokenRecord()
    patch = vtc.patch(shared(name, family.attentions[-1]), method or vtc.Full())
    with patch, patch.listen(record.hear), torch.no_grad():
        patch.model(**family.collate((row,)))
    return record


def patch_size(name: str) -> int | None:
    size = getattr(
        shared(name, FAMILIES[name].attentions[-1]).config.vision_config, "patch_size", None
    )
    return size if isinstance(size, int) else None


@pytest.mark.parametrize("name", TILED)
def test_tokens_of_tiles_lie_where_the_family_says(name: str) -> None:
    family, row = FAMILIES[name], row_of(name)
    pixels = pixels_of(family.collate((row,)))
    record = record_of(name, row)
    places = record.places(pixels, patch_size(name))
    truth = images_of(family, row)
    assert pixels is not None
    assert sum(map(len, record.shown)) == sum(len(image.grid) for image in truth)
    assert places.tiles == len(pixels) > 1
    start, number = 0, 0
    for image in truth:
        n = len(image.grid)
        own = [
            getattr(places, what)[start : start + n].tolist() for what in ("tile", "row", "column")
        ]
        crops = image.crop or [None] * n
        order = list(dict.fromkeys(crops))
        first = {crop: number + i for i, crop in enumerate(order)}
        if name in PLANES:  # tiles of the plane interleave, row by row
            first = {crop: crop for crop in order}
        assert own[0] == [first[crop] for crop in crops]
        of_thumbnail = {t for t, crop in zip(own[0], crops, strict=True) if crop == 0}
        if len(order) > 1:
            assert of_thumbnail == {0 if name in THUMBNAIL_FIRST else len(order) - 1}
        if name not in PLANES:
            assert list(zip(own[1], own[2], strict=True)) == [(r, c) for _, r, c in image.grid]
        start, number = start + n, number + len(order)


@pytest.mark.parametrize("name", PLANES)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_tokens_of_a_plane_lie_at_their_patches(name: str, which: int) -> None:
    """Against the map that the family makes: each token is the patch it came from."""
    row = row_of(name, which)
    record = record_of(name, row)
    pixels = pixels_of(FAMILIES[name].collate((row,)))
    assert pixels is not None
    places = record.places(pixels, patch_size(name))
    (tokens,) = record.shown
    side = pixels.shape[-1] // (patch_size(name) or 1)
    assert places.rows == places.columns == side
    number = (places.tile * side + places.row) * side + places.column
    assert tokens.patches is not None
    assert number.tolist() == tokens.patches[:, 0].tolist()
    plane = tokens.crop != 0 if tokens.crop is not None else torch.zeros(len(tokens), dtype=bool)
    if bool(plane.any()) and name == "llava_next":
        # Cut to the picture's shape: places differ from the grid by one offset in all tokens.
        across = 1 + max((int(c) for c in (tokens.crop[plane] - 1)), default=0)
        for columns in range(1, across + 1):
            tile = places.tile[plane] - 1
            r = tile // columns * side + places.row[plane] - tokens.grid[plane, 1]
            c = tile % columns * side + places.column[plane] - tokens.grid[plane, 2]
            if len(r.unique()) == len(c.unique()) == 1:
                break
        else:
            pytest.fail("no arrangement of tiles explains the places")


@pytest.mark.parametrize("name", [*WHOLE, *PACKED])
def test_tokens_of_one_picture_lie_on_its_grid(name: str) -> None:
    row = row_of(name)
    pixels = pixels_of(FAMILIES[name].collate((row,)))
    assert (pixels is None) == (name in PACKED)
    record = record_of(name, row)
    places = record.places(pixels, patch_size(name))
    (image,) = images_of(FAMILIES[name], row)
    assert places.tiles == 1
    found = zip(places.row.tolist(), places.column.tolist(), strict=True)
    assert list(found) == [(r, c) for _, r, c in image.grid]
    assert places.rows * places.columns == len(image.grid)


def test_tokens_without_places_are_not_drawn() -> None:
    """Latents of a perceiver have an order only: 64 of them are no row of the picture."""
    record, grid = TokenRecord(), torch.zeros(64, 3, dtype=torch.long)
    grid[:, 2] = torch.arange(64)
    record.hear(Shown(0, vtc.VisionTokens(torch.zeros(64, 4), grid)))
    with pytest.raises(ValueError, match="no places in the picture"):
        record.places(torch.zeros(1, 3, 42, 42), 7)


# ---- from the picture to the drawing ------------------------------------------------------------
class Processor:
    """Cuts a picture into tiles as the family's own does, and writes its prompt."""

    def __init__(self, name: str, shape: tuple[int, int], side: int, layout: Any) -> None:
        self.name, self.shape, self.side, self.layout = name, shape, side, layout
        self.image_processor = SimpleNamespace(do_normalize=False)

    def apply_chat_template(self, chat: Any, add_generation_prompt: bool) -> str:
        return "prompt"

    def __call__(self, images: list[Image.Image], text: list[str], return_tensors: str) -> Any:
        (down, across), side = self.shape, self.side
        plane = np.asarray(images[0].resize((across * side, down * side), Image.Resampling.BOX))
        tiles = [
            plane[r * side : (r + 1) * side, c * side : (c + 1) * side]
            for r in range(down)
            for c in range(across)
        ]
        whole = np.asarray(images[0].resize((side, side), Image.Resampling.BOX))
        tiles = [whole, *tiles] if self.name in THUMBNAIL_FIRST else [*tiles, whole]
        pixels = torch.tensor(np.stack(tiles)).permute(0, 3, 1, 2).float() / 255
        return Inputs(self.layout(pixels, images[0]))

    def decode(self, ids: Tensor, skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids.tolist()))


class Inputs(dict):
    def to(self, *_: Any) -> Inputs:
        return self


def prompt(*parts: int) -> dict[str, Tensor]:
    ids = torch.tensor([[1, 30, *parts, 31, 32, 33]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def internvl(pixels: Tensor, _: Any) -> dict[str, Tensor]:
    per = vtc_tokens("internvl")
    return {**prompt(*[IMAGE] * (per * len(pixels))), "pixel_values": pixels}


def idefics3(pixels: Tensor, _: Any) -> dict[str, Tensor]:
    ids = [i for _ in pixels for i in (FIRST_WORD - 1, *[IMAGE] * vtc_tokens("idefics3"))]
    return {**prompt(*ids), "pixel_values": pixels[None]}


def vtc_tokens(name: str) -> int:
    """Vision tokens of a tile of the tiny model."""
    image = images_of(FAMILIES[name], row_of(name, 0))[-1]
    return len(image.grid) if image.crop is None else image.crop.count(0)


def scene(width: int, height: int) -> Image.Image:
    """Every place has its own colour."""
    rows, columns = np.mgrid[0:height, 0:width]
    red, green = columns * 255 // max(width - 1, 1), rows * 255 // max(height - 1, 1)
    blue = (red + 2 * green) % 256
    return Image.fromarray(np.stack([red, green, blue], axis=2).astype(np.uint8))


def drawn(name: str, shape: tuple[int, int], method: vtc.Method) -> Any:
    model = shared(name, "sdpa")
    side = model.config.vision_config.image_size
    side = side[0] if isinstance(side, (list, tuple)) else side
    layout = {"internvl": internvl, "idefics3": idefics3}[name]
    processor = Processor(name, shape, side, layout)
    picture = scene(60 * shape[1], 60 * shape[0])
    return traced(model, processor, picture, "why", method, 2), picture


def colours(view: View, cells: list[int]) -> np.ndarray:
    """(k, 2) red and green in the middle of the cells: where they lie in the picture."""
    rows, columns = view.grid
    small = view.image.resize((columns, rows), Image.Resampling.BOX)
    return np.asarray(small, dtype=float).reshape(-1, 3)[cells, :2]


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize("name", ["internvl", "idefics3"])
def test_tiles_are_drawn_in_their_places(name: str, shape: tuple[int, int]) -> None:
    found, picture = drawn(name, shape, vtc.Random(0.5))
    plane, thumbnail = found.views
    assert [plane.name, thumbnail.name] == ["tiles", "thumbnail"]
    each = vtc_tokens(name)
    assert len(plane.cells) == each * shape[0] * shape[1] == plane.grid[0] * plane.grid[1]
    assert len(thumbnail.cells) == each
    # What is drawn at a place of the plane is what the picture shows there.
    for view in found.views:
        whole = np.asarray(picture.resize(view.image.size, Image.Resampling.BOX), dtype=float)
        assert np.abs(np.asarray(view.image, dtype=float) - whole).max() <= 8
    kept = found.counts["into the language model"]
    assert kept == sum(len(view.kept["into the language model"]) for view in found.views)
    assert found.total == each * (1 + shape[0] * shape[1])


@pytest.mark.parametrize("name", ["internvl", "idefics3"])
@pytest.mark.parametrize(
    "method",
    [
        vtc.FastV(0.25, layer=2),
        vtc.PyramidDrop(0.5),
        vtc.DivPrune(0.5) | vtc.FastV(0.25, layer=3),
        vtc.Random(0.5) | vtc.DivPrune(0.25),
    ],
    ids=str,
)
def test_cuts_between_layers_are_drawn_of_all_tiles(name: str, method: vtc.Method) -> None:
    found, _ = drawn(name, (2, 2), method)
    *_, last = found.kept
    with vtc.patch(shared(name, "sdpa"), method) as patch, torch.no_grad():
        side = shared(name, "sdpa").config.vision_config.image_size
        side = side[0] if isinstance(side, (list, tuple)) else side
        layout = {"internvl": internvl, "idefics3": idefics3}[name]
        patch.model(**Processor(name, (2, 2), side, layout)([scene(120, 120)], [""], "pt"))
    report = [sum(i.per_layer[layer] for i in patch.report.images) for layer in (0, -1)]
    assert [found.counts["into the language model"], found.counts[last]] == report
    before = [set(view.cells) for view in found.views]
    for stage in found.kept:
        now = [set(view.kept[stage]) for view in found.views]
        assert all(a <= b for a, b in zip(now, before, strict=True))
        before = now


def test_a_kept_token_is_drawn_on_its_own_tile() -> None:
    """Of the thumbnail alone are kept, or of one tile: nothing is drawn elsewhere."""
    for name in ("internvl", "idefics3"):
        each = vtc_tokens(name)
        for tile in range(5):
            keep = range(tile * each, (tile + 1) * each)

            def prune(self: vtc.FastV, state: Any, keep: range = keep) -> vtc.Selection:
                return vtc.Selection(torch.tensor(list(keep)))

            method = type("Only", (vtc.FastV,), {"prune": prune})(keep=each, layer=2)
            found, _ = drawn(name, (2, 2), method)
            plane, thumbnail = (view.kept["before layer 2"] for view in found.views)
            assert (len(plane), len(thumbnail)) == ((0, each) if tile == 4 else (each, 0))
            if tile < 4:
                side = found.grid[0] // 2
                rows = {cell // found.grid[1] // side for cell in plane}
                columns = {cell % found.grid[1] // side for cell in plane}
                assert (rows, columns) == ({tile // 2}, {tile % 2})


# ---- what the processor takes away --------------------------------------------------------------
@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((300, 84), "the middle 28% of its width"),
        ((84, 336), "the middle 25% of its height"),
        ((84, 84), None),
        ((100, 100), None),
    ],
)
def test_a_cropped_picture_is_said(size: tuple[int, int], said: str | None) -> None:
    from transformers import CLIPImageProcessor

    images = CLIPImageProcessor(size={"shortest_edge": 84}, crop_size={"height": 84, "width": 84})
    note = cropped(Image.new("RGB", size), images)
    assert (note is None) if said is None else (note is not None and said in note)
    stretched = CLIPImageProcessor(size={"height": 84, "width": 84}, do_center_crop=False)
    assert cropped(Image.new("RGB", size), stretched) is None
