# SPDX-License-Identifier: Apache-2.0
"""Opens pictures as `load_image` of transformers does, but keeps the tones of 16-bit pictures.

A picture is rotated by its EXIF orientation and converted to RGB: palettes are resolved, CMYK is
converted, and an alpha channel is discarded (hidden pixels become visible, as with `load_image`).
Grey pictures of 16 bits or more, which Pillow would clip to white, are scaled to 8 bits.
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
    """The file is not a picture, or it is damaged or too large."""


def open_picture(source: str | os.PathLike[str] | bytes) -> Image.Image:
    """Open a picture for a processor: RGB and upright.

    Args:
        source: a path, in which `~` is the home folder, or the bytes of a file.

    Returns:
        The picture, RGB and upright.

    Raises:
        PictureError: the picture cannot be opened; the message names the file and the reason.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else Path(source).expanduser()
    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    if isinstance(file, Path) and not file.is_file():
        raise PictureError(f"{name}: {'is a folder' if file.is_dir() else 'no such file'}")
    try:
        with warnings.catch_warnings():
            # Between its limit and twice that, Pillow only warns.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with _whole_files_only(), Image.open(file) as found:
                found.load()
                return as_rgb(found)
    except UnidentifiedImageError:
        raise PictureError(
            f"{name}: not a picture, or in a format that Pillow cannot read"
        ) from None
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
    """Refuse truncated files, which libraries such as lmms-eval let Pillow fill with grey."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def as_rgb(picture: Image.Image) -> Image.Image:
    """Convert a picture in memory as `open_picture` does.

    Args:
        picture: in any mode.

    Returns:
        The picture, RGB and upright.

    Raises:
        PictureError: its pixels are not all finite numbers.
    """
    upright = ImageOps.exif_transpose(picture)
    if upright.mode == "F" or upright.mode.startswith("I"):
        return Image.fromarray(_eight_bits(upright)).convert("RGB")
    return upright.convert("RGB")


def _eight_bits(picture: Image.Image) -> np.ndarray:
    """(h, w) uint8 of a 16-bit or 32-bit picture, scaled by the range of its values."""
    values = np.asarray(picture).astype(np.float64)
    if not np.isfinite(values).all():
        raise PictureError("its pixels are not all finite numbers")
    highest = float(values.max(initial=0.0))
    if picture.mode.startswith("I;16"):
        full = 65535.0
    elif picture.mode == "F" and highest <= 1.0:
        full = 1.0
    else:  # the mode does not define a range
        full = next((top for top in (255.0, 65535.0) if highest <= top), highest)
    return (values.clip(0.0) * (255.0 / full)).round().astype(np.uint8)
