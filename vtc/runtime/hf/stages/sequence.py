# SPDX-License-Identifier: Apache-2.0
"""The sequence stage: methods choose among the vision tokens that enter the decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from vtc.runtime.forward import Forward
from vtc.runtime.hf.stages.base import Runner
from vtc.runtime.stages import select_in_sequence

if TYPE_CHECKING:
    from vtc.runtime.hf.vision import Vision


class SequenceRunner(Runner):
    """Runs `select` on every image."""

    stage: ClassVar[str] = "sequence"

    def enter(
        self, forward: Forward, embeds: Tensor, keep: Tensor, vision: Vision
    ) -> tuple[Tensor, Tensor]:
        """Choose; see `Runner.enter`."""
        project = vision.project if self.adapter.projects_patches else None
        return select_in_sequence(forward, self.parts, embeds, keep, vision.tower_layer, project)
