# SPDX-License-Identifier: Apache-2.0
"""Asks a model about one image and records the tokens that each stage keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vtc.core import Method
from vtc.core.errors import ArgumentError
from vtc.patching import patch
from vtc.viz.pictures import as_rgb
from vtc.viz.record import TokenRecord
from vtc.viz.views import View, as_pictures, cropped, pixels_of, views_of

__all__ = ["Trace", "trace", "traced", "views"]


@dataclass(frozen=True)
class Trace:
    """The kept tokens of an image, by stage, and the answers.

    Attributes:
        views: the image with its tokens; for a tiled image the plane of tiles and the thumbnail.
        answer, answer_full: with the method, and with all tokens.
        note: the part of the picture that the model did not see, in words, or `None`.
    """

    views: list[View]
    answer: str
    answer_full: str
    note: str | None = None

    @property
    def image(self) -> Image.Image:
        """The vision tower's input in the first view."""
        return self.views[0].image

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the first view's cells."""
        return self.views[0].grid

    @property
    def kept(self) -> dict[str, list[int]]:
        """By stage, the row-major numbers of the kept tokens in the first view."""
        return self.views[0].kept

    @property
    def counts(self) -> dict[str, int]:
        """By stage, the number of kept tokens in all views."""
        return {stage: sum(len(v.kept[stage]) for v in self.views) for stage in self.kept}

    @property
    def total(self) -> int:
        """Number of tokens before compression, in all views."""
        return sum(len(view.cells) for view in self.views)


def views(
    record: TokenRecord,
    every: TokenRecord,
    inputs: Mapping[str, Any],
    model: Any,
    processor: Any,
    picture: Image.Image,
) -> list[View]:
    """The views to draw for a prompt with one picture.

    Args:
        record: of a run with the method.
        every: of a run with all tokens.
        inputs: of the model.
        processor: of the model.

    Raises:
        ValueError: the tokens have no places in the picture.
    """
    vision = getattr(model.config, "vision_config", None)
    size = getattr(vision, "patch_size", None)
    pixels = pixels_of(inputs)
    places = every.places(pixels, size if isinstance(size, int) else None)
    tiles = None if pixels is None else as_pictures(pixels, processor.image_processor)
    return views_of(places, record.among(every), picture, tiles)


def trace(
    model: str,
    picture: Image.Image,
    question: str,
    method: Method,
    device: str | None = None,
    max_new_tokens: int = 24,
) -> Trace:
    """Ask `model`, a folder or an id on the hub, about `picture`, twice.

    Raises:
        OSError: no such model.
        ArgumentError: a method that acts on pixels, and so drops no tokens, or a model whose tokens
            have no places in the picture.
        PictureError: `picture` cannot be made RGB.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if Path(model).expanduser().is_dir():
        model = str(Path(model).expanduser())
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    processor = AutoProcessor.from_pretrained(model)
    dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
    network: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype)
    network.to(device).eval()
    return traced(network, processor, picture, question, method, max_new_tokens)


def traced(
    network: Any,
    processor: Any,
    picture: Image.Image,
    question: str,
    method: Method,
    max_new_tokens: int = 24,
) -> Trace:
    """`trace` of a model that is loaded, with its processor."""
    if "pixels" in method.stages:
        raise ArgumentError(
            "method", f"{method} makes the image smaller; it drops no tokens to be shown"
        )
    picture = as_rgb(picture)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(images=[picture], text=[prompt], return_tensors="pt")
    inputs = inputs.to(network.device, network.dtype)

    def answer() -> str:
        out = network.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = out[0, inputs["input_ids"].shape[1] :]
        return str(processor.decode(new, skip_special_tokens=True)).strip()

    with torch.inference_mode():
        every, record = TokenRecord(), TokenRecord()
        # Nothing is dropped, which leaves the model as it is bit for bit.
        with patch(network, "full") as patched, patched.listen(every.hear):
            full = answer()
        with patch(network, method) as patched, patched.listen(record.hear):
            compressed = answer()
        shown = views(record, every, inputs, network, processor, picture)
    note = cropped(picture, processor.image_processor) if len(shown) == 1 else None
    return Trace(shown, compressed, full, note)
