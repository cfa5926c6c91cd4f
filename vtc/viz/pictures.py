# SPDX-License-Identifier: Apache-2.0
"""How vtc opens pictures: as transformers' `load_image` does, and 16-bit ones without loss of tone.

A picture is turned as its EXIF data say and becomes RGB: palettes are looked up, CMYK is converted,
an alpha channel is left out (what it hid becomes visible, as with `load_image`). Grey pictures of
16 bits or more, which Pillow would clip to white, are scaled to 8.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

__all__ = ["PictureError", "as_rgb", "open_picture"]


class PictureError(ValueError):
    """A file that is no picture, or a damaged or an oversized one."""


def open_picture(source: str | os.PathLike[str] | bytes) -> Image.Image:
    """The picture in a file, or in the bytes of one, ready for a processor: RGB, upright.

    Args:
        source: a path, in which `~` is the home folder, or what is in the file.

    Raises:
        PictureError: says what is wrong with it, and with which file.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else Path(source).expanduser()
    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    if isinstance(file, Path) and not file.is_file():
        raise PictureError(f"{name}: {'is a folder' if file.is_dir() else 'no such file'}")
    try:
        with warnings.catch_warnings():
            # Between Pillow's limit and twice of it there is only a warning of it.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with _whole_files_only(), Image.open(file) as found:
                found.load()
                return as_rgb(found)
    except UnidentifiedImageError:
        raise PictureError(f"{name}: not a picture, or of a kind that Pillow cannot read") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = Image.MAX_IMAGE_PIXELS
        raise PictureError(
            f"{name}: too large, with more than {limit:,} pixels; make it smaller first"
        ) from None
    except MemoryError:
        raise PictureError(f"{name}: too large for the memory") from None
    except PermissionError:
        raise PictureError(f"{name}: no permission to read it") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        # What Pillow's readers raise for files that are cut off or overwritten.
        raise PictureError(f"{name}: damaged ({error})") from None


@contextmanager
def _whole_files_only() -> Iterator[None]:
    """Libraries (lmms-eval among them) have Pillow fill what a cut-off file lacks with grey."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def as_rgb(picture: Image.Image) -> Image.Image:
    """A picture in memory as `open_picture` would have opened it; a copy unless it is so already.

    Raises:
        PictureError: its pixels are no numbers.
    """
    upright = ImageOps.exif_transpose(picture)
    if upright.mode == "F" or upright.mode.startswith("I"):
        return Image.fromarray(_eight_bits(upright)).convert("RGB")
    return upright.convert("RGB")


def _eight_bits(picture: Image.Image) -> np.ndarray:
    """(h, w) uint8 of a picture of 16 or 32 bits, by the range that its numbers have."""
    values = np.asarray(picture).astype(np.float64)
    if not np.isfinite(values).all():
        raise PictureError("its pixels are not all finite numbers")
    highest = float(values.max(initial=0.0))
    if picture.mode.startswith("I;16"):
        full = 65535.0
    elif picture.mode == "F" and highest <= 1.0:
        full = 1.0
    else:  # the mode has no range of its own
        full = next((top for top in (255.0, 65535.0) if highest <= top), highest)
    return (values.clip(0.0) * (255.0 / full)).round().astype(np.uint8)
