# SPDX-License-Identifier: Apache-2.0
"""Dense labels: what each of the 24 x 24 patches of a 336-pixel picture shows.

The labels are deliberately local: they describe the object, character or tile under a patch, and
nothing else in the picture. A vision tower trained on them keeps information in its place, so that
dropping tokens drops information.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from .drawing import COLORS, SHAPES
from .words import DOCUMENT_KEYS

IMAGE_SIZE, PATCH_SIZE = 336, 14
GRID = IMAGE_SIZE // PATCH_SIZE

ROLES: tuple[str, ...] = ("object", "number", "word", "key", "value", "photo")
REGIONS: tuple[str, ...] = (
    "top left", "top", "top right", "left", "center", "right", "bottom left", "bottom",
    "bottom right",
)  # fmt: skip
CHARS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ."
MAX_CHARS = 8
MAX_TILES = 4
PHOTO_CLASSES, PHOTO_BRANDS, PHOTO_KINDS = 64, 16, 8
"""Maximum number of classes of the photo set, whose names come with its data."""

FIELDS: Mapping[str, int] = MappingProxyType(
    {
        "role": 1 + len(ROLES),
        "shape": 1 + len(SHAPES),
        "color": 1 + len(COLORS),
        "centre": 2,
        "region": 1 + len(REGIONS),
        "dx": 8,
        "dy": 8,
        "char": 1 + len(CHARS),
        "index": 1 + MAX_CHARS,
        "last": 2,
        "key": 1 + len(DOCUMENT_KEYS),
        "photo": 1 + PHOTO_CLASSES,
        "brand": 1 + PHOTO_BRANDS,
        "kind": 1 + PHOTO_KINDS,
        "tile_row": 1 + MAX_TILES,
        "tile_col": 1 + MAX_TILES,
    }
)
"""Number of classes of each label; class 0 means that the label does not apply.

`centre` marks the patch with the centre of an object, a character or a tile; `dx` and `dy` are the
offset from the patch to its object's centre in patches, -3 to 3, plus 4; `index` is a character's
position in its text, from 1, and `last` marks the last one; `region` is the ninth of the picture
with an object's centre.
"""

FIELD_INDEX: Mapping[str, int] = MappingProxyType({name: i for i, name in enumerate(FIELDS)})
COLOR_INDEX = {name: 1 + i for i, name in enumerate(COLORS)}
SHAPE_INDEX = {name: 1 + i for i, name in enumerate(SHAPES)}
ROLE_INDEX = {name: 1 + i for i, name in enumerate(ROLES)}
CHAR_INDEX = {char: 1 + i for i, char in enumerate(CHARS)}
KEY_INDEX = {key: 1 + i for i, key in enumerate(DOCUMENT_KEYS)}


def empty_labels() -> np.ndarray:
    """(fields, 24, 24) uint8 labels of an empty picture."""
    return np.zeros((len(FIELDS), GRID, GRID), dtype=np.uint8)


_PATCH_X = (np.arange(GRID, dtype=np.float32) * PATCH_SIZE + PATCH_SIZE / 2)[None, :]
_PATCH_Y = _PATCH_X.T


def patch_of(x: float, y: float) -> tuple[int, int]:
    """(row, column) of the patch at pixel (x, y)."""
    return (
        min(max(int(y // PATCH_SIZE), 0), GRID - 1),
        min(max(int(x // PATCH_SIZE), 0), GRID - 1),
    )


def label_object(
    labels: np.ndarray, shape: str, color: str, region: int, x: float, y: float, radius: float
) -> None:
    """Label an object's patches, in place."""
    inside = (_PATCH_X - x) ** 2 + (_PATCH_Y - y) ** 2 <= (0.9 * radius) ** 2
    row, col = patch_of(x, y)
    inside[row, col] = True
    rows, cols = np.nonzero(inside)
    labels[FIELD_INDEX["role"], rows, cols] = ROLE_INDEX["object"]
    labels[FIELD_INDEX["shape"], rows, cols] = SHAPE_INDEX[shape]
    labels[FIELD_INDEX["color"], rows, cols] = COLOR_INDEX[color]
    labels[FIELD_INDEX["region"], rows, cols] = 1 + region
    labels[FIELD_INDEX["dx"], rows, cols] = np.clip(col - cols, -3, 3) + 4
    labels[FIELD_INDEX["dy"], rows, cols] = np.clip(row - rows, -3, 3) + 4
    labels[FIELD_INDEX["centre"], row, col] = 1


def label_glyph(
    labels: np.ndarray,
    role: str,
    color: str,
    char: str,
    index: int,
    last: bool,
    key: str,
    box: tuple[float, float, float, float],
) -> None:
    """Label a character's patches, in place; `box` is (x, y, width, height) around the centre.

    The centre of a character of two patches lies on their border: its first patch is marked.
    """
    x, y, width, height = box
    inset = (width - PATCH_SIZE) / 2
    centre = patch_of(x - inset, y - inset)
    half = PATCH_SIZE / 2
    top = max(int(np.ceil((y - 0.42 * height - half) / PATCH_SIZE)), 0)
    bottom = min(int(np.floor((y + 0.42 * height - half) / PATCH_SIZE)), GRID - 1)
    left = max(int(np.ceil((x - 0.5 * width - half) / PATCH_SIZE)), 0)
    right = min(int(np.floor((x + 0.5 * width - half) / PATCH_SIZE)), GRID - 1)
    values = (
        ("role", ROLE_INDEX[role]),
        ("color", COLOR_INDEX[color]),
        ("char", CHAR_INDEX[char]),
        ("index", min(1 + index, MAX_CHARS)),
        ("last", int(last)),
        ("key", KEY_INDEX[key] if key else 0),
    )
    for name, value in values:
        plane = labels[FIELD_INDEX[name]]
        # a patch that is another character's centre keeps its label
        block = plane[top : bottom + 1, left : right + 1]
        free = labels[FIELD_INDEX["centre"], top : bottom + 1, left : right + 1] == 0
        block[free] = value
        plane[centre] = value
    labels[FIELD_INDEX["centre"]][centre] = 1


def label_tile(
    labels: np.ndarray, g: int, row: int, col: int, photo: int, brand: int, kind: int, color: int
) -> None:
    """Label the patches of tile (row, col), from 0, of a g x g mosaic, in place."""
    side = GRID // g
    area = (slice(row * side, (row + 1) * side), slice(col * side, (col + 1) * side))
    values = (
        ("role", ROLE_INDEX["photo"]),
        ("photo", photo),
        ("brand", brand),
        ("kind", kind),
        ("color", color),
        ("tile_row", 1 + row),
        ("tile_col", 1 + col),
    )
    for name, value in values:
        labels[FIELD_INDEX[name]][area] = value
    labels[FIELD_INDEX["centre"], row * side + side // 2, col * side + side // 2] = 1
