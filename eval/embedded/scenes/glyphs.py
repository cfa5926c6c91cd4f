# SPDX-License-Identifier: Apache-2.0
"""Fonts and the layout of printed characters.

Every character is placed separately, so its centre and box are known exactly: the dense labels
(which character lies under which patch) and the rendered picture use the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONTS: tuple[str, ...] = (
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSansMono-Oblique.ttf",
    "cmtt10.ttf",
)
"""Monospaced fonts shipped with matplotlib."""

SIZES: dict[str, tuple[int, ...]] = {
    name: (23, 24, 25) if name.startswith("cm") else (19, 20, 21, 22) for name in FONTS
}
"""Font sizes in pixels at which a character fills one 14-pixel cell."""

SCALES: tuple[int, ...] = (1, 2)
"""Scales of texts: characters fill 14 or 28 pixels."""

ADVANCE = 14
"""Distance in pixels between characters: the side of a patch. Texts are aligned with the patches,
one character per patch, so that a tower can learn to read them in minutes."""


@dataclass(frozen=True)
class Glyph:
    """A printed character: the centre of its box, in pixels of the picture, and its cell's size."""

    char: str
    x: float
    y: float
    width: float
    height: float


@lru_cache(maxsize=1)
def _font_folder() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@lru_cache(maxsize=64)
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """The font `name` of `FONTS` at `size` pixels."""
    return ImageFont.truetype(
        str(_font_folder() / name), size, layout_engine=ImageFont.Layout.BASIC
    )


def place(
    text: str, size: int, column: int, row: int, dx: float, dy: float, scale: int = 1
) -> tuple[Glyph, ...]:
    """Lay out a text.

    Args:
        text: the text.
        size: the font's size in pixels, including `scale`.
        column, row: the patch of the first character.
        dx, dy: shift in pixels.
        scale: patches per character, in each direction.
    """
    y = (row + scale / 2) * ADVANCE + dy
    width = float(ADVANCE * scale)
    return tuple(
        Glyph(char, column * ADVANCE + (k + 0.5) * width + dx, y, width, 0.8 * size)
        for k, char in enumerate(text)
    )


@lru_cache(maxsize=32768)
def _mask(font: str, size: int, char: str) -> np.ndarray:
    """(side, side) coverage in [0, 1] of one character, with its cap height centred."""
    side = 2 * size
    picture = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(picture)
    # "ms" anchors at the baseline, which all characters of a line share; a cap's height is about
    # 0.72 of the font size, so its middle is at the centre of the mask
    draw.text(
        (side / 2, side / 2 + 0.36 * size), char, font=load_font(font, size), fill=255, anchor="ms"
    )
    return np.asarray(picture, dtype=np.float32) / 255


def draw_glyphs(
    canvas: np.ndarray,
    glyphs: tuple[Glyph, ...],
    font: str,
    size: int,
    color: np.ndarray,
) -> None:
    """Paint the characters onto `canvas`, (H, W, 3) float, in place."""
    height, width = canvas.shape[:2]
    for glyph in glyphs:
        mask = _mask(font, size, glyph.char)
        side = mask.shape[0]
        top, left = round(glyph.y - side / 2), round(glyph.x - side / 2)
        y0, y1 = max(top, 0), min(top + side, height)
        x0, x1 = max(left, 0), min(left + side, width)
        if y0 >= y1 or x0 >= x1:
            continue
        alpha = mask[y0 - top : y1 - top, x0 - left : x1 - left, None]
        canvas[y0:y1, x0:x1] += alpha * (color - canvas[y0:y1, x0:x1])
