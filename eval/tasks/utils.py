# SPDX-License-Identifier: Apache-2.0
"""What the task files ask of each row (id, image, question, answer, type) of a task of vtc.

This file is copied beside the data, so it imports nothing of vtc.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageOps


def doc_to_visual(doc: Mapping[str, Any]) -> list[Image.Image]:
    """The image, decoded by `datasets` or still as the bytes it is stored as."""
    image = doc["image"]
    if not isinstance(image, Image.Image):
        image = Image.open(io.BytesIO(image["bytes"]))
    return [ImageOps.exif_transpose(image).convert("RGB")]


def doc_to_text(
    doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, str] | None = None
) -> str:
    """The question, and what is to be asked of the model's answer."""
    options = lmms_eval_specific_kwargs or {}
    return f"{options.get('pre_prompt', '')}{doc['question']}{options.get('post_prompt', '')}"
