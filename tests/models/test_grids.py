# SPDX-License-Identifier: Apache-2.0
"""Pictures of awkward shapes: planes that are cut to nothing, grids that squares do not fill."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtc
from tests.reference.families import END, IMAGE, TAG, Piece, TinyFamily, cells, long, marks, pixels
from tests.reference.families_more import Gemma3, LlavaNext, LlavaNextVideo, LlavaOneVision
from tests.reference.families_rest import Mistral3
from tests.reference.masked import Masked
from tests.reference.probes import Fixed, Ragged, Spy
from tests.runtime.test_exactness import CONTROL, TOLERANCE, difference
from tests.runtime.test_families import Steps
from vtc.core import Method, VisionTokens
from vtc.core.images import merged_patches


# ---- families -----------------------------------------------------------------------------------
class _Thin:
    """Pictures so narrow, or so low, that cutting two tiles to their shape leaves no column, or at
    most one row."""

    def image(self: Any, which: int, generator: torch.Generator, count: int) -> Piece:
        side = self.tile * self.patch
        tokens = cells(self.tile, self.tile, crop=0)
        if which < 2:  # no columns: newlines alone
            size = (400, 1) if which == 0 else (side, 1)
            tokens += marks(*[IMAGE] * self.tile)
        else:
            size = (1, 400)
            if self.tile % 2:
                row = [(0, column, 1 + column // self.tile) for column in range(2 * self.tile)]
                tokens += [(IMAGE, (0, *place)) for place in row]
                tokens += marks(IMAGE)
        extras = {
            "pixel_values": pixels(generator, 1, 3, 3, side, side),
            "image_sizes": long(*size),
        }
        return Piece(tokens, extras)


class _ThinNext(_Thin, LlavaNext):
    pass


class _ThinNextVideo(_Thin, LlavaNextVideo):
    pass


class _ThinOneVision(_Thin, LlavaOneVision):
    pass


class _OddMistral3(Mistral3):
    """Grids of patches that 2 x 2 squares do not fill."""

    patches = ((9, 11), (7, 8), (4, 13))

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        height, width = self.patches[which]
        tokens: list[Any] = []
        for row in range(height // 2):
            tokens += [(IMAGE, (0, row, column, None)) for column in range(width // 2)]
            tokens += marks(TAG if row < height // 2 - 1 else END)
        extras = {
            "pixel_values": pixels(generator, 1, 3, 7 * height, 7 * width),
            "image_sizes": long(7 * height, 7 * width),
        }
        return Piece(tokens, extras)


class _OddGemma3(Gemma3):
    """9 x 9 patches, pooled to 4 x 4."""

    side_pixels = 63

    def config(self) -> Any:
        found = super().config()
        found.vision_config.image_size = 63
        return found


THIN: list[TinyFamily] = [
    _ThinNext(),
    _ThinNextVideo(),
    _ThinOneVision("llava_onevision", 9),
]
ODD: list[TinyFamily] = [_OddMistral3(), _OddGemma3("gemma3", 400)]
KEEP_ALL = [vtc.Full(), vtc.Random(keep=1.0), vtc.DivPrune(keep=1.0), vtc.FastV(keep=1.0, layer=2)]


def _of(family: TinyFamily) -> str:
    return family.name


@torch.no_grad()
def _run(family: TinyFamily, model: Any, row: Any) -> Any:
    return model(**family.collate([row]), output_hidden_states=True)


# ---- nothing dropped ----------------------------------------------------------------------------
@pytest.mark.parametrize("family", [*THIN, *ODD], ids=_of)
def test_keeping_all_keeps_all(family: TinyFamily) -> None:
    """Bitwise the plain model, newlines of rows without tokens included."""
    model = family.build("sdpa")
    for row in family.rows("ragged"):
        plain = _run(family, model, row)
        for method in KEEP_ALL:
            with vtc.patch(model, method):
                found = _run(family, model, row)
            assert [h.shape for h in found.hidden_states] == [h.shape for h in plain.hidden_states]
            assert torch.equal(found.logits, plain.logits)


# ---- some dropped -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "method", [Ragged(), Fixed(stride=5), Steps()], ids=["ragged", "fixed", "layers"]
)
@pytest.mark.parametrize("family", [*THIN, *ODD], ids=_of)
def test_removal_is_masking(family: TinyFamily, method: Method) -> None:
    model, plain, rows = family.build("sdpa"), family.build("eager"), family.rows("ragged")
    truths = [Masked(family, plain, method, row).logits()[0] for row in rows]
    batch = family.collate(rows)
    with torch.no_grad(), vtc.patch(model, method):
        logits = model(**batch).logits
    away = 0.0
    for i, (row, truth) in enumerate(zip(rows, truths, strict=True)):
        assert difference(logits[i, batch["attention_mask"][i].bool()], truth) < TOLERANCE
        away = max(away, difference(_run(family, plain, row).logits[0, -1], truth[-1]))
    assert away > CONTROL


@pytest.mark.parametrize("family", [*THIN, *ODD], ids=_of)
def test_methods_are_shown_the_places(family: TinyFamily) -> None:
    spy, rows = Spy(Fixed(stride=1)), family.rows("ragged")
    model: Any = family.build("sdpa")
    with torch.no_grad(), vtc.patch(model, spy):
        model(**family.collate(rows))
    shown = [tokens for tokens, _ in spy.notes if isinstance(tokens, VisionTokens)]
    grids = [[list(place) for place in image.grid] for row in rows for image in row.images]
    assert [tokens.grid.tolist() for tokens in shown] == grids


@pytest.mark.parametrize("family", [*THIN, *ODD], ids=_of)
def test_the_tower_is_read(family: TinyFamily) -> None:
    """Every token with its own patches: the method chooses by the tower's attention."""
    model: Any = family.build("sdpa")
    with torch.no_grad(), vtc.patch(model, "todre", keep=3, second_stage=False) as patch:
        model(**family.collate(family.rows("ragged")))
    kept = [image.per_layer[0] for sample in patch.report.samples for image in sample.images]
    assert kept == [3, 3, 3]


def test_squares_of_a_grid_that_they_do_not_fill() -> None:
    """As `torch.nn.functional.unfold` takes them."""
    for rows, columns, by in ((5, 5, 2), (4, 7, 2), (7, 4, 3), (6, 4, 2), (2, 2, 2)):
        raster = torch.arange(rows * columns).view(1, 1, rows, columns).double()
        squares = torch.nn.functional.unfold(raster, kernel_size=by, stride=by)[0].T.long()
        assert torch.equal(merged_patches(rows, columns, by, first=3), squares + 3)
