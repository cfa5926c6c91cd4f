# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-VL, including the hybrid with two towers."""

from __future__ import annotations

from typing import Any, ClassVar

from vtc.models.base import Adapter, UnsupportedModelError


class DeepseekVL(Adapter):
    """A SigLIP tower (in the hybrid also a SAM tower, so that patches cannot be merged in the
    towers) and an aligner."""

    name: ClassVar[str] = "deepseek_vl"
    model_types: ClassVar[tuple[str, ...]] = ("deepseek_vl", "deepseek_vl_hybrid")
    projects_patches: ClassVar[bool] = False
    stages: ClassVar[tuple[str, ...]] = ("encoder", "sequence", "layers")

    def encoder_layers(self) -> list[Any]:
        if hasattr(self.base, "high_res_vision_model"):
            raise UnsupportedModelError(
                "model: the aligner of the hybrid pairs each patch of the SigLIP tower with a "
                "place in the features of the SAM tower, in which a merged patch has no counterpart"
            )
        return super().encoder_layers()

    def projector(self) -> Any:
        return self.base.aligner
