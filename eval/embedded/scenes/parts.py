# SPDX-License-Identifier: Apache-2.0
"""The parts of a scene: objects and printed texts, and their boxes."""

from __future__ import annotations

from dataclasses import dataclass

from .glyphs import Glyph

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels of the picture."""


@dataclass(frozen=True)
class SceneObject:
    """A coloured shape; `x`, `y`, `radius` in pixels, `region` 0 to 8 in reading order."""

    shape: str
    color: str
    x: float
    y: float
    radius: float
    angle: float
    region: int


@dataclass(frozen=True)
class Print:
    """A printed text. `role`: number, word, key or value; `key` names the document's line."""

    role: str
    text: str
    color: str
    font: str
    size: int
    glyphs: tuple[Glyph, ...]
    key: str = ""

    @property
    def boxes(self) -> tuple[Box, ...]:
        """Each character's cell."""
        return tuple(
            (g.x - g.width / 2, g.y - g.width / 2, g.x + g.width / 2, g.y + g.width / 2)
            for g in self.glyphs
        )
