# SPDX-License-Identifier: Apache-2.0
"""Janus and Janus-Pro."""

from __future__ import annotations

from typing import Any, ClassVar

from vtc.models.base import Adapter


class Janus(Adapter):
    """Understands and generates images: those that it reads are compressed, and
    `generate(generation_mode="image")` runs as without a patch."""

    name: ClassVar[str] = "janus"
    model_types: ClassVar[tuple[str, ...]] = ("janus",)
    own_generate: ClassVar[bool] = True

    def projector(self) -> Any:
        return self.base.aligner
