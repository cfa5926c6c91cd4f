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
    """The kept tokens of an image by stage, and the answers.

    Attributes:
        views: the image with its tokens; for a tiled image, the plane of tiles and the thumbnail.
        answer, answer_full: the answer with the method, and with all tokens.
        note: which part of the picture the processor cropped, in words, or `None`.
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
        """Row-major numbers of the kept tokens in the first view, by stage."""
        return self.views[0].kept

    @property
    def counts(self) -> dict[str, int]:
        """Number of kept tokens in all views, by stage."""
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
        record: record of a run with the method.
        every: record of a run with all tokens.
        inputs: inputs of the model.
        model: the model.
        processor: its processor.
        picture: the picture in the prompt.

    Returns:
        One view, or those of the plane of tiles and the thumbnail.

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
    """Ask a model about a picture, with a method and with all tokens.

    Args:
        model: a folder, or an id on the hub.
        picture: in any mode.
        question: the question.
        method: the method to trace.
        device: "cpu", "cuda", "cuda:1"; `None` for a GPU if there is one.
        max_new_tokens: maximum length of the answers, in tokens.

    Returns:
        The kept tokens by stage, and both answers.

    Raises:
        OSError: no such model.
        ArgumentError: the method acts on pixels, so it drops no tokens, or the model's tokens
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
    """`trace` with a loaded model.

    Args:
        network: the model, unpatched.
        processor: its processor.
        picture, question, method, max_new_tokens: as in `trace`.

    Returns:
        As `trace`.

    Raises:
        ValueError, PictureError: as in `trace`.
    """
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
        # Drops nothing: outputs are those of the plain model, bit for bit.
        with patch(network, "full") as patched, patched.listen(every.hear):
            full = answer()
        with patch(network, method) as patched, patched.listen(record.hear):
            compressed = answer()
        shown = views(record, every, inputs, network, processor, picture)
    note = cropped(picture, processor.image_processor) if len(shown) == 1 else None
    return Trace(shown, compressed, full, note)
