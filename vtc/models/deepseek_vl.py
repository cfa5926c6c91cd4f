# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-VL, including the hybrid with two towers."""

from __future__ import annotations

from typing import Any, ClassVar

from vtc.models.base import Adapter


class DeepseekVL(Adapter):
    """A SigLIP tower (in the hybrid also a SAM tower) and an aligner."""

    name: ClassVar[str] = "deepseek_vl"
    model_types: ClassVar[tuple[str, ...]] = ("deepseek_vl", "deepseek_vl_hybrid")
    projects_patches: ClassVar[bool] = False
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")

    def projector(self) -> Any:
        return self.base.aligner
