# SPDX-License-Identifier: Apache-2.0
"""Generated pictures with questions: the embedded VLM's task and training data.

`generate(seed, split)` is a pure function. Splits have disjoint seed streams, and disjoint numbers,
words and amounts. There are three kinds of scene: objects, objects with printed numbers and words,
and small documents whose lines have a name and a value.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from PIL import Image

from .drawing import COLORS, SHAPES, background, clutter, paint, shape_mask
from .glyphs import FONTS, SCALES, SIZES, draw_glyphs, place
from .labels import GRID, IMAGE_SIZE, PATCH_SIZE, empty_labels, label_glyph, label_object
from .parts import Print, SceneObject
from .questions import Question, compose
from .words import DOCUMENT_KEYS, sample_amount, sample_number, sample_word

SPLITS: tuple[str, ...] = ("train", "val", "test")
KINDS: tuple[str, ...] = ("objects", "text", "document")
_KIND_WEIGHTS = (0.38, 0.40, 0.22)

INKS: tuple[str, ...] = ("black", "red", "blue", "green", "purple")
"""Colours of printed text, dark on a pale background."""

TILT = 25.0
"""Maximum rotation of an object in either direction, in degrees."""

_CELL = IMAGE_SIZE / 3
_PLACES = (-21, -7, 7, 21)
"""Offsets in pixels of an object's centre from the centre of its ninth: aligned with the patches,
like texts, and at least 33 pixels from the ninth's border."""


@dataclass(frozen=True)
class Scene:
    """The contents of a picture, which determine its pixels, labels and questions."""

    seed: int
    split: str
    kind: str
    objects: tuple[SceneObject, ...]
    prints: tuple[Print, ...]
    paper: tuple[float, float, float, float] | None = field(default=None)

    @cached_property
    def image(self) -> Image.Image:
        """The picture, 336 x 336 RGB."""
        return Image.fromarray(self.pixels())

    def pixels(self) -> np.ndarray:
        """(336, 336, 3) uint8 pixels of the picture."""
        rng = _stream(self.seed, self.split, 1)
        canvas = background(rng, IMAGE_SIZE)
        if self.paper is not None:
            left, top, right, bottom = (round(v) for v in self.paper)
            sheet = np.float32(rng.uniform(222, 250)) + rng.uniform(-5, 5, 3).astype(np.float32)
            area = canvas[top:bottom, left:right]
            grain = area - area.mean(axis=(0, 1))
            canvas[top:bottom, left:right] = sheet + rng.uniform(0, 0.4) * grain
        else:
            canvas = clutter(rng, canvas)
        for item in self.objects:
            mask = shape_mask(item.shape, item.radius, item.angle)
            shade = float(rng.uniform(-30, 30))
            paint(canvas, mask, item.x, item.y, _jittered(rng, item.color), shade)
        for text in self.prints:
            if self.paper is None:  # a text outside a document has its own plate
                left, top, right, bottom = (round(v) for v in _box(text))
                canvas[top:bottom, left:right] = rng.uniform(225, 250) + rng.uniform(-5, 5, 3)
        inks: dict[str, np.ndarray] = {}
        for text in self.prints:
            if text.color not in inks:
                inks[text.color] = _jittered(rng, text.color)
            draw_glyphs(canvas, text.glyphs, text.font, text.size, inks[text.color])
        return np.clip(canvas, 0, 255).astype(np.uint8)

    @cached_property
    def labels(self) -> np.ndarray:
        """(fields, 24, 24) uint8 dense labels; see `labels`."""
        labels = empty_labels()
        for item in self.objects:
            where = (item.x, item.y, item.radius)
            label_object(labels, item.shape, item.color, item.region, *where)
        for text in self.prints:
            for k, glyph in enumerate(text.glyphs):
                label_glyph(
                    labels,
                    text.role,
                    text.color,
                    glyph.char,
                    k,
                    k == len(text.glyphs) - 1,
                    text.key,
                    (glyph.x, glyph.y, glyph.width, glyph.height),
                )
        return labels

    @cached_property
    def questions(self) -> list[Question]:
        """Questions on this scene, each with exactly one right answer."""
        asked = compose(self.objects, self.prints, _stream(self.seed, self.split, 2))
        return [Question(f"{self.split}_{self.seed}_{k}", *one) for k, one in enumerate(asked)]


def _stream(seed: int, split: str, purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([SPLITS.index(split), purpose, seed]))


def _jittered(rng: np.random.Generator, color: str) -> np.ndarray:
    return np.clip(np.array(COLORS[color]) + rng.uniform(-14, 14, 3), 0, 255).astype(np.float32)


def generate(seed: int, split: str) -> Scene:
    """The scene number `seed` of a split.

    Args:
        seed: number of the scene, from 0.
        split: "train", "val" or "test".

    Raises:
        ValueError: unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
    rng = _stream(seed, split, 0)
    kind = KINDS[int(rng.choice(len(KINDS), p=_KIND_WEIGHTS))]
    if kind == "document":
        prints, paper = _document(rng, split)
        return Scene(seed, split, kind, (), prints, paper)
    printed = _prints(rng, split) if kind == "text" else ()
    count = int(rng.integers(1, 5)) if kind == "text" else int(rng.integers(3, 9))
    return Scene(seed, split, kind, _objects(rng, count, printed), printed)


def _choice(rng: np.random.Generator, pool: tuple[str, ...] | list[str]) -> str:
    return pool[int(rng.integers(len(pool)))]


def _box(text: Print) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a printed text in pixels, with a margin."""
    xs = [g.x - g.width / 2 for g in text.glyphs] + [g.x + g.width / 2 for g in text.glyphs]
    ys = [g.y - g.height / 2 for g in text.glyphs] + [g.y + g.height / 2 for g in text.glyphs]
    return min(xs) - 4, min(ys) - 4, max(xs) + 4, max(ys) + 4


def _objects(
    rng: np.random.Generator, count: int, printed: tuple[Print, ...]
) -> tuple[SceneObject, ...]:
    """Up to `count` objects, at most one per ninth of the picture, without contact."""
    palette, shapes = list(COLORS), list(SHAPES)
    # sometimes one colour or shape is frequent, for counts above two
    theme = rng.random()
    share = rng.uniform(0.3, 0.9)
    color, shape = _choice(rng, palette), _choice(rng, shapes)
    boxes = [_box(text) for text in printed]
    objects: list[SceneObject] = []
    for region in rng.permutation(9).tolist():
        if len(objects) == count:
            break
        this_color = color if theme < 0.35 and rng.random() < share else _choice(rng, palette)
        this_shape = shape if theme > 0.65 and rng.random() < share else _choice(rng, shapes)
        for _ in range(8):
            radius = float(rng.uniform(21, 42))
            x, y = (
                float(v + rng.choice(_PLACES) + rng.uniform(-1.5, 1.5))
                for v in ((region % 3 + 0.5) * _CELL, (region // 3 + 0.5) * _CELL)
            )
            margin = radius + 3
            inside = margin <= min(x, y) and max(x, y) <= IMAGE_SIZE - margin
            apart = all(
                (o.x - x) ** 2 + (o.y - y) ** 2 > (o.radius + radius + 5) ** 2 for o in objects
            )
            clear = all(
                max(x0 - x, 0, x - x1) ** 2 + max(y0 - y, 0, y - y1) ** 2 > (radius + 3) ** 2
                for x0, y0, x1, y1 in boxes
            )
            if inside and apart and clear:
                angle = float(rng.uniform(-TILT, TILT))
                objects.append(SceneObject(this_shape, this_color, x, y, radius, angle, region))
                break
    return tuple(objects)


def _prints(rng: np.random.Generator, split: str) -> tuple[Print, ...]:
    """One to three numbers and words of different colours, without contact."""
    colors = [INKS[i] for i in rng.permutation(len(INKS))]
    prints: list[Print] = []
    for k in range(int(rng.integers(1, 4))):
        number = rng.random() < 0.6
        text = (
            sample_number(rng, split, int(rng.integers(2, 5)))
            if number
            else sample_word(rng, split)
        )
        font = _choice(rng, FONTS)
        scale = SCALES[int(rng.integers(len(SCALES)))]
        size = scale * SIZES[font][int(rng.integers(len(SIZES[font])))]
        for _ in range(10):
            column = int(rng.integers(1, GRID - scale * len(text)))
            row = int(rng.integers(1, GRID - scale))
            dx, dy = (float(v) for v in rng.uniform(-1, 1, 2))
            glyphs = place(text, size, column, row, dx, dy, scale)
            role = "number" if number else "word"
            candidate = Print(role, text, colors[k], font, size, glyphs)
            x0, y0, x1, y1 = _box(candidate)
            others = (_box(other) for other in prints)
            if all(x0 > c or x1 < a or y0 > d or y1 < b for a, b, c, d in others):
                prints.append(candidate)
                break
    return tuple(prints)


def _document(
    rng: np.random.Generator, split: str
) -> tuple[tuple[Print, ...], tuple[float, float, float, float]]:
    """A sheet of three to six lines, each with a key on the left and a value on the right."""
    lines = int(rng.integers(3, 7))
    keys = [DOCUMENT_KEYS[i] for i in rng.permutation(len(DOCUMENT_KEYS))[:lines]]
    values = [sample_amount(rng, split) for _ in range(lines)]
    font = _choice(rng, FONTS)
    size = SIZES[font][int(rng.integers(len(SIZES[font])))]
    ink = _choice(rng, INKS)
    pitch = int(rng.integers(2, 4))
    columns = max(map(len, keys)) + max(map(len, values)) + 2
    columns = int(rng.integers(columns, GRID - 1))
    column = int(rng.integers(1, GRID - columns))
    row = int(rng.integers(1, GRID - pitch * (lines - 1) - 1))
    dx, dy = (float(v) for v in rng.uniform(-1, 1, 2))
    prints: list[Print] = []
    for k, (key, value) in enumerate(zip(keys, values, strict=True)):
        for role, text in (("key", key.upper()), ("value", value)):
            start = column if role == "key" else column + columns - len(text)
            glyphs = place(text, size, start, row + pitch * k, dx, dy)
            prints.append(Print(role, text, ink, font, size, glyphs, key))
    left, top = PATCH_SIZE * column - 8.0, PATCH_SIZE * row - 8.0
    width, height = PATCH_SIZE * columns + 16, PATCH_SIZE * (pitch * (lines - 1) + 1) + 16
    return tuple(prints), (left, top, left + width, top + height)


__all__ = ["GRID", "IMAGE_SIZE", "INKS", "KINDS", "SPLITS", "TILT", "Scene", "generate"]
