# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5 and models of its shape: one image, one grid of patches, a two-layer projector."""

from __future__ import annotations

from typing import ClassVar

from .base import Family


class Llava(Family):
    """`LlavaForConditionalGeneration` with a CLIP or SigLIP tower; tested with Llama, Qwen2 and
    Mistral decoders."""

    name: ClassVar[str] = "llava"
    model_types: ClassVar[tuple[str, ...]] = ("llava",)
