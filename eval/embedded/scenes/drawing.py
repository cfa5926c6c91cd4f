# SPDX-License-Identifier: Apache-2.0
"""Backgrounds, clutter and shapes, drawn with Pillow and NumPy."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "moon")

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (212, 34, 38),
    "green": (34, 148, 58),
    "blue": (36, 74, 214),
    "yellow": (244, 222, 48),
    "orange": (246, 138, 24),
    "purple": (134, 44, 168),
    "white": (250, 250, 250),
    "black": (16, 16, 16),
}
"""Colour names and their central RGB values, which scenes jitter slightly."""

_SUPERSAMPLING = 3


def _noise(rng: np.random.Generator, size: int, cells: int, channels: int) -> np.ndarray:
    """(size, size, channels) smooth noise of about unit variance."""
    coarse = rng.standard_normal((cells, cells, channels)).astype(np.float32)
    layers = [
        np.asarray(Image.fromarray(coarse[:, :, c]).resize((size, size), Image.Resampling.BICUBIC))
        for c in range(channels)
    ]
    return np.stack(layers, axis=-1)


def background(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 3) float textured background in mid tones of low saturation.

    Mid tones, so that white and black objects stand out like coloured ones.
    """
    tone = rng.uniform(95, 190) + rng.uniform(-16, 16, 3)
    canvas = np.empty((size, size, 3), dtype=np.float32)
    canvas[:] = tone
    canvas += rng.uniform(3, 14) * _noise(rng, size, int(rng.integers(2, 18)), 1)
    if rng.random() < 0.5:
        canvas += rng.uniform(2, 8) * _noise(rng, size, int(rng.integers(2, 10)), 3)
    kind = rng.integers(0, 5)
    yy, xx = np.mgrid[0:size, 0:size].astype(np.float32)
    if kind == 0:  # stripes
        angle = rng.uniform(0, math.pi)
        wave = np.sin(
            (xx * math.cos(angle) + yy * math.sin(angle)) * 2 * math.pi / rng.uniform(9, 60)
        )
        canvas += rng.uniform(3, 11) * wave[..., None]
    elif kind == 1:  # checks
        cell = int(rng.integers(12, 60))
        canvas += rng.uniform(3, 10) * (((xx // cell + yy // cell) % 2) * 2 - 1)[..., None]
    elif kind == 2:  # a light gradient
        angle = rng.uniform(0, 2 * math.pi)
        slope = (xx * math.cos(angle) + yy * math.sin(angle)) / size
        canvas += rng.uniform(10, 40) * (slope - slope.mean())[..., None]
    if rng.random() < 0.6:  # grain, at half resolution to stay cheap
        grain = rng.standard_normal((size // 2, size // 2, 1)).astype(np.float32)
        canvas += rng.uniform(1, 7) * grain.repeat(2, 0).repeat(2, 1)
    return canvas


def clutter(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Add thin grey strokes and specks that belong to no object; returns a new canvas."""
    size = canvas.shape[0]
    picture = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(0, 9))):
        tone = tuple(int(v) for v in rng.uniform(80, 200) + rng.uniform(-12, 12, 3))
        x, y = rng.uniform(0, size, 2)
        if rng.random() < 0.5:
            angle, length = rng.uniform(0, math.pi), rng.uniform(20, 150)
            end = (x + length * math.cos(angle), y + length * math.sin(angle))
            draw.line([(x, y), end], fill=tone, width=int(rng.integers(1, 3)))
        else:
            r = rng.uniform(1, 3.5)
            draw.ellipse([x - r, y - r, x + r, y + r], fill=tone)
    return np.asarray(picture).astype(np.float32)


def _turned(points: list[tuple[float, float]], angle: float) -> list[tuple[float, float]]:
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return [(x * cos + y * sin, -x * sin + y * cos) for x, y in points]


def shape_mask(shape: str, radius: float, angle: float) -> np.ndarray:
    """(side, side) coverage in [0, 1] of a centred shape within `radius` pixels."""
    half = math.ceil(radius) + 2
    scale = radius * _SUPERSAMPLING
    middle = half * _SUPERSAMPLING
    picture = Image.new("L", (2 * middle, 2 * middle), 0)
    draw = ImageDraw.Draw(picture)

    def polygon(points: list[tuple[float, float]]) -> None:
        turned = _turned(points, angle)
        draw.polygon([(middle + scale * x, middle + scale * y) for x, y in turned], fill=255)

    def disc(x: float, y: float, r: float, fill: int) -> None:
        ((cx, cy),) = _turned([(x, y)], angle)
        box = [cx - r, cy - r, cx + r, cy + r]
        draw.ellipse([middle + scale * v for v in box], fill=fill)

    if shape == "circle":
        disc(0, 0, 0.92, 255)
    elif shape == "ring":
        disc(0, 0, 0.95, 255)
        disc(0, 0, 0.56, 0)
    elif shape == "moon":
        disc(0, 0, 0.97, 255)
        disc(0.46, -0.05, 0.78, 0)
    elif shape == "square":
        polygon([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)])
    elif shape == "triangle":
        polygon([(0, -0.98), (0.92, 0.68), (-0.92, 0.68)])
    elif shape == "cross":
        a, b = 0.31, 0.93
        polygon(
            [
                *[(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a)],
                *[(a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)],
            ]
        )
    elif shape == "star":
        polygon(
            [
                (r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5))
                for k in range(10)
                for r in (1.0 if k % 2 == 0 else 0.42,)
            ]
        )
    elif shape == "heart":
        ts = [2 * math.pi * k / 48 for k in range(48)]
        polygon(
            [
                (
                    16 * math.sin(t) ** 3 / 17,
                    -(
                        13 * math.cos(t)
                        - 5 * math.cos(2 * t)
                        - 2 * math.cos(3 * t)
                        - math.cos(4 * t)
                    )
                    / 17,
                )
                for t in ts
            ]
        )
    else:
        raise ValueError(f"unknown shape {shape!r}")
    return np.asarray(picture.reduce(_SUPERSAMPLING), dtype=np.float32) / 255


def paint(
    canvas: np.ndarray, mask: np.ndarray, x: float, y: float, color: np.ndarray, shade: float
) -> None:
    """Paint a shape onto a canvas, in place.

    Args:
        canvas: (H, W, 3) float.
        mask: (side, side) coverage.
        x, y: centre, in pixels.
        color: (3,) RGB.
        shade: difference in tone between top and bottom of the shape.
    """
    side = mask.shape[0]
    top, left = round(y - side / 2), round(x - side / 2)
    height, width = canvas.shape[:2]
    y0, y1 = max(top, 0), min(top + side, height)
    x0, x1 = max(left, 0), min(left + side, width)
    if y0 >= y1 or x0 >= x1:
        return
    alpha = mask[y0 - top : y1 - top, x0 - left : x1 - left, None]
    ramp = (np.linspace(-0.5, 0.5, side, dtype=np.float32) * shade)[y0 - top : y1 - top, None, None]
    canvas[y0:y1, x0:x1] += alpha * (color + ramp - canvas[y0:y1, x0:x1])
