# SPDX-License-Identifier: Apache-2.0
"""Llama 4."""

from __future__ import annotations

from typing import Any, ClassVar

from vtc.models.shuffled import Shuffled


class Llama4(Shuffled):
    """Chunked and full attention layers, complex rotations. Each tile is a separate image.

    Layers without rotary positions may scale queries by position (`attn_temperature_tuning`), in
    steps of `floor_scale` tokens: results are exact below one step, by default 8192 tokens.
    """

    name: ClassVar[str] = "llama4"
    model_types: ClassVar[tuple[str, ...]] = ("llama4",)
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    reads_tower: ClassVar[bool] = False
    attention: ClassVar[str] = "causal, in chunks"

    def features(self, output: Any) -> Any:
        return output.last_hidden_state

    def per_side(self) -> int:
        return round(1 / self.model.config.vision_config.pixel_shuffle_ratio)
