# SPDX-License-Identifier: Apache-2.0
"""Pictures are opened as by transformers' `load_image`, and 16-bit ones keep their tones."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from vtc.viz.pictures import PictureError, as_rgb, open_picture


def gradient(mode: str = "RGB") -> Image.Image:
    rows, columns = np.mgrid[0:24, 0:32]
    rgb = np.stack([columns * 8, rows * 10, 255 - columns * 8], axis=2).astype(np.uint8)
    return Image.fromarray(rgb).convert(mode)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def files(folder: Path) -> dict[str, Path]:
    """One file of each kind, by name."""
    found = {}
    for orientation in range(1, 9):
        path = found[f"exif{orientation}"] = folder / f"turned{orientation}.jpg"
        gradient().save(path, exif=turned(orientation), quality=95)
    found["png_exif"] = folder / "turned.png"
    gradient().save(found["png_exif"], exif=turned(6))
    for mode, suffix in (("L", "png"), ("P", "png"), ("P", "gif"), ("CMYK", "jpg"), ("1", "png")):
        path = found[f"{mode}.{suffix}"] = folder / f"{mode}.{suffix}"
        gradient(mode).save(path)
    hidden = gradient("RGBA")
    hidden.putalpha(Image.linear_gradient("L").resize(hidden.size))
    for suffix in ("png", "webp"):
        found[f"RGBA.{suffix}"] = folder / f"alpha.{suffix}"
        hidden.save(found[f"RGBA.{suffix}"], lossless=True)
    found["LA"] = folder / "la.png"
    hidden.convert("LA").save(found["LA"])
    found["P_transparent"] = folder / "transparent.png"
    gradient("P").save(found["P_transparent"], transparency=3)
    return found


def test_pictures_are_those_of_load_image(tmp_path):
    for name, path in files(tmp_path).items():
        own, other = open_picture(path), load_image(str(path))
        assert (own.mode, own.size) == (other.mode, other.size) == ("RGB", other.size), name
        assert np.array_equal(np.asarray(own), np.asarray(other)), name
        assert own.getexif().get(0x0112, 1) == 1, name
    sideways, upright = open_picture(tmp_path / "turned6.jpg"), gradient()
    assert sideways.size == upright.size[::-1]


def test_what_is_in_memory_is_treated_alike(tmp_path):
    path = files(tmp_path)["exif6"]
    from_bytes, in_memory = open_picture(path.read_bytes()), as_rgb(Image.open(path))
    for found in (from_bytes, in_memory):
        assert np.array_equal(np.asarray(found), np.asarray(open_picture(path)))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_pictures_of_16_bits_keep_their_tones(tmp_path, suffix):
    tones = np.linspace(0, 65535, 32 * 24).reshape(24, 32).round().astype(np.uint16)
    path = tmp_path / f"grey.{suffix}"
    Image.fromarray(tones).save(path)
    found = np.asarray(open_picture(path), dtype=int)
    assert np.abs(found[..., 0] - tones / 257).max() <= 0.5
    assert len(np.unique(found)) == 256
    # A dark one is not stretched: its file says what white is.
    Image.fromarray(tones // 4).save(path)
    assert np.asarray(open_picture(path)).max() == 64


@pytest.mark.parametrize(
    ("values", "top"),
    [
        (np.array([[0, 128, 255]], dtype=np.int32), [0, 128, 255]),
        (np.array([[0, 257, 65535]], dtype=np.int32), [0, 1, 255]),
        (np.array([[0, 70000, 140000]], dtype=np.int32), [0, 128, 255]),
        (np.array([[0.0, 0.5, 1.0]], dtype=np.float32), [0, 128, 255]),
        (np.array([[-3.0, 100.0, 255.0]], dtype=np.float32), [0, 100, 255]),
    ],
)
def test_pictures_of_32_bits_are_scaled_by_their_range(values, top):
    assert np.asarray(as_rgb(Image.fromarray(values)))[0, :, 0].tolist() == top


def test_pixels_that_are_no_numbers_are_refused():
    with pytest.raises(PictureError, match="not all finite"):
        as_rgb(Image.fromarray(np.array([[0.0, np.nan]], dtype=np.float32)))


# ---- files that cannot be opened ----------------------------------------------------------------
def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_files_that_are_cut_off_are_named(tmp_path, kind, share):
    whole = encoded(kind)
    path = tmp_path / "cut.png"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(PictureError, match=r"cut.png: (damaged|not a picture)"):
        open_picture(path)


def test_files_that_are_overwritten_are_named(tmp_path):
    rng, whole = np.random.default_rng(0), bytearray(encoded("PNG"))
    path = tmp_path / "broken.png"
    refused = 0
    for _ in range(60):
        broken = bytearray(whole)
        for place in rng.integers(8, len(whole), 6):
            broken[place] ^= int(rng.integers(1, 256))
        path.write_bytes(bytes(broken))
        try:
            open_picture(path)
        except PictureError as error:
            refused += "broken.png: " in str(error)
    assert refused > 30


@pytest.mark.parametrize("limit", [32 * 24 - 1, 32 * 24 // 3], ids=["warning", "error"])
def test_oversized_pictures_are_refused(tmp_path, monkeypatch, limit):
    path = tmp_path / "large.png"
    gradient().save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(PictureError, match=r"large.png: too large, with more than"):
            open_picture(path)


def test_what_is_not_there_is_said(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("text")
    for name, message in (
        ("text.png", "not a picture"),
        ("absent.png", "no such file"),
        ("", "is a folder"),
    ):
        with pytest.raises(PictureError, match=message):
            open_picture(tmp_path / name)
    monkeypatch.setenv("HOME", str(tmp_path))
    gradient().save(tmp_path / "home.png")
    assert open_picture("~/home.png").size == (32, 24)
