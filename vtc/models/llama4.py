# SPDX-License-Identifier: Apache-2.0
"""Llama 4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.models.shuffled import Shuffled


class Llama4(Shuffled):
    """Chunked and full attention layers, complex rotations. Each tile is a separate image.

    Layers without rotary positions may scale queries by position (`attn_temperature_tuning`), in
    steps of `floor_scale` tokens: results are exact below one step, by default 8192 tokens.
    """

    name: ClassVar[str] = "llama4"
    model_types: ClassVar[tuple[str, ...]] = ("llama4",)
    encoder_parts: ClassVar[tuple[str, str, str, str]] = (
        *("input_layernorm", "self_attn"),
        *("post_attention_layernorm", "mlp"),
    )
    attention: ClassVar[str] = "causal, in chunks"
    decoder_parts: ClassVar[tuple[str, str, str]] = ("input_layernorm", "feed_forward", "norm")

    def cls_place(self) -> int:
        return -1

    def has_cls(self) -> bool:
        return True

    def prefix(self, given: Mapping[str, Any]) -> int:
        return 0

    def suffix(self) -> int:
        return 1

    def encoder_layers(self) -> list[Any]:
        return self._with_parts(list(self.tower.model.layers))

    def encoder_given(self, given: Mapping[str, Any], row: int, places: Tensor) -> dict[str, Any]:
        return {"freqs_ci": given["freqs_ci"].to(places.device)[places]}

    def encoder_output(self, hidden: Tensor) -> Any:
        return (hidden,)

    def encoder_depth(self, given: Mapping[str, Any]) -> int:
        return len(self.encoder_layers())

    def encoder_projectors(self) -> list[Any]:
        return []  # the adapter unfolds the grid

    def states_from(self) -> Any:
        return self.tower.vision_adapter

    def check_rotate(self) -> None:
        pass

    def rotate(self, layer: int, states: Tensor, rotation: Any) -> Tensor:
        found = torch.view_as_complex(states.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(found * rotation[:, None]).flatten(-2).type_as(states)

    def features(self, output: Any) -> Any:
        return output.last_hidden_state

    def replace_features(self, output: Any, features: Any) -> None:
        output.last_hidden_state = features

    def per_side(self) -> int:
        return round(1 / self.model.config.vision_config.pixel_shuffle_ratio)
