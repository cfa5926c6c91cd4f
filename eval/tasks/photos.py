# SPDX-License-Identifier: Apache-2.0
"""The photo set: photographs, mosaics of them, and questions.

The photographs are not part of the project. `VTC_DATA` names their folder, by default `shared/data`
beside the project; without either, `data_folder` returns `None`. Training questions use training
photos only; dev rows are only for evaluation.
"""

from __future__ import annotations

import functools
import json
import os
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from vtc.core.settings import check_choice
from vtc.viz.pictures import open_picture

from ..embedded.scenes.labels import COLOR_INDEX, IMAGE_SIZE, empty_labels, label_tile
from ..embedded.scenes.parts import Box
from ..embedded.scenes.questions import Asked, Question

PHOTO_SIZE = 160
PHOTO_SETS: tuple[str, ...] = ("photo", "mosaic", "multi", "clip", "receipt")


def data_folder() -> Path | None:
    """The folder of the photo set, or `None` if there is none."""
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("VTC_DATA") or default)
    return folder if (folder / "photos_train.jsonl").is_file() else None


def require_data_folder() -> Path:
    """The folder of the photo set.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = data_folder()
    if folder is None:
        raise FileNotFoundError(
            "the photo set is not here: set VTC_DATA to the folder that holds photos.zip and "
            "photos_train.jsonl (the generated task vtc_scenes needs no data)"
        )
    return folder


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a jsonl file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


class Archive:
    """Pictures in a zip file, decoded on demand and cached."""

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path)
        self._read = functools.lru_cache(maxsize=4096)(self._decode)

    def _decode(self, name: str) -> Image.Image:
        return open_picture(self._zip.read(name))

    def __getitem__(self, name: str) -> Image.Image:
        return self._read(name)


def draw_mosaic(tiles: list[Image.Image], g: int) -> Image.Image:
    """A g x g mosaic of `tiles`, row by row, 336 x 336 pixels."""
    side = IMAGE_SIZE // g
    canvas = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE))
    for k, tile in enumerate(tiles):
        picture = tile.resize((side, side), Image.Resampling.BICUBIC)
        canvas.paste(picture, ((k % g) * side, (k // g) * side))
    return canvas


def dev_rows(name: str, split: str = "dev") -> Iterator[tuple[Question, list[Image.Image]]]:
    """Questions of a photo set with their pictures, in file order.

    A mosaic is one picture of 336 x 336 pixels; photos, frames and receipts are unchanged.

    Args:
        name: one of `PHOTO_SETS`.
        split: suffix of the file of rows, such as "dev".

    Raises:
        ValueError: unknown set.
    """
    check_choice("name", name, PHOTO_SETS)
    folder = require_data_folder()
    archive = Archive(folder / ("receipts.zip" if name == "receipt" else "photos.zip"))
    for row in read_rows(folder / f"{name}_{split}.jsonl"):
        question = Question(row["id"], row["question"], row["answer"], row["type"])
        if "grid" in row:
            yield question, [draw_mosaic([archive[k] for k in row["grid"]], row["g"])]
        else:
            yield question, [archive[k] for k in row.get("images") or row["frames"]]


@dataclass(frozen=True)
class Photo:
    """A training photo: the index of its pixels, and what it shows."""

    index: int
    name: str
    kind: str
    color: str
    brand: str


class PhotoLibrary:
    """The training photos, decoded once into a memory-mapped array next to `cache`."""

    def __init__(self, cache: Path) -> None:
        folder = require_data_folder()
        rows = read_rows(folder / "photos_train.jsonl")
        self.photos = [
            Photo(i, r["name"], r["kind"], r.get("color", ""), r.get("brand", ""))
            for i, r in enumerate(rows)
        ]
        self.names = sorted({p.name for p in self.photos})
        self.kinds = sorted({p.kind for p in self.photos})
        self.brands = sorted({p.brand for p in self.photos if p.brand})
        self.by_name = {n: [p for p in self.photos if p.name == n] for n in self.names}
        frequency = np.array([len(self.by_name[n]) for n in self.names], dtype=np.float64)
        self.weights = frequency**0.6 / (frequency**0.6).sum()
        self.pixels = self._pixels(folder, rows, cache / "photos_train.npy")

    @staticmethod
    def _pixels(folder: Path, rows: list[dict[str, Any]], path: Path) -> np.ndarray:
        """(photos, 160, 160, 3) uint8 pixels."""
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            archive = Archive(folder / "photos.zip")
            pixels = np.stack([np.asarray(archive[r["image"]]) for r in rows])
            temporary = path.with_suffix(f".{os.getpid()}.npy")
            np.save(temporary, pixels)
            temporary.replace(path)
        return np.load(path, mmap_mode="r")

    def sample(self, rng: np.random.Generator, g: int) -> Mosaic:
        """A g x g mosaic of random photos, with rare names over-sampled."""
        names = [self.names[i] for i in rng.choice(len(self.names), size=g * g, p=self.weights)]
        if g > 1 and rng.random() < 0.4:  # repeat a name, for counts above one
            for i in rng.permutation(g * g)[: int(rng.integers(1, 1 + g * g // 2))].tolist():
                names[i] = names[0]
            names = [names[i] for i in rng.permutation(g * g).tolist()]
        photos = [self.by_name[n][int(rng.integers(len(self.by_name[n])))] for n in names]
        return Mosaic(self, g, tuple(photos), int(rng.integers(2**31)))


@dataclass(frozen=True)
class Mosaic:
    """A training picture of g x g photos (one photo if g = 1), with labels and questions."""

    library: PhotoLibrary
    g: int
    photos: tuple[Photo, ...]
    seed: int

    def pixels(self) -> np.ndarray:
        """(336, 336, 3) uint8; every photo is randomly cropped, flipped and toned."""
        rng = np.random.default_rng(self.seed)
        tiles = [_augmented(self.library.pixels[p.index], rng) for p in self.photos]
        return np.asarray(draw_mosaic(tiles, self.g))

    @property
    def labels(self) -> np.ndarray:
        """(fields, 24, 24) uint8 dense labels."""
        labels = empty_labels()
        for k, photo in enumerate(self.photos):
            label_tile(
                labels,
                self.g,
                k // self.g,
                k % self.g,
                1 + self.library.names.index(photo.name),
                1 + self.library.brands.index(photo.brand) if photo.brand else 0,
                1 + self.library.kinds.index(photo.kind),
                COLOR_INDEX[photo.color] if photo.color else 0,
            )
        return labels

    def questions(self) -> list[Asked]:
        """Questions in the wording of the dev rows, in random order."""
        rng = np.random.default_rng([self.seed, 1])
        triples = self._on_photo() if self.g == 1 else self._on_mosaic(rng)
        return [triples[i] for i in rng.permutation(len(triples)).tolist()]

    def _on_photo(self) -> list[Asked]:
        photo = self.photos[0]
        whole = ((0.0, 0.0, float(IMAGE_SIZE), float(IMAGE_SIZE)),)
        triples = [Asked("What is shown in the photo?", photo.name, "name", whole)]
        for what in ("color", "brand", "kind"):
            answer = getattr(photo, what)
            if answer:
                question = f"What is the {what} of the item?"
                triples.append(Asked(question, answer, "attribute", whole))
        return triples

    def _on_mosaic(self, rng: np.random.Generator) -> list[Asked]:
        names = [p.name for p in self.photos]
        counts = Counter(names)
        present, pairs = sorted(counts), []
        weights = self.library.weights
        for _ in range(2):
            pairs.append((present[int(rng.integers(len(present)))], "yes"))
            while (
                absent := self.library.names[int(rng.choice(len(weights), p=weights))]
            ) in counts:
                pass
            pairs.append((absent, "no"))
        asked = [
            Asked(f"Does any tile mainly show {name}?", answer, "existence", self._tiles(name))
            for name, answer in pairs
        ]
        for k in rng.permutation(len(names))[:4].tolist():
            row, column = 1 + k // self.g, 1 + k % self.g
            question = f"What is in row {row}, column {column}?"
            asked.append(Asked(question, names[k], "locate", (self._tile(k),)))
        by_count: dict[int, list[str]] = {}
        for name, count in counts.items():
            by_count.setdefault(count, []).append(name)
        for count in rng.permutation(sorted(by_count))[:2].tolist():
            name = by_count[count][int(rng.integers(len(by_count[count])))]
            question = f"How many tiles mainly show {name}?"
            asked.append(Asked(question, str(count), "count", self._tiles(name)))
        return asked

    def _tile(self, k: int) -> Box:
        side = IMAGE_SIZE / self.g
        left, top = k % self.g * side, k // self.g * side
        return left, top, left + side, top + side

    def _tiles(self, name: str) -> tuple[Box, ...]:
        return tuple(self._tile(k) for k, photo in enumerate(self.photos) if photo.name == name)


def _augmented(pixels: np.ndarray, rng: np.random.Generator) -> Image.Image:
    side = float(rng.uniform(0.62, 1.0)) * PHOTO_SIZE
    aspect = float(np.exp(rng.uniform(-0.15, 0.15)))
    width, height = min(side * aspect, PHOTO_SIZE), min(side / aspect, PHOTO_SIZE)
    left, top = rng.uniform(0, PHOTO_SIZE - width), rng.uniform(0, PHOTO_SIZE - height)
    picture = Image.fromarray(pixels)
    picture = picture.transform(
        (PHOTO_SIZE, PHOTO_SIZE),
        Image.Transform.EXTENT,
        (left, top, left + width, top + height),
        Image.Resampling.BILINEAR,
    )
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for enhance, spread in (
        (ImageEnhance.Brightness, 0.3),
        (ImageEnhance.Contrast, 0.25),
        (ImageEnhance.Color, 0.25),
    ):
        picture = enhance(picture).enhance(float(rng.uniform(1 - spread, 1 + spread)))
    return picture
