# SPDX-License-Identifier: Apache-2.0
"""Functions of vtc's task files on their rows (id, image, question, answer, type).

This file is copied next to the data, so it does not import vtc.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageOps


def doc_to_visual(doc: Mapping[str, Any]) -> list[Image.Image]:
    """The image, decoded by `datasets` or from its bytes."""
    image = doc["image"]
    if not isinstance(image, Image.Image):
        image = Image.open(io.BytesIO(image["bytes"]))
    return [ImageOps.exif_transpose(image).convert("RGB")]


def doc_to_text(
    doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, str] | None = None
) -> str:
    """The question, and the instruction on the answer's form."""
    options = lmms_eval_specific_kwargs or {}
    return f"{options.get('pre_prompt', '')}{doc['question']}{options.get('post_prompt', '')}"
