# SPDX-License-Identifier: Apache-2.0
"""Places the tokens of an image on the picture, the plane of its tiles, or the thumbnail.

Tokens are placed by their tower patches if these are known and lie within the model's input pixels,
otherwise by their grid, tile by tile in sequence order. The pictures show the input pixels, after
the processor's cropping, stretching and padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

__all__ = ["Places", "View", "cropped", "places_of", "views_of"]


@dataclass(frozen=True)
class View:
    """A picture that the model saw, and the tokens on it.

    Attributes:
        name: "image", "tiles" or "thumbnail".
        image: the vision tower's input.
        grid: (rows, columns) of cells that cover it.
        cells: row-major numbers of the cells that have a token before compression.
        kept: by stage ("into the language model", "before layer 3", ...), those of the tokens left.
    """

    name: str
    image: Image.Image
    grid: tuple[int, int]
    cells: list[int]
    kept: dict[str, list[int]]


@dataclass(frozen=True)
class Places:
    """Where the n tokens of a picture lie.

    Attributes:
        tile: (n,) the tower's tile of each, in the order of its pixels.
        row, column: (n,) the cell of each in its tile.
        rows, columns: number of a tile's rows and columns of cells.
        thumbnail: the thumbnail's tile, or `None` if unknown.
        tiles: number of tiles that the picture was divided into.
    """

    tile: Tensor
    row: Tensor
    column: Tensor
    rows: int
    columns: int
    thumbnail: int | None
    tiles: int


def places_of(
    image: Tensor,
    crop: Tensor | None,
    grid: Tensor,
    patches: Tensor | None,
    pixels: Tensor | None,
    patch_size: int | None,
) -> Places:
    """Where the n tokens of a picture lie.

    Args:
        image: (n,) the image of each; models that do not know which tiles belong together treat
            each as an image.
        crop: (n,) the tile of each, 0 for the thumbnail, or `None`.
        grid: (n, 3) the (frame, row, column) of each.
        patches: (n, m) the tower's patches of each, or `None`.
        pixels: (tiles, 3, height, width) the tower's input, or `None` if it is not a picture.
        patch_size: side of the tower's patches, in pixels, or `None`.

    Returns:
        The place of each token in its tile.

    Raises:
        ValueError: the tokens have no places in the picture.
    """
    part = image if crop is None else image * (int(crop.max()) + 1) + crop
    found, number = part.unique(return_inverse=True)
    # Tiles have the same order in the sequence as in the pixels.
    first = torch.full((len(found),), len(part)).scatter_reduce(
        0, number, torch.arange(len(part)), "amin"
    )
    tile = first.argsort().argsort()[number]
    tiles = len(found) if pixels is None else len(pixels)
    row, column, by = grid[:, 1], grid[:, 2], 1
    rows, columns = int(row.max()) + 1, int(column.max()) + 1
    if patches is not None and pixels is not None and patch_size:
        down, across = (size // patch_size for size in pixels.shape[-2:])
        if int(patches.min()) >= 0 and int(patches.max()) < tiles * down * across:
            tile = patches[:, 0] // (down * across)
            place = patches % (down * across)
            r, c = place // across, place % across
            by = int((r.amax(1) - r.amin(1)).max()) + 1
            row, column = r.amin(1) // by, c.amin(1) // by
            rows, columns = down // by, across // by
    elif rows == 1 and columns > 8 and (pixels is None or pixels.shape[-1] < 8 * pixels.shape[-2]):
        raise ValueError("its vision tokens have no places in the picture to draw")
    thumbnail = None
    if crop is not None and bool((crop == 0).any()) and len(found) > 1:
        thumbnail = int(tile[crop == 0][0])
    return Places(tile, row, column, rows, columns, thumbnail, max(tiles, int(tile.max()) + 1))


# ---- pictures -----------------------------------------------------------------------------------
def pixels_of(inputs: Mapping[str, Any]) -> Tensor | None:
    """(tiles, 3, height, width) the tower's input, or `None` if it is not a picture."""
    pixels = inputs.get("pixel_values")
    if pixels is None or pixels.dim() < 3 or pixels.shape[-3] != 3:
        return None
    flat: Tensor = pixels.detach().float().cpu().reshape(-1, *pixels.shape[-3:])
    return flat


def as_pictures(pixels: Tensor, images: Any) -> list[Image.Image]:
    """Undo the processor's normalisation.

    Args:
        pixels: (tiles, 3, height, width).
        images: the image processor.

    Returns:
        One RGB picture per tile.
    """
    if getattr(images, "do_normalize", True) and getattr(images, "image_mean", None) is not None:
        mean, std = (torch.tensor(v)[:, None, None] for v in (images.image_mean, images.image_std))
        pixels = pixels * std + mean
    if getattr(images, "do_rescale", True):
        pixels = pixels * 255
    values = pixels.clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(each) for each in values]


def cropped(picture: Image.Image, images: Any) -> str | None:
    """What the processor crops from a picture of a single tile, in words, or `None`.

    Args:
        picture: the picture.
        images: the image processor.
    """
    if not getattr(images, "do_center_crop", False) or hasattr(images, "image_grid_pinpoints"):
        return None
    crop, size = _size(images.crop_size), _size(images.size)
    edge = size.get("shortest_edge")
    if not edge or not getattr(images, "do_resize", True) or {"height", "width"} - crop.keys():
        return None
    scale = edge / min(picture.size)
    seen = {
        "width": min(1.0, crop["width"] / (picture.width * scale)),
        "height": min(1.0, crop["height"] / (picture.height * scale)),
    }
    lost = [f"{share:.0%} of its {name}" for name, share in seen.items() if share < 0.995]
    if not lost:
        return None
    return f"the processor crops the picture: the model sees the middle {' and '.join(lost)}"


def _size(given: Any) -> dict[str, int]:
    found = dict(given) if isinstance(given, Mapping) else vars(given)
    return {name: value for name, value in found.items() if value}


def views_of(
    places: Places,
    kept: Mapping[str, Sequence[int]],
    picture: Image.Image,
    tiles: Sequence[Image.Image] | None,
) -> list[View]:
    """The pictures to draw on: one, or the plane of tiles and the thumbnail.

    Args:
        places: places of the picture's n tokens.
        kept: numbers of the kept tokens, by stage.
        picture: the picture, drawn on if `tiles` is `None`.
        tiles: the tower's input as pictures, or `None`.

    Returns:
        The views, with the kept cells of each.
    """
    if places.tiles == 1 or tiles is None:
        shown = picture if tiles is None else tiles[0]
        return [_view("image", shown, places, kept, [0], (1, 1))]
    thumbnail, shape = _arrangement(picture, tiles, places.thumbnail)
    plane = [i for i in range(len(tiles)) if i != thumbnail]
    views = []
    if plane:
        views.append(_view("tiles", _joined(tiles, plane, shape), places, kept, plane, shape))
    if thumbnail is not None:
        shown = tiles[thumbnail]
        views.append(_view("thumbnail", shown, places, kept, [thumbnail], (1, 1)))
    return [view for view in views if view.cells]


def _view(
    name: str,
    image: Image.Image,
    places: Places,
    kept: Mapping[str, Sequence[int]],
    tiles: list[int],
    shape: tuple[int, int],
) -> View:
    across = shape[1]
    columns = across * places.columns
    order = {tile: i for i, tile in enumerate(tiles)}
    cell: dict[int, int] = {}
    rows_of = zip(places.tile.tolist(), places.row.tolist(), places.column.tolist(), strict=True)
    for number, (tile, row, column) in enumerate(rows_of):
        if (i := order.get(tile)) is not None:
            down = i // across * places.rows + row
            cell[number] = down * columns + i % across * places.columns + column
    return View(
        name,
        image,
        (shape[0] * places.rows, columns),
        sorted(set(cell.values())),
        {stage: [cell[n] for n in left if n in cell] for stage, left in kept.items()},
    )


def _joined(
    tiles: Sequence[Image.Image], numbers: Sequence[int], shape: tuple[int, int]
) -> Image.Image:
    """Tiles side by side, row by row."""
    width, height = tiles[0].size
    plane = Image.new("RGB", (shape[1] * width, shape[0] * height))
    for i, number in enumerate(numbers):
        plane.paste(tiles[number], (i % shape[1] * width, i // shape[1] * height))
    return plane


_SIDE = 96
"""Side in pixels of the thumbnails that are compared."""


def _arrangement(
    picture: Image.Image, tiles: Sequence[Image.Image], thumbnail: int | None
) -> tuple[int | None, tuple[int, int]]:
    """(the thumbnail, if any; rows and columns of the others) that look most like `picture`.

    Processors do not report the arrangement, and differ in it; any other gives another picture.
    """
    count = len(tiles)
    ends = [thumbnail] if thumbnail is not None else [count - 1, 0, None]
    best: tuple[float, int | None, tuple[int, int]] | None = None
    for end in ends:
        plane = [i for i in range(count) if i != end]
        for rows in (r for r in range(1, len(plane) + 1) if len(plane) % r == 0):
            shape = rows, len(plane) // rows
            off = _unlike(picture, _joined(tiles, plane, shape))
            if end is not None:  # weighted like the plane, so that no tile passes for a thumbnail
                off = (off + _unlike(picture, tiles[end])) / 2
            if best is None or off < best[0] - 1e-6:
                best = off, end, shape
    if best is None:
        return thumbnail, (1, 1)
    return best[1:]


def _unlike(picture: Image.Image, shown: Image.Image) -> float:
    """Distance of `shown` from `picture`, stretched or padded to its shape."""
    small = np.asarray(shown.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR), dtype=np.float32)
    found = []
    for whole in (picture.resize(shown.size), ImageOps.pad(picture, shown.size)):
        seen = whole.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
        found.append(float(np.abs(np.asarray(seen, dtype=np.float32) - small).mean()))
    return min(found)
