# SPDX-License-Identifier: Apache-2.0
"""Streams of training pictures, labels and questions."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ...tasks.photos import Mosaic, PhotoLibrary
from ..scenes.drawing import COLORS, SHAPES
from ..scenes.glyphs import FONTS, SCALES, SIZES, place
from ..scenes.labels import GRID, IMAGE_SIZE, PATCH_SIZE, REGIONS
from ..scenes.parts import Print, SceneObject
from ..scenes.questions import Asked
from ..scenes.scenes import INKS, TILT, Scene, generate
from ..scenes.words import sample_number, sample_word


class Picture(Protocol):
    """A generated scene or a mosaic of photos."""

    def pixels(self) -> np.ndarray: ...

    @property
    def labels(self) -> np.ndarray: ...


def dense_scene(seed: int) -> Scene:
    """A scene crowded with objects or texts, from which the tower learns faster.

    An ordinary picture is mostly background, which teaches little at the same cost.
    """
    rng = np.random.default_rng([11, seed])
    objects: list[SceneObject] = []
    prints: list[Print] = []
    if rng.random() < 0.5:
        for k in range(16):
            radius = float(rng.uniform(21, 36))
            column, row = (6 * v + int(rng.integers(2, 4)) for v in (k % 4, k // 4))
            x, y = (float((v + 0.5) * PATCH_SIZE + rng.uniform(-1.5, 1.5)) for v in (column, row))
            region = int(y // (IMAGE_SIZE / 3)) * 3 + int(x // (IMAGE_SIZE / 3))
            shape = list(SHAPES)[int(rng.integers(len(SHAPES)))]
            color = list(COLORS)[int(rng.integers(len(COLORS)))]
            angle = float(rng.uniform(-TILT, TILT))
            objects.append(SceneObject(shape, color, x, y, radius, angle, region))
        return Scene(seed, "train", "objects", tuple(objects), ())
    row = 1
    while row < GRID - 2:
        column = int(rng.integers(1, 4))
        scale = SCALES[int(rng.integers(len(SCALES)))]
        while True:
            number = rng.random() < 0.6
            text = (
                sample_number(rng, "train", int(rng.integers(2, 5)))
                if number
                else sample_word(rng, "train")
            )
            if column + scale * len(text) > GRID - 1:
                break
            font = FONTS[int(rng.integers(len(FONTS)))]
            size = scale * SIZES[font][int(rng.integers(len(SIZES[font])))]
            dx, dy = (float(v) for v in rng.uniform(-1, 1, 2))
            glyphs = place(text, size, column, row, dx, dy, scale)
            ink = INKS[int(rng.integers(len(INKS)))]
            prints.append(Print("number" if number else "word", text, ink, font, size, glyphs))
            column += scale * len(text) + int(rng.integers(1, 4))
        row += scale + int(rng.integers(1, 3))
    return Scene(seed, "train", "text", (), tuple(prints))


class Stream:
    """Draws scenes without repetition and, with a library, photos.

    Each of `workers` draws different scenes; `start` sets the first one, so that a stage can
    continue where another stopped.
    """

    def __init__(
        self,
        library: PhotoLibrary | None,
        photo_share: float,
        worker: int = 0,
        workers: int = 1,
        start: int = 0,
        grids: tuple[float, ...] = (0.35, 0.15, 0.45, 0.05),
        dense_share: float = 0.0,
    ) -> None:
        self.library = library
        self.photo_share = photo_share if library is not None else 0.0
        self.worker, self.workers, self.next = worker, workers, start
        self.grids = np.array(grids)
        self.dense_share = dense_share
        self.rng = np.random.default_rng([7, worker, start])

    def draw(self) -> Scene | Mosaic:
        """The next picture."""
        if self.library is not None and self.rng.random() < self.photo_share:
            return self.library.sample(self.rng, 1 + int(self.rng.choice(4, p=self.grids)))
        self.next += 1
        if self.dense_share and self.rng.random() < self.dense_share:
            return dense_scene(self.next * self.workers + self.worker)
        return generate(self.next * self.workers + self.worker, "train")


def triples_of(picture: Scene | Mosaic) -> list[Asked]:
    """The questions of a picture."""
    if isinstance(picture, Mosaic):
        return picture.questions()
    return [Asked(q.question, q.answer, q.type, q.evidence) for q in picture.questions]


def caption_of(picture: Scene | Mosaic) -> Asked:
    """A question whose answer lists all of a picture's contents in reading order.

    Every word is one step from a patch (a place leads to a colour, a colour to a shape), so
    captions teach the language model to look things up; questions take two such steps. Captions are
    kept apart from questions, which could otherwise be answered from the caption.
    """
    parts: list[str] = []
    if isinstance(picture, Mosaic):
        for k, photo in enumerate(picture.photos):
            parts.append(f"{1 + k // picture.g} {1 + k % picture.g} {photo.name}")
    else:
        for item in sorted(picture.objects, key=lambda o: o.region):
            parts.append(f"{REGIONS[item.region]} {item.color} {item.shape}")
        for text in sorted(picture.prints, key=lambda t: t.glyphs[0].y):
            if text.role == "value":
                parts.append(f"{text.key} {text.text}")
            elif text.role != "key":
                parts.append(f"{text.color} {text.role} {text.text}")
    return Asked("Describe the picture.", ", ".join(parts), "caption")


def window_of(picture: Scene | Mosaic, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A random window of 144 patches: (top row, left column, rows, columns).

    Pictures with texts mostly get a strip of the full width, so that no word is cut; others a
    square.
    """
    strip = isinstance(picture, Scene) and (bool(picture.prints) or rng.random() < 0.15)
    rows, cols = (6, 24) if strip else (12, 12)
    if isinstance(picture, Mosaic):  # aligned with a 2 x 2 mosaic, so each window is a photo
        step = {1: 1, 2: 12, 3: 4, 4: 6}[picture.g]
        top, left = (int(rng.integers(0, 12 // step + 1)) * step for _ in range(2))
        return top, left, rows, cols
    if strip and picture.prints and rng.random() < 0.8:  # mostly where there is text
        text = picture.prints[int(rng.integers(len(picture.prints)))]
        row = int(text.glyphs[len(text.glyphs) // 2].y // PATCH_SIZE)
        return min(max(row - int(rng.integers(1, 5)), 0), GRID - rows), 0, rows, cols
    return (
        int(rng.integers(0, GRID - rows + 1)),
        int(rng.integers(0, GRID - cols + 1)),
        rows,
        cols,
    )
