# SPDX-License-Identifier: Apache-2.0
"""More of `tests.reference.families`: Phi-4 multimodal."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from tests.reference.families import (
    END,
    IMAGE,
    START,
    TAG,
    Piece,
    TinyFamily,
    long,
    marks,
    pixels,
    register,
    text_settings,
    vision_settings,
)


class Phi4Multimodal(TinyFamily):
    model_type = "phi4_multimodal"
    model_class = "Phi4MultimodalForCausalLM"
    tiling = (((1, 2), (3, 5)), ((2, 1), (5, 2)), ((1, 1), (2, 3)))
    """By size: rows and columns of tiles, and of the tokens that are not padding. All have some:
    where none of a batch has, sdpa makes no mask, and the tower of transformers turns causal."""

    def __init__(self, name: str, patches: int) -> None:
        self.name, self.patches = name, patches
        self.side = (patches + 1) // 2
        self.notes = (
            "the base model is the decoder; tiles in one plane, without its padding, then the "
            f"thumbnail; a feature ends each row, one lies between; {patches} patches a side"
        )

    def config(self) -> Any:
        size = 7 * self.patches
        return hf.Phi4MultimodalConfig(
            **text_settings() | {"eos_token_id": END},
            vision_config={
                **vision_settings(size),
                "num_hidden_layers": 3,
                "crop_size": size,
                "image_token_id": IMAGE,
                "feature_layer": -2,
            },
            audio_config={
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_blocks": 1,
                "num_attention_heads": 2,
                "ext_pw_out_channel": 16,
                "depthwise_separable_out_channel": 16,
                "nemo_conv_channels": 16,
                "audio_token_id": TAG,
            },
        )

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        (down, across), (rows, columns) = self.tiling[which]
        side, patches = self.side, self.patches
        tokens: list[Any] = marks(START, kind="text")
        for r in range(rows):
            for c in range(columns):
                tokens.append((IMAGE, (0, r, c, r // side * across + c // side + 1)))
            tokens += marks(IMAGE)
        tokens += marks(IMAGE)
        for r in range(side):
            tokens += [(IMAGE, (0, r, c, 0)) for c in range(side)]
            tokens += marks(IMAGE)
        tokens += marks(END, kind="text")
        seen = torch.zeros(down, across, patches, patches)
        for tile_row in range(down):
            for tile_column in range(across):
                height = min(max(rows - tile_row * side, 0) * 2, patches)
                width = min(max(columns - tile_column * side, 0) * 2, patches)
                seen[tile_row, tile_column, :height, :width] = 1
        tiles = 1 + down * across
        mask = torch.cat([torch.ones(1, patches, patches), seen.flatten(0, 1)])
        size = 7 * patches
        extras = {
            "image_pixel_values": pixels(generator, 1, tiles, 3, size, size),
            "image_sizes": long(down * size, across * size),
            "image_attention_mask": mask[None],
        }
        return Piece(tokens, extras)


register(Phi4Multimodal("phi4_multimodal", 6), Phi4Multimodal("phi4_multimodal_odd", 5))
