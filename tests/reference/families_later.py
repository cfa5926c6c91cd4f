# SPDX-License-Identifier: Apache-2.0
"""More of `tests.reference.families`: relatives of families that have their own files."""

from __future__ import annotations

from typing import Any

import transformers as hf

from tests.reference.families import register, text_settings
from tests.reference.families_rest import Glm4v, Qwen35


class Qwen35Moe(Qwen35):
    name = model_type = "qwen3_5_moe"
    model_class = "Qwen3_5MoeForConditionalGeneration"
    notes = Qwen35.notes + "; a mixture of experts"

    def config(self) -> Any:
        text = super().config().text_config.to_dict()
        del text["model_type"], text["intermediate_size"]
        more = {
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        }
        return hf.Qwen3_5MoeConfig(
            vision_config=self.vision(), text_config=text | more, **self.tokens()
        )


class GlmOcr(Glm4v):
    name = model_type = "glm_ocr"
    model_class = "GlmOcrForConditionalGeneration"
    notes = Glm4v.notes + "; norms in the tower's attention, no position embeddings"

    def config(self) -> Any:
        return hf.GlmOcrConfig(
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "out_hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 4,
                "patch_size": self.patch,
                "image_size": 32,
            },
            text_config=text_settings(
                head_dim=16, rope_parameters=self.rope(partial_rotary_factor=0.5)
            ),
            **self.marks(),
        )


register(Qwen35Moe(), GlmOcr())
