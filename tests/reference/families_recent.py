# SPDX-License-Identifier: Apache-2.0
"""More of `tests.reference.families`: HunYuan-VL."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor

from tests.reference.families import (
    END,
    IMAGE,
    START,
    TAG,
    Piece,
    cells,
    long,
    marks,
    pixels,
    register,
    text_settings,
    vision_settings,
)
from tests.reference.families_rest import Qwen2VL


class HunYuanVL(Qwen2VL):
    model_type = "hunyuan_vl"
    model_class = "HunYuanVLForConditionalGeneration"
    has_video = False

    def __init__(self, name: str, sections: list[int]) -> None:
        self.name, self.sections = name, sections
        counts = sections[-1] > 0
        # Norms behind the rotation make positions absolute, and text alone counts its padding.
        self.unstable = ("text", *(("ragged", "images", "mixed") if counts else ()))
        self.notes = (
            "features begin and end an image and end each of its rows; patches in raster order; "
            f"m-RoPE with {len(sections)} axes, of which the last counts the images of the whole "
            f"batch{'' if counts else ' and has no part of a head'}"
        )

    def config(self) -> Any:
        return hf.HunYuanVLConfig(
            vision_config=vision_settings(64, self.patch, max_image_size=64),
            text_config=text_settings(
                head_dim=8,
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": self.sections,
                },
            ),
            image_token_id=IMAGE,
            im_start_id=START,
            im_end_id=END,
            im_newline_id=TAG,
            tie_word_embeddings=False,
        )

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        rows, columns = self.grids[which]
        tokens = [*marks(START, kind="text"), *marks(IMAGE)]
        for r in range(rows):
            tokens += [(IMAGE, (0, r, c, None)) for c in range(columns)]
            tokens += marks(IMAGE)
        tokens += [*marks(IMAGE), *marks(END, kind="text")]
        extras = {
            "pixel_values": pixels(generator, 4 * rows * columns, 3 * self.patch**2),
            "image_grid_thw": long(1, 2 * rows, 2 * columns),
        }
        return Piece(tokens, extras)


register(
    HunYuanVL("hunyuan_vl", [1, 1, 2, 0]),
    HunYuanVL("hunyuan_vl_counting", [1, 1, 1, 1]),
)
