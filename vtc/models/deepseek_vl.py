# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-VL, including the hybrid with two towers."""

from __future__ import annotations

from typing import Any, ClassVar

from vtc.models.base import Adapter


class DeepseekVL(Adapter):
    """A SigLIP tower (in the hybrid also a SAM tower) and an aligner. In the hybrid, patches are
    merged in the SigLIP tower, and a merged token gets the features that the SAM tower has at the
    place of its first patch."""

    name: ClassVar[str] = "deepseek_vl"
    model_types: ClassVar[tuple[str, ...]] = ("deepseek_vl", "deepseek_vl_hybrid")
    projects_patches: ClassVar[bool] = False
    stages: ClassVar[tuple[str, ...]] = ("encoder", "sequence", "layers")

    def encoder_projectors(self) -> list[Any]:
        # That of the hybrid pairs places of both towers, and runs on all.
        return [] if hasattr(self.base, "high_res_vision_model") else super().encoder_projectors()

    def projector(self) -> Any:
        return self.base.aligner
