# SPDX-License-Identifier: Apache-2.0
"""Cosmos 3."""

from __future__ import annotations

from typing import Any, ClassVar

from vtc.models.qwen import QwenVL


class Cosmos3Omni(QwenVL):
    """The reasoner of Cosmos 3: tower and language model of Qwen3-VL."""

    name: ClassVar[str] = "cosmos3_omni"
    model_types: ClassVar[tuple[str, ...]] = ("cosmos3_omni",)


class Cosmos3Edge(QwenVL):
    """As Qwen2-VL, with the tower of SigLIP 2, whose patches the projector joins."""

    name: ClassVar[str] = "cosmos3_edge"
    model_types: ClassVar[tuple[str, ...]] = ("cosmos3_edge",)
    encoder_parts: ClassVar[tuple[str, str, str, str]] = (
        *("layer_norm1", "self_attn"),
        *("layer_norm2", "mlp"),
    )

    def encoder_layers(self) -> list[Any]:
        return self._with_parts(list(self.tower.encoder.layers))

    def encoder_projectors(self) -> list[Any]:
        return [self.base.projector]

    def projector(self) -> Any:
        return self.base.projector
