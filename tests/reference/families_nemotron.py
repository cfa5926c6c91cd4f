# SPDX-License-Identifier: Apache-2.0
"""More of `tests.reference.families`: Nemotron 3 Nano Omni."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import transformers as hf

from tests.reference.families import (
    BOS,
    END,
    IMAGE,
    LAYERS,
    PAD,
    START,
    TAG,
    VOCABULARY,
    Piece,
    TinyFamily,
    cells,
    long,
    marks,
    pixels,
    register,
)


class NemotronOmni(TinyFamily):
    name = model_type = "nemotron_h_omni"
    model_class = "NemotronH_Omni_Reasoning_V3"
    has_video = True
    patch = 7
    grids: ClassVar = ((4, 5), (3, 6), (4, 4))
    layouts: ClassVar = {
        # Clips have the placeholders of images; all of a batch have one size and length.
        "video": ((2, "video0", 7), (4, "video1", 3), (1, "video0", 4, "video1", 3))
    }
    notes = (
        "layers 0 and 3 are Mamba-2, 1 and 4 feed-forwards; no positions; the tower takes the "
        "patches of all images in one sequence, 2x2 of which make a token"
    )

    def config(self) -> Any:
        kinds = ["linear_attention", "mlp", "full_attention"]
        kinds += ["linear_attention", "moe", "full_attention"]
        assert len(kinds) == LAYERS
        return hf.NemotronH_Omni_Reasoning_V3_Config(
            vision_config={
                "model_type": "radio",
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "mlp_ratio": 1.5,
                "patch_size": self.patch,
                "max_img_size": 8 * self.patch,
                "num_cls_tokens": 2,
                "num_registers": 1,
                "video_temporal_patch_size": 2,
            },
            text_config={
                "model_type": "nemotron_h",
                "vocab_size": VOCABULARY,
                "hidden_size": 32,
                "layers_block_type": kinds,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "intermediate_size": 48,
                "mamba_num_heads": 4,
                "mamba_head_dim": 8,
                "n_groups": 2,
                "ssm_state_size": 8,
                "chunk_size": 16,
                # Prefill bounds steps from below and decoding does not: none are so small.
                "time_step_min": 1e-6,
                "time_step_floor": 0.05,
                "time_step_max": 0.5,
                # As for qwen3_5: the norm behind the state blows up rounding.
                "layer_norm_epsilon": 1e-2,
                "n_routed_experts": 4,
                "moe_intermediate_size": 24,
                "moe_shared_expert_intermediate_size": 24,
                "pad_token_id": PAD,
                "bos_token_id": BOS,
                "eos_token_id": None,
            },
            projector_hidden_size=48,
            vision_hidden_size=32,
            image_token_id=IMAGE,
        )

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        rows, columns = self.grids[which]
        tokens = [*marks(START, kind="text"), *cells(rows, columns), *marks(END, kind="text")]
        patches = pixels(generator, 4 * rows * columns, 3 * self.patch**2)
        grid = long(2 * rows, 2 * columns)
        return Piece(tokens, {"pixel_values": patches, "image_grid_hw": grid})

    def video(self, which: int, generator: torch.Generator) -> Piece:
        frames, rows, columns = 2, 3, 4
        tokens: list[Any] = []
        for f in range(frames):
            tokens += marks(TAG + 1 + f, START, kind="text")
            tokens += [*cells(rows, columns, frame=f), *marks(END, kind="text")]
        height, width = 2 * rows * self.patch, 2 * columns * self.patch
        clip = pixels(generator, 1, frames, 6, height, width)
        return Piece(tokens, {"pixel_values_videos": clip}, video=True)


register(NemotronOmni())
